"""Character-level Shakespeare with what small speed runs found to hold: nanoGPT's parameters and tokens, a lower loss.

Muon (Jordan et al., 2024), rotary positions, QK-norm, ReLU^2 (So et al., 2021), RMSNorm, value embeddings, residual scales,
residual projections that start at zero, a soft-cap on the logits and a linear decay to zero (modded-nanogpt, nanochat).

Command:   python -m experiments.train --config configs/shakespeare_char_fast.py --workdir runs/shakespeare_fast \
               --config.data.files=tinyshakespeare.txt
Hardware:  2 CPU cores (AMD EPYC, Zen 5): 60 to 70 s for the whole command (nanoGPT's recipe in nanoGPT, same hour: 71 s)
Result:    1.565 nats over the whole validation split, mean of seeds 0, 1, 2 (1.5632, 1.5688, 1.5631; nanoGPT: 1.898)
Ablation:  python -m benchmarks.shakespeare_ablation --text tinyshakespeare.txt; 3 seeds each, paired differences +-
           standard error. Muon and rotary positions do the work; the rest is within noise here, or costs a little.
               without                                     nats   worse by
               Muon (AdamW instead, its best rate)       1.6626   +0.0975 +- 0.0035
               rotary (learned positions)                1.6047   +0.0397 +- 0.0010
               QK-norm                                   1.5682   +0.0032 +- 0.0017
               ReLU^2 (GELU)                             1.5673   +0.0022 +- 0.0025
               residual scales                           1.5650   -0.0001 +- 0.0026
               linear decay to zero (cosine to a tenth)  1.5644   -0.0007 +- 0.0002
               RMSNorm (LayerNorm)                       1.5622   -0.0029 +- 0.0042
               soft-cap                                  1.5614   -0.0036 +- 0.0037
               value embeddings (wider MLP)              1.5593   -0.0058 +- 0.0022
               zero-initialised residuals                1.5592   -0.0059 +- 0.0023
"""

from ml_collections import ConfigDict

from configs import shakespeare_char


def get_config() -> ConfigDict:
    """0.78M parameters, 1.54M characters."""
    config = shakespeare_char.get_config()
    config.model.position = "rotary"
    config.model.qk_norm = True
    config.model.activation = "relu2"
    config.model.norm = "rmsnorm"
    config.model.value_embeddings = True
    config.model.residual_scales = True
    config.model.residual_init = "zero"
    config.model.logit_softcap = 15.0
    config.model.mlp_dim = 448
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    return config
