"""Three learning rates, four seeds each: which rate is best, and by more than chance?

Command:   python -m experiments.sweep --config configs/shakespeare_char.py --config.data.files=tinyshakespeare.txt \
               --sweep configs/sweeps/learning_rate_and_seed.py --sweepdir runs/rates
           python -m experiments.report runs/rates
"""

from typing import Any


def get_hyper(h: Any) -> list[dict[str, Any]]:
    """12 runs."""
    return h.product(
        [
            h.sweep("config.optimizer.learning_rate", [3e-4, 1e-3, 3e-3]),
            h.sweep("config.seed", range(4)),
        ]
    )
