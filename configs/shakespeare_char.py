"""Character-level Shakespeare: nanoGPT's recipe for a CPU (github.com/karpathy/nanoGPT, README, "I only have a macbook").

Command:   python -m experiments.train --config configs/shakespeare_char.py --workdir runs/shakespeare \
               --config.data.files=tinyshakespeare.txt
Data:      the 1,115,394 characters of karpathy/char-rnn, data/tinyshakespeare/input.txt; the last tenth for validation
Hardware:  2 CPU cores (AMD EPYC, Zen 5): 45 s for the whole command (nanoGPT there: 85 s)
Result:    1.896 nats over the whole validation split, mean of seeds 0, 1, 2 (nanoGPT, same windows: 1.898)
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """0.8M parameters, 1.54M characters."""
    config = default.get_config()
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.max_seq_len = 64
    config.model.use_bias = False
    config.data.corpus = "text"
    config.data.tokenizer = "char"
    config.data.validation_fraction = 0.1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_fraction = 0.1
    config.optimizer.warmup_steps = 100
    config.optimizer.beta2 = 0.99
    config.train.num_train_steps = 2000
    config.train.batch_size = 12
    config.train.log_every_steps = 20
    config.eval.every_steps = 0
    config.eval.sample_tokens = 500
    config.checkpoint.every_steps = 500
    return config
