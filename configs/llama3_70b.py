"""Llama 3 70B (Grattafiori et al., 2024, arXiv:2407.21783): its shape, 70,553,706,496 parameters; for `experiments.plan`.

Command:   python -m experiments.train --config configs/llama3_70b.py --workdir runs/llama3_70b \
               --config.data.files='corpus/*.txt'
Hardware:  made for a slice such as v6e:16x16; not run by this project.
Expected:  python -m experiments.plan --config configs/llama3_70b.py --topology v6e:16x16
"""

from ml_collections import ConfigDict

from configs import llama3_8b


def get_config() -> ConfigDict:
    """80 layers, 8192 wide, 8 groups of 8 heads."""
    config = llama3_8b.get_config()
    config.model.num_layers = 80
    config.model.num_heads = 64
    config.model.embed_dim = 8192
    config.model.mlp_dim = 28672
    config.optimizer.learning_rate = 1.5e-4
    return config
