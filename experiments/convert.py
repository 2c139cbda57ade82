"""Write a model as a Hugging Face folder: python -m experiments.convert --model M --to FOLDER [--check]

M is a workdir, a Hugging Face folder, a GGUF file or a hub name. FOLDER gets config.json, safetensors in float32 and the
tokenizer's files, which Transformers and others read. --check reads FOLDER back and compares the outputs on a fixed batch
with M's; exit code 1 if they differ by more than 1e-5. With --adapter FOLDER gets PEFT's files of a workdir's adapter.
"""

import pathlib
from collections.abc import Sequence

from experiments import cli

TOLERANCE = 1e-5


def main(argv: Sequence[str]) -> int:
    """Converts; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="M", help="a workdir, a folder, a .gguf or a hub name")
    parser.add_argument("--step", type=int, help="which checkpoint of a workdir; the best, if not given")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--check", action="store_true", help="read it back and compare")
    parser.add_argument("--adapter", metavar="BASE", help="write the adapter, for a model that Transformers calls BASE")
    arguments = parser.parse(argv)
    folder = pathlib.Path(arguments.to)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        parser.error(f"--to {arguments.to}: it exists and is not an empty folder")

    import jax

    import gptjax
    from gptjax.interop import huggingface, peft
    from gptjax.workdir import environment, read

    with cli.user_errors():
        if arguments.adapter:
            model, params, _, _ = read(arguments.model, step=arguments.step, merged=False)
            peft.write(folder, model, params, base=arguments.adapter)
            print(f"{arguments.to}: an adapter for {arguments.adapter}")
            return 0
        model, params, tokenizer = gptjax.load(arguments.model, step=arguments.step)
        huggingface.write(folder, model, params, tokenizer)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{arguments.to}: {num_params:,} parameters in float32")
    metrics: dict[str, float] = {"convert/parameters": num_params}
    if arguments.check:
        difference = compare((model, params), gptjax.load(folder)[:2])
        metrics["convert/largest_difference"] = difference
        print(f"read back, its outputs differ by at most {difference:.1e}")
    cli.write_report(arguments.json, environment(), [], metrics)
    return 1 if metrics.get("convert/largest_difference", 0.0) > TOLERANCE else 0


def compare(*models: tuple) -> float:
    """The largest difference between outputs of (model, params) on a fixed batch, computed in float32."""
    import dataclasses

    import jax
    import numpy as np

    from gptjax.models import EncoderDecoder

    outputs = []
    for model, params in models:
        model = type(model)(dataclasses.replace(model.config, dtype="float32"))
        c = model.config
        draw = np.random.default_rng(0).integers
        tokens = draw(0, c.vocab_size, (2, min(c.max_seq_len, 32)))
        inputs = {"encoder_tokens": draw(0, c.vocab_size, tokens.shape)} if isinstance(model, EncoderDecoder) else {}
        outputs.append(np.asarray(jax.jit(model.apply)({"params": params}, tokens, **inputs)))
    if outputs[0].shape != outputs[1].shape:
        return float("inf")
    # Not a plain maximum: NaN must count as a difference.
    return float(np.max(np.nan_to_num(np.abs(outputs[0] - outputs[1]), nan=np.inf)))


if __name__ == "__main__":
    cli.run(main)
