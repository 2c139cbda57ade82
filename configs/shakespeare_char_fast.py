"""Character-level Shakespeare with what small speed runs found to hold: nanoGPT's parameters and tokens, a lower loss.

Muon (Jordan et al., 2024), rotary positions, QK-norm, ReLU^2 (So et al., 2021), RMSNorm, value embeddings, residual scales,
residual projections that start at zero, a soft-cap on the logits and a linear decay to zero (modded-nanogpt, nanochat).

Command:   python -m experiments.train --config configs/shakespeare_char_fast.py --workdir runs/shakespeare_fast \
               --config.data.files=tinyshakespeare.txt
Hardware:  2 CPU cores (AMD EPYC, Zen 5): 60 to 70 s for the whole command (nanoGPT's recipe in nanoGPT, same hour: 71 s)
Result:    1.565 nats over the whole validation split, mean of seeds 0, 1, 2 (1.5632, 1.5688, 1.5631; nanoGPT: 1.898)
Ablation:  python -m benchmarks.shakespeare_ablation --text tinyshakespeare.txt
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
