"""GPT-2 124M (Radford et al., 2019), 124,439,808 parameters, on any corpus of the user's.

Command:   python -m experiments.train --config configs/gpt2_small.py --workdir runs/gpt2_small \
               --config.data.files='corpus/*.txt'
Hardware:  made for 8 accelerators of 16 GB or more; not run at full length by this project.
Expected:  about 2.85 nats a token on OpenWebText after 300B tokens (nanoGPT's README; 8 x A100, 4 days).
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """12 layers, 768 wide, context 1024, GPT-2's vocabulary size."""
    config = default.get_config()
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.embed_dim = 768
    config.model.max_seq_len = 1024
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.model.scan_layers = True
    config.data.corpus = "text"
    config.data.vocab_size = 50257
    config.data.validation_fraction = 0.005
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.beta2 = 0.95
    config.train.num_train_steps = 600_000
    config.train.batch_size = 480
    config.train.accumulation_steps = 5
    config.eval.every_steps = 2000
    config.eval.max_batches = 100
    config.checkpoint.every_steps = 1000
    return config
