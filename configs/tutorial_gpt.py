"""The decoder that many tutorials build by hand, made to work, on the running Python's standard library.

Command:   python -m experiments.train --config configs/tutorial_gpt.py --workdir runs/tutorial_gpt
Stands for a tutorial with a vocabulary of 10000, width 512, 8 heads, 6 layers, feed-forward 1024, ReLU, biases, dropout
           0.1, and Adam at 1e-3 for 10 epochs. It feeds vectors of width 512 into layers of width 1024, and has neither
           positions nor a causal mask, so that every token is shown the answer. Here the widths fit, positions are those
           of Vaswani et al., 2017, arXiv:1706.03762, and a token sees only what came before it.
Data:      none to download
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """6 post-norm layers, 512 wide."""
    config = default.get_config()
    config.model.num_layers = 6
    config.model.num_heads = 8
    config.model.embed_dim = 512
    config.model.mlp_dim = 1024
    config.model.dropout = 0.1
    config.model.position = "sinusoidal"
    config.model.norm_position = "post"
    config.model.embed_scale = 0.0  # sqrt(512), so that positions do not drown the tokens
    config.model.activation = "relu"
    config.data.vocab_size = 10_000
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.0  # AdamW without it is Adam
    config.optimizer.beta2 = 0.999
    config.train.num_train_steps = 5058  # 10 epochs of 8,092 rows, which the standard library of Python 3.12.1 fills
    config.train.batch_size = 16
    config.eval.every_steps = 500
    config.eval.sample_prompt = "def "
    config.checkpoint.every_steps = 500
    return config
