"""Workdirs as training leaves them, without their models."""

import json

import numpy as np


def write_run(folder, losses, config=None, done=True):
    """A run whose training losses are `losses`, in steps of 100 tokens, 0.1 s and 1e6 FLOPs, evaluated every tenth."""
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text('{"device": "1 x <none>"}')
    config = config or {"seed": 0}
    train = {"num_train_steps": len(losses)} | config.get("train", {})
    (folder / "config.json").write_text(json.dumps(config | {"train": train}))
    lines = [
        {"step": n, "train/loss": loss, "train/tokens": 100 * n, "time/seconds": 0.1 * n, "perf/flops": 1e6 * n}
        | ({"eval/loss": loss} if n % 10 == 0 else {})
        for n, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.txt").write_text("--- sample 1 ---\n<script>alert(1)</script>\n")
    if done:
        (folder / "loss.png").touch()
    return folder


def write_sweep(folder, rates=(1e-4, 1e-3, 1e-2), layers=(2, 4), seeds=4, steps=300, deviation=0.02):
    """Runs whose loss ends at 2 + (decades of the learning rate from 1e-3)^2 / 10 - layers / 20, and noise of the seed."""
    rng = np.random.default_rng(0)
    n = np.arange(1, steps + 1)
    effects = rng.normal(0, deviation, size=seeds)
    for rate in rates:
        for count in layers:
            for seed in range(seeds):
                end = 2 + np.log10(rate / 1e-3) ** 2 / 10 - count / 20 + effects[seed]
                losses = end + rng.normal(0, deviation / 10) + 6 / n**0.7 + rng.normal(0, 0.05, steps) * (n % 10 > 0)
                config = {"seed": seed, "optimizer": {"learning_rate": rate}, "model": {"num_layers": count}}
                write_run(folder / f"lr={rate},layers={count},seed={seed}", losses.tolist(), config)
    return folder
