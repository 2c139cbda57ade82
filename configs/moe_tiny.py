"""llama_tiny with a mixture of 4 experts in place of each MLP, of which a token uses 2; none is dropped.

Command:   python -m experiments.train --config configs/moe_tiny.py --workdir runs/moe_tiny
Paper:     Mixtral (Jiang et al., 2024, arXiv:2401.04088), with the balance loss of Fedus et al., 2021, arXiv:2101.03961
Data:      none to download
"""

from ml_collections import ConfigDict

from configs import llama_tiny


def get_config() -> ConfigDict:
    """The FLOPs of llama_tiny: two experts of half its MLP."""
    config = llama_tiny.get_config()
    config.model.mlp_dim = 344
    config.model.num_experts = 4
    return config
