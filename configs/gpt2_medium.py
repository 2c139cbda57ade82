"""GPT-2 355M (Radford et al., 2019), 354,823,168 parameters, on any corpus of the user's.

Command:   python -m experiments.train --config configs/gpt2_medium.py --workdir runs/gpt2_medium \
               --config.data.files='corpus/*.txt'
Hardware:  made for a pod slice, parameters split over all devices (mesh.fsdp); not run at full length by this project.
Expected:  no result of ours; the schedule is gpt2_small.py's with the learning rate of Brown et al., 2020, table 2.1.
"""

from ml_collections import ConfigDict

from configs import gpt2_small


def get_config() -> ConfigDict:
    """24 layers, 1024 wide, context 1024."""
    config = gpt2_small.get_config()
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.embed_dim = 1024
    config.optimizer.learning_rate = 3e-4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
