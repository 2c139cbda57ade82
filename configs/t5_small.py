"""T5-small (Raffel et al., 2020, arXiv:1910.10683), span corruption on any corpus of the user's.

Command:   python -m experiments.train --config configs/t5_small.py --workdir runs/t5_small \
               --config.data.files='corpus/*.txt'
Model:     60,506,624 parameters at T5's vocabulary of 32128, as published
Departs:   AdamW at a lower rate in place of Adafactor; a byte-level BPE in place of SentencePiece, unless data.tokenizer
           names one
Hardware:  made for 8 accelerators of 16 GB or more; not run at full length by this project.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """6 and 6 layers, 512 wide, 512 tokens, 2^19 steps of 2^16 tokens; sections 3.1.1 and 3.1.2 of the paper."""
    config = default.get_config()
    config.model.family = "encoder_decoder"
    config.model.num_layers = 6
    config.model.num_encoder_layers = 6
    config.model.num_heads = 8
    config.model.head_dim = 64
    config.model.embed_dim = 512
    config.model.mlp_dim = 2048
    config.model.max_seq_len = 512
    config.model.dropout = 0.1
    config.model.attention_dropout = True
    config.model.position = "relative"
    config.model.attention_scale = 1.0
    config.model.norm = "rmsnorm"
    config.model.norm_epsilon = 1e-6
    config.model.activation = "relu"
    config.model.use_bias = False
    config.model.scale_logits = True
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.data.corpus = "text"
    config.data.objective = "span"
    config.data.vocab_size = 32128
    config.data.validation_fraction = 0.005
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "rsqrt"
    config.optimizer.weight_decay = 0.0
    config.optimizer.beta2 = 0.999
    config.train.num_train_steps = 524_288
    config.train.batch_size = 128
    config.eval.every_steps = 5000
    config.eval.max_batches = 100
    config.eval.num_samples = 0
    config.checkpoint.every_steps = 5000
    return config
