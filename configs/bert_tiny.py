"""A small BERT that fills in masked tokens of Python, from the running Python's own standard library.

Command:   python -m experiments.train --config configs/bert_tiny.py --workdir runs/bert_tiny
Paper:     Devlin et al., 2018, arXiv:1810.04805; but rotary positions, pre-norm and Muon, with which it takes minutes
Data:      none to download
Hardware:  2 CPU cores (AMD EPYC, Zen 5): 79 s of training, 84 s in all
Result:    30.0 % of masked tokens right, 3.43 nats (seed 0; always the commonest token: 2.8 %)
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """4 layers, 128 wide, a vocabulary of 512."""
    config = default.get_config()
    config.model.family = "bert"
    config.model.embed_dim = 128
    config.model.max_seq_len = 128
    config.model.position = "rotary"  # learned: 13 % of masked tokens right in the time of 30 %
    config.model.activation = "gelu_exact"
    config.model.head = "masked_lm"
    config.data.objective = "masked"
    config.data.vocab_size = 512
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.final_fraction = 0.05
    config.train.num_train_steps = 500
    config.train.batch_size = 32
    config.eval.every_steps = 0
    config.eval.num_samples = 0
    config.checkpoint.every_steps = 200
    return config
