"""Multi30k, English to German, by a small encoder-decoder from scratch: Tiny Transformers on 29,000 image captions.

Command:   python -m experiments.train --config configs/multi30k_en_de.py --workdir runs/multi30k \
               --config.data.files=multi30k/train.en.gz,multi30k/train.de.gz \
               --config.data.validation_files=multi30k/val.en.gz,multi30k/val.de.gz
Paper:     Wu et al., 2021, arXiv:2105.14462, the text-only "Tiny" Transformer; about 41 BLEU on test_2016_flickr,
           Moses-tokenised and lower-cased, with the last checkpoints averaged
Departs:   Muon with a cosine, which is at a validation loss of 4.07 nats after 130 steps; pre-norm, a
           moving average of the parameters in place of the average of checkpoints, byte-level BPE, cased text, bfloat16
Data:      multi30k/dataset on GitHub, task1/raw; the paper's sizes: 29,000 and 1,014 pairs
Hardware:  2 CPU cores (AMD EPYC, Zen 5), other work beside it: 0.28 s a step, 23 min; seeds 1 and 2 on
           one core of an Intel Xeon (AMX), the other at other work: 73 and 55 min
Result:    seeds 0, 1 and 2, beam 5, test_2016_flickr: 40.1, 39.8 and 40.1 BLEU by plain sacrebleu (95 % intervals about
           1.6 either side), chrF 64.9, 65.0 and 65.0; 40.6, 40.2 and 40.5 Moses-tokenised (sacremoses, aggressive
           dashes) and lower-cased, by sacrebleu's tokenizer 'none'. By
           python -m experiments.evaluate --model runs/multi30k --metrics bleu,chrf --num_beams 5 \
               --tasks multi30k/test_2016_flickr.en.gz+multi30k/test_2016_flickr.de.gz
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """4 and 4 layers, 128 wide, a joint BPE of 10000, about 4,000 target tokens a step; section 3.1 of the paper."""
    config = default.get_config()
    config.model.family = "encoder_decoder"
    config.model.num_layers = 4
    config.model.num_encoder_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    config.model.mlp_dim = 256
    config.model.max_seq_len = 128
    config.model.dropout = 0.3
    config.model.position = "sinusoidal"
    config.model.embed_scale = 0.0  # sqrt(128)
    config.model.activation = "relu"
    config.data.corpus = "lines"
    config.data.objective = "seq2seq"
    config.data.text_field = "source"
    config.data.vocab_size = 10_000
    config.init.scale = 4.0  # deviations of 0.08, near 1 / sqrt(128)
    config.model.dtype = "bfloat16"
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.final_fraction = 0.01
    config.train.num_train_steps = 5000
    config.train.batch_size = 32
    config.train.label_smoothing = 0.1
    config.train.ema_decay = 0.998
    config.eval.every_steps = 500
    config.eval.sample_tokens = 60
    config.checkpoint.every_steps = 500
    return config
