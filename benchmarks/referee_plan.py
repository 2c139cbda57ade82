"""MaxText's training step compiled for a slice: run by `benchmarks.plan` with the Python of MaxText's environment.

Arguments: a file for the result, one for the compiled program's text, and MaxText's own arguments.
"""

import json
import pathlib
import sys
import time

import jax
from maxtext.trainers.pre_train import train_compile


def main() -> None:
    """Compiles as MaxText's command does; writes seconds, bytes, and the text."""
    result, text, *arguments = sys.argv[1:]
    compile_lowered, found = jax.stages.Lowered.compile, {}

    def timed(lowered, *args, **options):
        start, cpu = time.perf_counter(), time.process_time()
        try:
            compiled = compile_lowered(lowered, *args, **options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            pathlib.Path(result).write_text(json.dumps({"fits": False}))
            sys.exit(0)
        memory = compiled.memory_analysis()
        found.update(
            fits=True,
            compile_seconds=time.perf_counter() - start,
            compile_cpu_seconds=time.process_time() - cpu,
            bytes_needed=memory.peak_memory_in_bytes,
            bytes_arguments=memory.argument_size_in_bytes,
            bytes_temporaries=memory.temp_size_in_bytes,
        )
        pathlib.Path(text).write_text(compiled.as_text())
        return compiled

    jax.stages.Lowered.compile = timed
    base = pathlib.Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    train_compile.main(["train_compile", str(base), *arguments])
    pathlib.Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
