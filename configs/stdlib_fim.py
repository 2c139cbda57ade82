"""Filling in the middle of Python: a GPT on the standard library that also learns what stands between two texts.

Command:   python -m experiments.train --config configs/stdlib_fim.py --workdir runs/fim
           without the objective: --config.data.objective=causal --workdir runs/no_fim
           python -m experiments.prepare_data middles middles.jsonl
           python -m experiments.evaluate --model runs/fim --compare runs/no_fim --tasks middles.jsonl
Paper:     Bavarian et al., 2022, arXiv:2207.14255: half of the documents rearranged, as likely one way as the other
Data:      the running Python's standard library; 1,000 ends of lines of validation files, of which the model without the
           objective is given what stands before alone
Hardware:  2 CPU cores of an Intel Xeon (AMX)
Result:    to be measured
"""

from ml_collections import ConfigDict

from configs import stdlib_gpt


def get_config() -> ConfigDict:
    """The model of stdlib_gpt.py, for four times as long."""
    config = stdlib_gpt.get_config()
    config.model.dtype = "bfloat16"
    config.data.objective = "fim"
    config.train.num_train_steps = 1600
    return config
