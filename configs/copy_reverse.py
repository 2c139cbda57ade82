"""A small encoder-decoder that copies and reverses short strings, to see that it learns.

Command:   python -m experiments.train --config configs/copy_reverse.py --workdir runs/copy_reverse \
               --config.data.files=pairs.jsonl
Paper:     Vaswani et al., 2017, arXiv:1706.03762; pre-norm, learned positions
Data:      a JSON object a line, such as {"source": "reverse: abc", "target": "cba"}; `make verify PART=learn` writes 20,000
Hardware:  2 CPU cores (AMD EPYC, Zen 5): 55 s in all
Result:    500 of 500 unseen words of 3 to 10 letters exact, greedily (seed 0)
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """2 and 2 layers, 128 wide, characters, 16 or so pairs a row."""
    config = default.get_config()
    config.model.family = "encoder_decoder"
    config.model.num_layers = 2
    config.model.num_encoder_layers = 2
    config.model.embed_dim = 128
    config.model.max_seq_len = 128
    config.data.corpus = "jsonl"
    config.data.text_field = "source"
    config.data.objective = "seq2seq"
    config.data.too_long = "drop"
    config.data.tokenizer = "char"
    config.data.validation_fraction = 0.01
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.final_fraction = 0.01
    config.train.num_train_steps = 300
    config.train.batch_size = 32
    config.eval.every_steps = 0
    config.checkpoint.every_steps = 100
    return config
