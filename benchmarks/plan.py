"""Compiled for slices that are not here, beside MaxText: python -m benchmarks.plan --maxtext PYTHON

The training step of `experiments.plan` and that of MaxText's `train_compile`: the same shape of model, topology, rows a
chip and full remat, parameters and optimizer over all chips. Bytes a chip, seconds to compile, and the predicted step of
both compiled programs by one method. PYTHON is that of an environment with `maxtext[tpu]==0.2.5`; ours
needs the extra `plan`. MaxText has no GPT-2; in its place stands its own block with as many numbers (rotary, gelu, tied).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from experiments import cli

ROOT = pathlib.Path(__file__).parent.parent
GPT2 = (
    "base_emb_dim=768 base_num_query_heads=12 base_num_kv_heads=12 head_dim=64 base_mlp_dim=3072 "
    "base_num_decoder_layers=12 vocab_size=50304 max_target_length=1024 logits_via_embedding=true mlp_activations=['gelu']"
)
# config, topology, chips, rows a chip; MaxText's name of the topology, and its model
CASES = {
    "124M": ("gpt2_small", "v5e:4x4", 16, 8, "v5e-16", GPT2),
    "8B": ("llama3_8b", "v5e:16x16", 256, 2, "v5e-256", "model_name=llama3-8b max_target_length=2048"),
    "8B, v5p": ("llama3_8b", "v5p:4x4x4", 64, 2, "v5p-128", "model_name=llama3-8b max_target_length=2048"),
    "70B": ("llama3_70b", "v6e:16x16", 256, 2, "v6e-256", "model_name=llama3-70b max_target_length=2048"),
}
NAMES = ("bytes_needed", "bytes_temporaries", "compile_seconds", "compute_seconds", "communication_seconds")


def main(argv: Sequence[str]) -> int:
    """Compiles both and prints a table; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--maxtext", required=True, metavar="PYTHON", help="with maxtext[tpu]==0.2.5")
    parser.add_argument("--cases", default=";".join(CASES), help="which, with ';' between them")
    parser.add_argument("--rows", type=int, help="a chip, in place of the case's: to find the most that fit")
    arguments = parser.parse(argv)
    cases = arguments.cases.split(";")
    if not cases or not CASES.keys() >= set(cases):
        parser.error(f"--cases {arguments.cases} must be some of {'; '.join(CASES)}")
    if not pathlib.Path(arguments.maxtext).is_file():
        parser.error(f"--maxtext {arguments.maxtext}: no such file")
    if arguments.rows is not None and arguments.rows < 1:
        parser.error(f"--rows {arguments.rows} must be at least 1")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    metrics: dict[str, float] = {}
    print(
        f"{'':<22} {'peak GB':>8} {'temp GB':>8} {'compile s':>9} {'compute ms':>10} {'traffic ms':>10} {'sum ms':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            for system in ("gptjax", "MaxText"):
                found = compiled(system, case, arguments.rows, arguments.maxtext, pathlib.Path(folder))
                metrics |= {f"{case}/{system}/{name}": value for name, value in found.items()}
                peak, temporaries, took, compute, traffic = (found.get(name, float("nan")) for name in NAMES)
                times = f"{compute * 1e3:10.1f} {traffic * 1e3:10.1f} {(compute + traffic) * 1e3:8.1f}"
                bytes_and_seconds = f"{peak / 1e9:8.2f} {temporaries / 1e9:8.2f} {took:9.0f}"
                refused = "" if found["fits"] else "  does not fit"
                print(f"{case + ', ' + system:<22} {bytes_and_seconds} {times}{refused}", flush=True)
    from gptjax.workdir import environment

    cli.write_report(arguments.json, environment(), [0], metrics)
    return 0


def compiled(system: str, case: str, rows: int | None, python: str, folder: pathlib.Path) -> dict[str, float]:
    """What a system's compiled step needs, by `NAMES`."""
    config, topology, chips, usual, name, model = CASES[case]
    rows = rows or usual
    result, text = folder / "plan.json", folder / "program.txt"
    if system == "gptjax":
        fields = [f"train.batch_size={rows * chips}", "model.remat=full", "train.accumulation_steps=1", "mesh.data=1"]
        flags = [f"--config.{field}" for field in [*fields, "mesh.fsdp=-1"]]
        command = [sys.executable, "-m", "experiments.plan", "--config", f"configs/{config}.py", "--topology", topology]
        command += [*flags, "--json", str(result)]
    else:
        options = ["remat_policy=full", "ici_fsdp_parallelism=-1", "enable_checkpointing=false", "run_name=plan"]
        where = [f"compile_topology={name}", "compile_topology_num_slices=1", f"per_device_batch_size={rows}"]
        command = [
            python,
            str(ROOT / "benchmarks/referee_plan.py"),
            str(result),
            str(text),
            *where,
            *options,
            *model.split(),
        ]
    # What gptjax has set for itself, as its compilation cache, is not for MaxText.
    variables = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith("JAX_")
    }
    variables = {**os.environ} if system == "gptjax" else variables | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode == 2 and system == "gptjax":
        raise cli.UserError(done.stderr.strip().removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(result.read_text())
    if system == "gptjax":
        found = {name.replace("/", "_").removeprefix("predicted_"): value for name, value in found["metrics"].items()}
    elif found["fits"]:
        from gptjax.distributed.mesh import AXES
        from gptjax.distributed.plan import Plan, find_slices, predict

        sizes = dict.fromkeys(AXES, 1) | {"fsdp": chips}
        plan = Plan(0, None, **predict(text.read_text(), find_slices(topology, 1), sizes))
        found |= {"compute_seconds": plan.compute_seconds, "communication_seconds": plan.communication_seconds}
    return {"fits": found["fits"]} | {name: found[name] for name in NAMES if name in found}


if __name__ == "__main__":
    cli.run(main)
