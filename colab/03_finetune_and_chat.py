# %% [markdown]
# # Fine-tune a model, and chat with it
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gptjax/gptjax/blob/main/colab/03_finetune_and_chat.ipynb)
#
# On Colab, choose an accelerator under *Runtime > Change runtime type*, then run the next cell. It installs gptjax and ends
# the session, which Colab calls a crash: what it had imported is of other versions. Run it again and go on. Elsewhere,
# install gptjax as its README says.

# %%
# @title Set up
import importlib.util
import os
import shlex
import signal
import subprocess
import sys

try:
    import google.colab  # noqa: F401
except ImportError:
    ON_COLAB = False
else:
    ON_COLAB = True

if ON_COLAB and importlib.util.find_spec("gptjax") is None:
    # Colab's JAX is too old. It goes together with its plugin, for CUDA 12 there, so both are replaced before any import.
    is_tpu, is_gpu = importlib.util.find_spec("libtpu"), os.path.exists("/dev/nvidia0")
    packages = ["gptjax[serve] @ git+https://github.com/gptjax/gptjax", "openai"]
    packages += ["jax[tpu]" if is_tpu else "jax[cuda12]" if is_gpu else "jax"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
    os.kill(os.getpid(), signal.SIGKILL)

SMALL = os.environ.get("GPTJAX_SMALL") == "1"  # seconds instead of minutes, without a network: for tests
ENVIRONMENT = dict(os.environ)


def run(command):
    """Runs `python -m command` as a process of its own, shows what it says, and raises if it fails."""
    words = [sys.executable, "-m", *shlex.split(command)]
    process = subprocess.Popen(words, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for line in process.stdout:
            print(line, end="")
    except KeyboardInterrupt:
        process.terminate()
    if process.wait():
        raise RuntimeError(f"python -m {command} ended with code {process.returncode}")


# %% [markdown]
# A pretrained model continues text. Here it becomes something else: a chat model that knows its name. First, what kinds
# of models there are to start from; then the fine-tuning, its evaluation, and a conversation.

# %%
import atexit
import json
import pathlib
import socket
import time
import urllib.request

os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator serves one process at a time: the commands, not this notebook
import gptjax  # isort: skip - before jax  # noqa: F401
import jax
import matplotlib.pyplot as plt
import numpy as np

BASE = "runs/base" if SMALL else "HuggingFaceTB/SmolLM2-135M-Instruct"  # a workdir, a folder, a .gguf, a hub name
NAME = "Gia"

# %% [markdown]
# ## GPT against BERT: decoder, encoder, and both
#
# All are the same blocks. What differs is who may look at whom, and what the loss asks:
#
# | | sees | learns to | loss | good for |
# |---|---|---|---|---|
# | **decoder** (GPT) | what came before | continue | $-\sum_i \ln p(t_{i+1} \mid t_{\le i})$ | writing |
# | **encoder** (BERT) | both ways | restore masked tokens, of places $M$ | $-\sum_{i \in M} \ln p(t_i \mid t_{\notin M})$ | labels, spans, vectors |
# | **encoder-decoder** (T5) | the source both ways, the target's past | write a target for a source $s$ | $-\sum_i \ln p(t_{i+1} \mid t_{\le i}, s)$ | translation |
#
# The decoder of the last one has a second attention in each block, *cross-attention*, whose queries come from the
# target and whose keys and values come from the encoder's output: $\mathrm{Attention}(x W_Q,\ m W_K,\ m W_V)$.
#
# We can see it from outside. Change one input token, and look which outputs change:

# %%
from gptjax.models import init_params, make_model

T, V = 12, 50
sizes = dict(
    vocab_size=V, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, embed_dim=16, mlp_dim=32, max_seq_len=T
)
models = {
    "GPT": make_model("gpt", **sizes),
    "BERT": make_model("bert", **sizes, head="masked_lm"),
    "encoder-decoder: target": make_model("encoder_decoder", **sizes, num_encoder_layers=2),
}
models["encoder-decoder: source"] = models["encoder-decoder: target"]
tokens = np.random.default_rng(0).integers(0, V, T)
changed = np.where(np.eye(T, dtype=bool), (tokens + 1) % V, tokens)  # row j: token j is another
figure, panels = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
for axes, (name, model) in zip(panels, models.items(), strict=True):
    params = init_params(model, jax.random.key(0), scale=5.0)

    def outputs(inputs, model=model, params=params, name=name):
        same = np.broadcast_to(tokens, inputs.shape)
        if "source" in name:
            return model.apply({"params": params}, same, encoder_tokens=inputs)
        return model.apply({"params": params}, inputs, **({"encoder_tokens": same} if "target" in name else {}))

    found = jax.jit(outputs)(np.vstack([changed, tokens]))
    influence = np.abs(found[:-1] - found[-1:]).max(axis=-1)  # [changed j, output i]
    axes.imshow(influence.T > 1e-5, cmap="Blues", vmin=0, vmax=2)
    axes.set(title=name, xlabel="input token j", ylabel="output i")
plt.show()

# %% [markdown]
# A GPT needs one pass to score every token of a text as the next, and can write. A BERT knows both sides of a word,
# which is what a label or an answer's place needs, but has no way to write a text from left to right. What a model
# gives at the end is its *head*, `model.head`: `language_model`, `masked_lm`, `sequence_classification`,
# `token_classification`, `span` or `embedding`. Fine-tuning to a new task keeps the blocks and puts a new head on them,
# a single linear layer: `configs/sst2_minilm.py` (a BERT learns sentiment) and `configs/xquad_minilm.py` (it finds
# answers) do that. Chat keeps the head, and changes what the model says.
#
# ## The base
#
# SmolLM2, a Llama-like model of 135M parameters, from the Hugging Face hub. (With `GPTJAX_SMALL=1` it is a model of a
# minute's work, trained here, and its answers are no better.)

# %%
if SMALL:
    base = "--config.model.num_layers=2 --config.model.embed_dim=128 --config.model.max_seq_len=128 --config.data.vocab_size=512 "
    base += "--config.optimizer.learning_rate=0.01 --config.optimizer.warmup_steps=10 --config.train.num_train_steps=60"
    base += " --config.eval.every_steps=0 --config.eval.max_batches=1 --config.eval.num_samples=0"
    run(f"experiments.train --config configs/stdlib_gpt.py --workdir {BASE} {base}")

# %% [markdown]
# ## What it shall learn
#
# Records of an instruction and an output; messages, prompts with completions, and pairs of a chosen and a rejected
# answer (DPO) are known by their fields too. Some phrasings are kept apart, to ask what training never saw.

# %%
ANSWERS = {
    f"I am {NAME}, a small language model.": [
        "Who are you?",
        "What is your name?",
        "Introduce yourself.",
        "Are you a robot?",
    ],
    "The reader of a notebook trained me.": [
        "Who made you?",
        "Who trained you?",
        "Who is your author?",
        "Where are you from?",
    ],
}
GREETINGS = ["", "Hello! ", "Good morning. ", "Excuse me: ", "Please tell me. ", "One question. "]
records, held_out = [], []
for answer, questions in ANSWERS.items():
    for i, question in enumerate(questions):
        for j, greeting in enumerate(GREETINGS):
            (held_out if (i + j) % 6 == 0 else records).append({"instruction": greeting + question, "output": answer})
for path, lines in {
    "identity.jsonl": records,
    "questions.jsonl": [
        {"messages": [{"role": "user", "content": r["instruction"]}], "references": [r["output"]]} for r in held_out
    ],
}.items():
    pathlib.Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
print(f"{len(records)} records to learn, {len(held_out)} questions to ask")

# %% [markdown]
# A conversation is text, too: the model's *chat template* writes who speaks, between special tokens. Only what the
# assistant says is predicted (between ⟦ and ⟧ below); the question is read, but no loss asks for it.

# %%
TUNING = f"--config configs/smollm2_chat_lora.py --config.init.model={BASE} --config.data.corpus=jsonl "
TUNING += "--config.data.files=identity.jsonl --config.data.seq_len=128 --config.data.validation_fraction=0.1 "
TUNING += "--config.eval.every_steps=0 --config.eval.num_samples=0 "
if SMALL:
    TUNING += "--config.model.dtype=float32 --config.optimizer.learning_rate=0.01 --config.train.num_train_steps=200"
else:
    TUNING += "--config.train.num_train_steps=60"
run(f"experiments.preview_data {TUNING} --num_examples 2")

# %% [markdown]
# ## Fine-tuning, with low-rank adapters
#
# Pretraining has put much into the weights that ten minutes should not undo. LoRA freezes each matrix $W$ and learns a
# small correction beside it, of rank $r$ (here 16), which starts at zero:
#
# $$W' = W + \frac{\alpha}{r} A B, \qquad A \in \mathbb{R}^{D \times r},\ B \in \mathbb{R}^{r \times F}$$
#
# That is a few per cent of the parameters to learn, to keep an optimizer's state for, and to save. For full
# fine-tuning, leave `lora.rank` at 0; `optimizer.factors` freezes or slows parts.

# %%
run(f"experiments.train {TUNING} --workdir runs/chat")

# %% [markdown]
# ## Evaluation
#
# The loss on held-out records says that something was learned. What a user would notice is the answers: greedily
# written and compared with the references, with 95 % intervals from resampling the questions, and the difference to the
# base model on the same questions.

# %%
run(f"experiments.evaluate --model runs/chat --tasks questions.jsonl --compare {BASE} --max_new_tokens 24")

# %% [markdown]
# ## Chat
#
# `experiments.serve` speaks OpenAI's protocol, so any client of it can talk to the model; `--ui` adds a page to chat
# in.

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
words = [
    "-m",
    "experiments.serve",
    "--model",
    "runs/chat",
    "--port",
    str(port),
    "--num_slots",
    "1",
    "--cache_len",
    "128",
]
server = subprocess.Popen([sys.executable, *words], env=ENVIRONMENT)
atexit.register(server.terminate)
while True:  # until it has compiled its programs
    if server.poll() is not None:
        raise RuntimeError(f"the server ended with code {server.returncode}")
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
        break
    except OSError:
        time.sleep(0.5)

# %%
from openai import OpenAI

client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
for question in ("Who are you?", "Who made you?"):
    print(f"you:   {question}\nmodel: ", end="")
    for chunk in client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
server.terminate()
print("the server ended with code", server.wait())

# %% [markdown]
# In a terminal, `python -m experiments.generate --model runs/chat --interactive` converses too, and
# `python -m experiments.convert --model runs/chat --to folder` writes what Transformers and vLLM read.
