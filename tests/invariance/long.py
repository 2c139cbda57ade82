"""The long form of the invariance suite: python -m tests.invariance.long, on eight fake devices; prints a JSON list of
(what, figure, met). Run by `make verify PART=invariance`."""

import json
import sys

import gptjax  # noqa: F401 isort: skip - before jax

import jax

from tests.invariance.checks import MODELS, Case, attentions, distance, meshes, met


def groups() -> dict[str, list[Case]]:
    """Every case, by what is varied."""
    remats = [(("scan_layers", scan), ("remat", remat)) for scan in (True, False) for remat in ("none", "dots", "full")]
    dropped = (("attention_dropout", True),)
    found: dict[str, list[Case]] = {
        "packed or padded": [Case(model, padded=True) for model in MODELS],
        "micro-batches": [Case(model, accumulation=n) for model in MODELS for n in (2, 4, 8)],
        "remat, scanned or unrolled": [Case(model, changes) for model in MODELS for changes in remats],
        "attention": [Case(model, (("attention", name),)) for model in MODELS for name in attentions(model)],
    }
    for devices in (4, 8):
        for model in MODELS:
            found[f"meshes of {devices}, {model}"] = [Case(model, mesh=m, dropout=True) for m in meshes(model, devices)]
    found |= {
        "attention on meshes of 4": [
            Case(model, (("attention", name),), mesh=mesh)
            for model in MODELS
            for name in attentions(model)
            for mesh in meshes(model, 4)
            if name != "plain"
        ],
        "attention dropout on meshes of 4": [Case("gpt", dropped, mesh=m, dropout=True) for m in meshes("gpt", 4)],
        "micro-batches on meshes of 4": [
            Case(model, accumulation=2, mesh=m) for model in MODELS for m in meshes(model, 4)
        ],
        "AdamW": [Case(optimizer="adamw", mesh=m, dropout=True) for m in meshes("gpt", 4)]
        + [Case(model, optimizer="adamw", accumulation=4) for model in MODELS],
        "Muon": [Case(model, optimizer="muon", mesh=m) for model in ("gpt", "moe") for m in meshes(model, 4)],
        "bfloat16": [
            Case(model, (("dtype", "bfloat16"),), mesh=m) for model in ("gpt", "llama") for m in meshes(model, 4)
        ],
    }
    return found


def main() -> None:
    """Computes and prints."""
    rows = []
    for name, cases in groups().items():
        found = [(case, distance(case)) for case in cases]
        misses = [f"{case}: {d}" for case, d in found if not met(case, d)]
        worst = f"loss {max(d.loss for _, d in found):.0e}, losses {max(d.losses for _, d in found):.0e}"
        figure = f"{len(cases)} cases, {worst}, tensors {max(d.tensor for _, d in found):.0e}"
        rows.append((name, "; ".join([figure, *misses]), not misses))
        jax.clear_caches()
        print(f"{name}: {rows[-1][1]}", file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
