"""Extractive question answering: a MiniLM encoder with a span head on the English part of XQuAD, split by article.

Command:   python -m experiments.train --config configs/xquad_minilm.py --workdir runs/xquad --config.init.model=MINILM \
               --config.data.files=xquad/xquad.en.json
Paper:     Artetxe et al., 2020, arXiv:1910.11856; recipe of Devlin et al., 2018, arXiv:1810.04805, section 4.2
Data:      google-deepmind/xquad on GitHub: 1,190 questions on 240 paragraphs of 48 articles, of which a fifth of the
           questions or more, with all that is asked about an article, is held out. MINILM as in sst2_minilm.py
Hardware:  2 CPU cores (AMD EPYC, Zen 5)
Result:    seed 0, python -m experiments.evaluate --model runs/xquad: exact match 36.2 % (29.9 to 42.5), F1 46.2 (40.3 to
           52.2) of 254 questions, by the checkpoint of least loss; 9 min. Beside Transformers, the same start and order,
           last step: exact match 35.4 % and there 34.6, difference +0.8 points (95 % interval over the questions -4.7 to
           +6.3), F1 44.8 and 47.7, -2.9 (-8.2 to +1.9); 50 losses without dropout within 1.4e-6; by python -m
           benchmarks.finetune --seeds 1. On 2 cores of an Intel Xeon (AMX) 11.9 examples/s, there 9.7: 1.24x, rounds 1.23
           to 1.26, by --rounds 3
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Eight epochs of about 15 windows, 8 full rows, a step, all parameters, AdamW with a linear decay."""
    config = default.get_config()
    config.model.head = "span"
    config.model.dropout = 0.1
    config.data.corpus = "json"
    config.data.objective = "question_answering"
    config.data.seq_len = 384
    config.data.validation_fraction = 0.2
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.01
    config.optimizer.beta2 = 0.999
    config.train.num_train_steps = 528
    config.train.batch_size = 8
    config.eval.every_steps = 66
    config.checkpoint.every_steps = 66
    return config
