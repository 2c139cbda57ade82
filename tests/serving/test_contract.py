"""The server against its own OpenAPI description, and as the command that starts it."""

import os
import signal
import subprocess
import time

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from experiments import cli, serve
from gptjax.interop import huggingface
from tests import runs
from tests.serving.conftest import KEY, make_loaded

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "8"))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_nothing_that_the_description_allows_or_forbids_breaks_the_server(server, mode):
    headers = {"Authorization": f"Bearer {KEY}"}
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) == 11
    for operation in operations:
        if mode == GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing that could be wrong

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def validate(case):
            # No description can say that a model of that name is there, or that the prompt fits its context.
            case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])

        validate()


def test_the_command_serves_and_drains(tmp_path):
    """On SIGTERM it takes nobody new, finishes what runs, and exits with 0."""
    huggingface.write(tmp_path / "tiny", *make_loaded())
    (tmp_path / "keys").write_text(f"{KEY}\n")
    flags = [
        "--model",
        f"it={tmp_path / 'tiny'}",
        "--port",
        "0",
        "--num_slots",
        "2",
        "--api_key_file",
        str(tmp_path / "keys"),
    ]
    process = subprocess.Popen(
        runs.command("serve", *flags),
        env=runs.environment(),
        cwd=runs.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving it at http://127.0.0.1:"), process.stderr.read()
        url = line.split()[-1].removesuffix("/v1")
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            body = {"model": "it", "prompt": "x", "max_tokens": 200, "stream": True, "ignore_eos": True}
            body |= {"response_format": {"type": "regex", "regex": "y*z{150}"}, "logit_bias": {"121": 100}}
            chunks = 0
            with client.stream("POST", "/v1/completions", json=body) as response:
                for event in response.iter_lines():
                    chunks += "text" in event
                    if chunks == 1:
                        process.send_signal(signal.SIGTERM)
                        chunks += 1
                assert event == "data: [DONE]" or event == ""
            assert chunks > 50
        assert process.wait(30) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
        assert KEY not in process.stdout.read() + process.stderr.read()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --model"),
        (["--model", "nowhere/at/all"], "no such model"),
        (["--model", "a=x", "--model", "a=y"], "must differ"),
        (["--model", "x", "--num_slots", "0"], "--num_slots 0 must be above 0"),
        (["--model", "x", "--port", "65536"], "from 0 to 65535"),
        (["--model", "x", "--api_key_file", os.devnull], "holds no key"),
        (["--model", "x", "--host", "256.0.0.1"], "--host 256.0.0.1"),
    ],
)
def test_bad_commands_are_one_line(flags, message, capsys):
    assert cli.exit_code(lambda: serve.main(flags)) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
