"""Where between 1e-4 and 1e-1 is the best learning rate, and how much weight decay and dropout go with it?

Command:   pip install 'gptjax[search]'
           python -m experiments.sweep --config configs/shakespeare_char.py --config.data.files=tinyshakespeare.txt \
               --sweep configs/sweeps/search.py --sweepdir runs/search --num_trials 50
"""

from typing import Any


def get_hyper(h: Any) -> list[dict[str, Any]]:
    """One point with three ranges; each trial chooses within them."""
    return h.product(
        [
            h.sweep("config.optimizer.learning_rate", h.Range(1e-4, 1e-1, log=True)),
            h.sweep("config.optimizer.weight_decay", h.Range(0.0, 0.3)),
            h.sweep("config.model.dropout", h.Range(0.0, 0.3)),
        ]
    )
