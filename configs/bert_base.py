"""BERT-base (Devlin et al., 2018, arXiv:1810.04805), masked words on any corpus of the user's.

Command:   python -m experiments.train --config configs/bert_base.py --workdir runs/bert_base \
               --config.data.files='corpus/*.txt'
Model:     109,482,240 parameters in the encoder with its pooler at BERT's vocabulary of 30522, as published
Departs:   no next-sentence task, which RoBERTa showed to be of no use (Liu et al., 2019, arXiv:1907.11692, section 4.2),
           so the pooler waits for fine-tuning; a byte-level BPE in place of WordPiece, unless data.tokenizer names one
Hardware:  made for 8 accelerators of 16 GB or more; not run at full length by this project.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """12 layers, 768 wide, 512 tokens; appendix A.2 of the paper."""
    config = default.get_config()
    config.model.family = "bert"
    config.model.num_layers = 12
    config.model.num_heads = 12
    config.model.embed_dim = 768
    config.model.max_seq_len = 512
    config.model.dropout = 0.1
    config.model.attention_dropout = True
    config.model.norm_position = "post"
    config.model.norm_epsilon = 1e-12
    config.model.embed_norm = True
    config.model.activation = "gelu_exact"
    config.model.token_types = 2
    config.model.pooler = True
    config.model.head = "masked_lm"
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.data.corpus = "text"
    config.data.objective = "masked"
    config.data.vocab_size = 30522
    config.data.validation_fraction = 0.005
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.01
    config.optimizer.beta2 = 0.999
    config.train.num_train_steps = 1_000_000
    config.train.batch_size = 256
    config.train.accumulation_steps = 4
    config.eval.every_steps = 5000
    config.eval.max_batches = 100
    config.eval.num_samples = 0
    config.checkpoint.every_steps = 5000
    return config
