"""Traces: of a known program, and of a run that is stopped and goes on within the steps to trace."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.training.profile import start_trace, top_operations
from tests import runs


def test_the_longest_operation_is_found_and_nothing_is_counted_twice(tmp_path):
    def program(x):
        with jax.named_scope("heavy"):
            y = x @ x
        return jax.lax.fori_loop(0, 5, lambda i, y: jnp.sin(y) + i, y)

    x = jnp.ones((900, 900))
    compiled = jax.jit(program).lower(x).compile()
    other = jax.jit(lambda x: (x @ x) @ x)
    other(compiled(x)).block_until_ready()
    start_trace(str(tmp_path))
    for _ in range(3):
        compiled(x).block_until_ready()
        other(x).block_until_ready()
    jax.profiler.stop_trace()
    head, *rows = top_operations(tmp_path, compiled.as_text(), count=100).splitlines()
    shares = [float(row.split("%")[0]) for row in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=1)
    (heavy,) = [row.split() for row in rows if "heavy" in row]  # the other program's products are not there
    assert heavy[2] == "3"
    assert sum(float(row.split()[1]) for row in rows) == pytest.approx(float(head.split("(")[1].split()[0]), rel=0.01)
    loop = [row for row in rows if "while" in row.split()[3]]
    assert all(float(row.split("%")[0]) < 50 for row in loop)  # what it calls is not its own


def test_a_run_that_stops_within_the_trace_and_goes_on(tmp_path):
    corpus = runs.write_corpus(tmp_path)
    fields = {"train__num_train_steps": 8, "profile__steps": "1:4", "eval__every_steps": 0}
    for limit, code in ((0.0001, 143), (0, 0)):
        result = runs.run(runs.train_command(tmp_path / "run", corpus, **fields, train__max_minutes=limit))
        assert result.returncode == code, result.stderr
        assert "operation (" in result.stderr and "blocks/Block/attention" in result.stderr
    assert len(list((tmp_path / "run/profile").rglob("*.xplane.pb"))) == 2
