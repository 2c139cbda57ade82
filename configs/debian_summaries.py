"""Summarisation: a GPT from scratch says of a Debian package's description what its synopsis says.

Command:   apt-get -o Acquire::Languages=en update
           /usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*_main_i18n_Translation-en* > Translation-en
           python -m experiments.prepare_data descriptions debian Translation-en
           python -m experiments.train --config configs/debian_summaries.py --workdir runs/debian \
               --config.data.files=debian/train.jsonl --config.data.validation_files=debian/validation.jsonl
           python -m experiments.evaluate --model runs/debian --metrics rouge1,rouge2,rougeL --tasks debian/test.jsonl
Paper:     Radford et al., 2019 (the model); Lin, 2004 (ROUGE); the first sentence, which prepare_data
           scores, is a baseline as in See et al., 2017, arXiv:1704.04368
Data:      Debian 12, main: descriptions of 200 characters and more, the first 1,000; what begins alike is in one split
Hardware:  one CPU core of an Intel Xeon (AMX), the other at other work: 107 min, in two parts
Result:    seed 0, all 2,322 of the test split: ROUGE-1 26.7 (25.9 to 27.5), ROUGE-2 8.3 (7.7 to 9.0), ROUGE-L 24.2 (23.4 to
           24.9), by the checkpoint of least loss, of step 1,500; the first sentence: 30.6, 13.9, 27.2. So small a model
           names a package's kind and misses its words: the loss counts half a million tokens of synopses, which it
           learns by heart after step 1,500
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """4 layers, 256 wide, a BPE of 8192; about 6,000 tokens a step, of which the loss counts the synopses."""
    config = default.get_config()
    config.model.max_seq_len = 384
    config.model.dropout = 0.1
    config.model.position = "rotary"
    config.model.dtype = "bfloat16"
    config.data.corpus = "jsonl"
    config.data.objective = "sft"
    config.data.too_long = "drop"
    config.data.vocab_size = 8192
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_fraction = 0.05
    config.train.num_train_steps = 3000
    config.train.ema_decay = 0.998
    config.eval.every_steps = 500
    config.eval.sample_tokens = 40
    config.checkpoint.every_steps = 500
    return config
