"""A small Llama on the running Python's standard library: rotary positions, RMSNorm, SwiGLU, grouped heads, no biases.

Command:   python -m experiments.train --config configs/llama_tiny.py --workdir runs/llama_tiny
Paper:     Touvron et al., 2023, arXiv:2302.13971; grouped heads as in Llama 2, arXiv:2307.09288
Data:      none to download
Hardware:  2 CPU cores (AMD EPYC, Zen 5): 246 s of training, about 4.5 minutes in all
Result:    3.87 nats a token, 1.57 bits a byte (seed 0)
"""

from ml_collections import ConfigDict

from configs import stdlib_gpt


def get_config() -> ConfigDict:
    """4 layers, 256 wide, as many parameters in an MLP as GPT-2's has."""
    config = stdlib_gpt.get_config()
    config.model.num_kv_heads = 2
    config.model.mlp_dim = 688  # 8 / 3 of the width, in multiples of 16, for three matrices
    config.model.position = "rotary"
    config.model.norm = "rmsnorm"
    config.model.activation = "swiglu"
    config.model.use_bias = False
    config.model.tie_embeddings = False
    return config
