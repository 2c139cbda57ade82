"""English to Chinese, small: the messages of two programs under BSD licences, by an encoder-decoder from scratch.

Command:   pip download --no-deps --dest wheels wagtail==8.0.1 Django==5.2.19
           python -m experiments.prepare_data catalogues en_zh wheels/*.whl
           python -m experiments.train --config configs/catalogues_en_zh.py --workdir runs/en_zh \
               --config.data.files=en_zh/train.jsonl --config.data.validation_files=en_zh/validation.jsonl
           python -m experiments.evaluate --model runs/en_zh --metrics bleu:zh,chrf --num_beams 5 --tasks en_zh/test.jsonl
Paper:     Vaswani et al., 2017, arXiv:1706.03762; sizes and recipe of multi30k_en_de.py
Data:      the zh_Hans catalogues of Wagtail and Django (BSD-3), about 2,000 messages
Hardware:  2 CPU cores of an Intel Xeon (AMX), other work beside it: 8 to 11 min
Result:    the 105 test messages by the checkpoint of least validation loss, BLEU by sacrebleu's zh tokenizer: 33.8, 37.3
           and 33.2 with seeds 0, 1 and 2, each within some 8 either way (95 %); chrF 35.3, 40.0, 37.6
"""

from ml_collections import ConfigDict

from configs import multi30k_en_de


def get_config() -> ConfigDict:
    """The model of multi30k_en_de.py with a joint BPE of 3000, in float32."""
    config = multi30k_en_de.get_config()
    config.model.dtype = "float32"
    config.data.corpus = "jsonl"
    config.data.text_field = "prompt"
    config.data.target_field = "completion"
    config.data.too_long = "drop"
    config.data.vocab_size = 3000
    config.optimizer.warmup_steps = 100
    config.train.num_train_steps = 1500
    config.train.batch_size = 16
    config.eval.every_steps = 150
    config.checkpoint.every_steps = 150
    return config
