"""Multi30k, English to German, by a decoder-only GPT: source and target are one text, and the loss counts the target.

Command:   for split in train val test_2016_flickr; do python -m experiments.prepare_data pairs multi30k/$split.jsonl \
               multi30k/$split.en.gz multi30k/$split.de.gz; done
           python -m experiments.train --config configs/multi30k_gpt.py --workdir runs/multi30k_gpt \
               --config.data.files=multi30k/train.jsonl --config.data.validation_files=multi30k/val.jsonl
           python -m experiments.evaluate --model runs/multi30k_gpt --metrics bleu,chrf --num_beams 5 \
               --tasks multi30k/test_2016_flickr.jsonl
Paper:     Gao et al., 2022, arXiv:2210.11807, on one decoder for both; recipe of multi30k_en_de.py
Data:      multi30k/dataset on GitHub, task1/raw
Hardware:  one CPU core of an Intel Xeon (AMX), the other at other work: 123 min
Result:    seed 0, beam 5, test_2016_flickr: 38.4 BLEU by plain sacrebleu (95 % interval 36.7 to 40.1), chrF 63.5, by the
           checkpoint of least loss, of step 2,500; the encoder-decoder of multi30k_en_de.py: 40.1
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """6 layers, 192 wide, a joint BPE of 10000, about 8,000 tokens of both languages a step."""
    config = default.get_config()
    config.model.num_layers = 6
    config.model.num_heads = 6
    config.model.embed_dim = 192
    config.model.mlp_dim = 384
    config.model.max_seq_len = 128
    config.model.dropout = 0.3
    config.model.position = "rotary"
    config.model.embed_scale = 0.0  # sqrt(192)
    config.model.dtype = "bfloat16"
    config.data.corpus = "jsonl"
    config.data.objective = "sft"
    config.data.vocab_size = 10_000
    config.init.scale = 3.5  # deviations of 0.07, near 1 / sqrt(192)
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.final_fraction = 0.01
    config.train.num_train_steps = 4000
    config.train.batch_size = 64
    config.train.label_smoothing = 0.1
    config.train.ema_decay = 0.998
    config.eval.every_steps = 500
    config.eval.sample_tokens = 60
    config.checkpoint.every_steps = 500
    return config
