"""The base model of "Attention is all you need" (Vaswani et al., 2017, arXiv:1706.03762), from the user's pairs.

Command:   python -m experiments.train --config configs/transformer_base.py --workdir runs/transformer_base \
               --config.data.files='wmt14-en-de.jsonl'
Data:      a JSON object a line, {"source": "...", "target": "..."}; the paper's is WMT 2014 English-German, 4.5M pairs
Departs:   no label smoothing, no average of the last checkpoints (train.ema_decay is near); attention has biases
Hardware:  made for 8 accelerators of 16 GB or more; not run at full length by this project.
Expected:  no result of ours; the paper has 27.3 BLEU on newstest2014 after 100,000 steps (8 x P100, 12 hours).
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """6 and 6 layers, 512 wide, a shared BPE of 37000, 25,600 tokens a step; sections 3 and 5 of the paper."""
    config = default.get_config()
    config.model.family = "encoder_decoder"
    config.model.num_layers = 6
    config.model.num_encoder_layers = 6
    config.model.num_heads = 8
    config.model.embed_dim = 512
    config.model.mlp_dim = 2048
    config.model.max_seq_len = 256
    config.model.dropout = 0.1
    config.model.position = "sinusoidal"
    config.model.norm_position = "post"
    config.model.embed_scale = 0.0  # sqrt(512)
    config.model.activation = "relu"
    config.data.corpus = "jsonl"
    config.data.text_field = "source"
    config.data.objective = "seq2seq"
    config.data.too_long = "drop"
    config.data.vocab_size = 37000
    config.data.validation_fraction = 0.001
    config.init.scale = 2.2  # deviations of 0.044 = 1 / sqrt(512), which is Xavier's for a square matrix of that width
    config.optimizer.learning_rate = 7e-4  # 1 / sqrt(512 * 4000), the peak of the paper's equation 3
    config.optimizer.warmup_steps = 4000
    config.optimizer.schedule = "rsqrt"
    config.optimizer.weight_decay = 0.0
    config.optimizer.beta2 = 0.98
    config.optimizer.clip_norm = 0.0
    config.train.num_train_steps = 100_000
    config.train.batch_size = 100
    config.eval.every_steps = 2000
    config.eval.num_samples = 0
    config.checkpoint.every_steps = 2000
    return config
