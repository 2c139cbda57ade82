"""The server under load: python -m benchmarks.serve --model M [--clients 8,64] [--seconds 60] [--llama_cpp PYTHON]

So many clients at once, each with one streamed completion after the other: prompts of 16 to 512 random words, a token or
so each, texts of 16 to 128 tokens, which no end token ends; seed 0. Tokens a second in all, seconds to the first token and
between tokens (of those that come together, the later ones count 0) at p50, p95 and p99; answers lost; programs compiled
after the start, and resident memory when half the time is over and at the end. The systems are ours, ours without
continuous batching (`--num_slots 1`), and, by `--llama_cpp PYTHON`, llama.cpp's server from that Python's llama-cpp-python
(a .gguf model), which gets the same prompts. Each is a process of its own, one after the other; 2 threads.
"""

import asyncio
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import httpx
import numpy as np

from experiments import cli

ROOT = pathlib.Path(__file__).parent.parent
PROMPTS, TEXTS = (16, 32, 64, 128, 256, 512), (16, 32, 64, 128)
CONTEXT = 1024
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "</s>")
# Its weights in plain buffers: those that it packs for AMX end version 0.3.36 with a segmentation fault.
LLAMA = """
from llama_cpp import llama
from llama_cpp.server.__main__ import main
defaults = llama.llama_cpp.llama_model_default_params
def plain_buffers():
    params = defaults()
    params.use_extra_bufts = False
    return params
llama.llama_cpp.llama_model_default_params = plain_buffers
main()
"""
WORDS = "the of and to in is you that it he was for on are as with his"


class Answer(NamedTuple):
    """When the first token came and the last, in seconds from the request, how many, and the gaps between them."""

    first: float
    num_tokens: int
    gaps: list[float]


def main(argv: Sequence[str]) -> int:
    """Measures and prints a table; returns the exit code, 1 if an answer was lost or a program compiled."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--model", required=True, metavar="M", help="a decoder-only model, as experiments.serve takes it"
    )
    parser.add_argument("--clients", default="8,64", help="how many at once, one after the other")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, for each")
    parser.add_argument("--systems", default="ours,one_slot", help="which of ours")
    parser.add_argument("--num_slots", type=int, default=16, help="of our engine")
    parser.add_argument("--weights", default="float32", help="of our engine")
    parser.add_argument("--llama_cpp", metavar="PYTHON", help="a Python with llama-cpp-python[server]")
    arguments = parser.parse(argv)
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.2f})", file=sys.stderr)
    ours = [sys.executable, "-m", "experiments.serve", "--model", f"it={arguments.model}", "--cache_len", str(CONTEXT)]
    ours += ["--weights", arguments.weights, "--num_slots"]
    slots = {"ours": str(arguments.num_slots), "one_slot": "1"}
    if not slots.keys() >= set(arguments.systems.split(",")):
        parser.error(f"--systems {arguments.systems} must be some of {', '.join(slots)}")
    systems = {system: [*ours, slots[system]] for system in arguments.systems.split(",")}
    if arguments.llama_cpp:
        llama = ["-c", LLAMA, "--model", arguments.model, "--model_alias", "it", "--n_ctx", str(CONTEXT)]
        systems["llama.cpp"] = [arguments.llama_cpp, *llama, "--n_threads", "2", "--interrupt_requests", "False"]
    metrics: dict[str, float] = {}
    for system, command in systems.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            found = asyncio.run(
                measure(process, port, [int(n) for n in arguments.clients.split(",")], arguments.seconds)
            )
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        metrics |= {f"{system}/{name}": value for name, value in found.items()}
        for name, value in found.items():
            print(f"{system:<15} {name:<40} {value:.4g}")
    from gptjax.workdir import environment

    cli.write_report(arguments.json, environment(), [0], metrics)
    return 1 if any(value for name, value in metrics.items() if name.endswith(("lost", "compiled"))) else 0


async def measure(process: subprocess.Popen, port: int, clients: Sequence[int], seconds: float) -> dict[str, float]:
    """Waits for a server and loads it."""
    found: dict[str, float] = {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as http:
        while not await is_ready(http):
            if process.poll() is not None:
                raise cli.UserError(f"{' '.join(map(str, process.args))} ended with code {process.returncode}")  # type: ignore[arg-type]
            await asyncio.sleep(0.2)
        compiled, bias = await num_compiles(http), await end_bias(http)
        for number in clients:
            answers: list[Answer] = []
            lost = [0]
            started = time.monotonic()
            deadline = started + seconds
            tasks = [asyncio.create_task(client(http, i, deadline, bias, answers, lost)) for i in range(number)]
            await asyncio.sleep(seconds / 2)
            half = resident_bytes(process.pid)
            await asyncio.gather(*tasks)
            took = time.monotonic() - started
            name = f"{number} clients"
            found[f"{name}/tokens_per_second"] = sum(answer.num_tokens for answer in answers) / took
            gaps = [gap for answer in answers for gap in answer.gaps]
            for what, values in (("first_token", [answer.first for answer in answers]), ("between_tokens", gaps)):
                for percent in (50, 95, 99):
                    found[f"{name}/{what}_seconds_p{percent}"] = float(np.percentile(values or [np.nan], percent))
            found |= {f"{name}/answers": len(answers), f"{name}/lost": lost[0]}
            found |= {f"{name}/resident_gib_half": half / 2**30}
            found |= {f"{name}/resident_gib_end": resident_bytes(process.pid) / 2**30}
        found["compiled"] = await num_compiles(http) - compiled
    return found


async def client(
    http: httpx.AsyncClient, seed: int, deadline: float, bias: dict, answers: list[Answer], lost: list[int]
) -> None:
    """One request after the other, until the deadline; what was begun is finished."""
    rng = random.Random(seed)
    while time.monotonic() < deadline:
        prompt = " ".join(rng.choices(WORDS.split(), k=rng.choice(PROMPTS)))
        wanted = rng.choice(TEXTS)
        body = {"model": "it", "prompt": prompt, "max_tokens": wanted, "stream": True, "seed": rng.randrange(1 << 20)}
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}} | bias
        try:
            if (answer := await ask(http, body)) and answer.num_tokens:
                answers.append(answer)
                continue
        except httpx.HTTPError as error:
            print(f"lost: {error!r}", file=sys.stderr)
        lost[0] += 1


async def ask(http: httpx.AsyncClient, body: dict) -> Answer | None:
    """One streamed answer; None if it does not come whole."""
    started = last = time.monotonic()
    first, num_tokens, gaps, whole = 0.0, 0, [], False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            print(f"lost: {response.status_code} {(await response.aread())[:200]!r}", file=sys.stderr)
            return None
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                whole = True
            elif line.startswith("data: "):
                chunk, now = json.loads(line[6:]), time.monotonic()
                if chunk.get("usage"):
                    num_tokens = chunk["usage"]["completion_tokens"]
                    continue
                [choice] = chunk["choices"]
                if choice["finish_reason"] == "length" and not num_tokens:  # llama.cpp's server does not say
                    num_tokens = body["max_tokens"]
                if not choice["text"]:
                    continue
                if first == 0.0:
                    first = now - started
                else:
                    gaps.append(now - last)
                last = now
    # Tokens that come in one piece have no gap between them.
    return Answer(first, num_tokens, gaps + [0.0] * max(0, num_tokens - 1 - len(gaps))) if whole else None


async def is_ready(http: httpx.AsyncClient) -> bool:
    """Whether the server answers; llama.cpp's has no /ready."""
    try:
        ready = (await http.get("/ready")).status_code
        return ready == 200 or (ready == 404 and (await http.get("/v1/models")).status_code == 200)
    except httpx.HTTPError:
        return False


async def end_bias(http: httpx.AsyncClient) -> dict:
    """What forbids llama.cpp's server, which has no `ignore_eos`, to end a text; nothing for ours."""
    bias = {}
    for token in END_TOKENS:
        answer = await http.post("/extras/tokenize", json={"model": "it", "input": token})
        if answer.status_code == 200 and len(ids := answer.json()["tokens"]) == 1:
            bias[str(ids[0])] = -100.0
    return {"logit_bias": bias} if bias else {}


async def num_compiles(http: httpx.AsyncClient) -> float:
    """As our server's metrics say; 0 for others."""
    found = re.search(r"^gptjax_compiles (\S+)", (await http.get("/metrics")).text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def resident_bytes(pid: int) -> int:
    """The memory that a process has."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    cli.run(main)
