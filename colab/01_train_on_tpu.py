# %% [markdown]
# # Train a GPT on a TPU
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gptjax/gptjax/blob/main/colab/01_train_on_tpu.ipynb)
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
    packages = ["gptjax @ git+https://github.com/gptjax/gptjax"]
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
# A GPT reads a text and says, at every place in it, how likely each token is to come next. Below, one is first taken
# apart, each formula beside the function of `gptjax` that computes it; then one is trained, by a command that survives
# whatever happens to this machine; and then we look inside what it has learned.

# %%
import pathlib
import time

ALLOW_CPU = SMALL  # True: train on a CPU, slowly
if ON_COLAB:
    from google.colab import drive

    drive.mount("/content/drive")  # what lies there outlives this machine
WORKDIR = pathlib.Path("/content/drive/MyDrive/gptjax" if ON_COLAB else "runs").absolute() / "stdlib_gpt"

# %% [markdown]
# ## Which accelerator is there?
#
# JAX falls back to the CPU when it finds no other device, and says so only in a warning. So we ask it, and refuse. An
# accelerator serves one process at a time: the commands below get it, and this notebook itself computes on the CPU.

# %%
question = "import jax; print(jax.default_backend(), jax.device_count(), jax.devices()[0].device_kind)"
answer = subprocess.run(
    [sys.executable, "-c", question], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True
)
PLATFORM, count, kind = answer.stdout.splitlines()[-1].split(maxsplit=2)
print(f"{PLATFORM}: {count} x {kind}")
if PLATFORM == "cpu" and not ALLOW_CPU:
    raise RuntimeError("no accelerator: Runtime > Change runtime type, or ALLOW_CPU = True above to train on a CPU")

os.environ["JAX_PLATFORMS"] = "cpu"
import gptjax  # isort: skip - before jax
import argparse
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import clear_output, display

# %% [markdown]
# ## Input encoding
#
# A text becomes *tokens*, numbers from 0 to $V - 1$ that stand for frequent pieces of text; here byte-pair encoding
# finds them in the source of `argparse`. Each token $t_i$ then becomes a vector of $D$ numbers, a row of a learned
# table $E$. To this is added a vector for its place $i$, for attention itself does not see the order of what it reads:
#
# $$x_i = E_{t_i} + P_i$$
#
# GPT-2 learns $P$ too. The first Transformer computed it, $\sin$ and $\cos$ of the place at wavelengths from $2\pi$ to
# nearly $20000\pi$, in the picture. (Llama turns queries and keys by such angles instead: `model.position = "rotary"`.)

# %%
from gptjax.data.tokenizers import build_tokenizer
from gptjax.models import init_params, make_model
from gptjax.models.positions import sinusoidal

tokenizer = build_tokenizer("bpe", documents=lambda: iter([inspect.getsource(argparse)]), vocab_size=512)
ids = tokenizer.encode("def add(self, name): return self.add_argument(name)")
print([tokenizer.decode([token]) for token in ids])

sizes = dict(num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, embed_dim=64, mlp_dim=256, max_seq_len=64)
model = make_model("gpt", vocab_size=tokenizer.vocab_size, **sizes)
params = init_params(model, jax.random.key(0))  # a dict of arrays


def embed(params, ids):
    """[T] to [T, D]."""
    return params["token_embedding"]["embedding"][ids] + params["position_embedding"]["embedding"][: len(ids)]


print("x", embed(params, ids).shape)
figure, axes = plt.subplots(figsize=(7, 2.5))
axes.imshow(sinusoidal(jnp.arange(64)[None], 64)[0].T, cmap="RdBu", aspect="auto")
axes.set(xlabel="place", ylabel="dimension", title="sinusoidal positions")
plt.show()

# %% [markdown]
# ## Self-attention
#
# Each token asks a *query* $q_i$, and offers a *key* $k_j$ and a *value* $v_j$, all linear in $x$. What it gets is the
# mean of the values, weighted by how well their keys fit its query:
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d}} + M\right) V$$
#
# The scores are divided by $\sqrt{d}$, the root of the keys' length, since otherwise they grow with it, and the softmax
# would put all weight on one token. The mask $M$ is $0$ where $i$ may look at $j$, and $-\infty$ where it may not. A
# model that predicts the next token must not see it: $j \le i$, the causal mask. An encoder such as BERT looks both
# ways. And where several documents are packed into one row, each sees only itself.

# %%
from gptjax.models.attention_ops import attend, row_mask


def attention(query, key, value, visible):
    """[T, d] three times, and bool [T, T], to [T, d] and the weights [T, T]."""
    scores = query @ key.T / np.sqrt(key.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return weights @ value, weights


query, key, value = jax.random.normal(jax.random.key(1), (3, 12, 16))
tokens, documents = jnp.zeros((1, 12), int), jnp.array([[1] * 5 + [2] * 7])
masks = {
    "GPT: causal": row_mask(tokens, None, causal=True),
    "GPT: two packed documents": row_mask(tokens, documents, causal=True),
    "BERT: both ways": row_mask(tokens, None, causal=False),
}
figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axes, (name, mask) in zip(panels, masks.items(), strict=True):
    mixed, weights = attention(query, key, value, mask.visible()[0, 0])
    ours = attend(*(y[None, :, None] for y in (query, key, value)), mask, scale=16**-0.5)[0, :, 0]  # [B, T, H, K]
    np.testing.assert_allclose(mixed, ours, atol=1e-5)
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=name, xlabel="key j", ylabel="query i")
plt.show()

# %% [markdown]
# ## Multi-head attention, feed-forward network, block
#
# One softmax gives one mean. So $H$ heads attend side by side, each with projections of its own into $d = D / H$
# dimensions, and $W_O$ mixes what they found:
#
# $$\mathrm{MultiHead}(x) = \mathrm{Concat}(h_1, \dots, h_H)\, W_O + b_O, \qquad
#   h_n = \mathrm{Attention}(x W_Q^n + b_Q^n,\ x W_K^n + b_K^n,\ x W_V^n + b_V^n)$$
#
# Attention moves information between places. The feed-forward network then works on each place alone, usually four
# times as wide inside, and holds most of the parameters:
#
# $$\mathrm{FFN}(x) = \mathrm{GELU}(x W_1 + b_1)\, W_2 + b_2$$
#
# A *block* adds both to what it reads, each after a normalisation, so that from the first to the last layer there is
# one stream of vectors that every layer reads and adds to:
#
# $$x \leftarrow x + \mathrm{MultiHead}(\mathrm{LayerNorm}(x)), \qquad
#   x \leftarrow x + \mathrm{FFN}(\mathrm{LayerNorm}(x))$$
#
# ## Output decoding
#
# A GPT is the embedding, $L$ such blocks and a last norm. The score of each token as the next one is the product of
# $x_i$ with that token's row of $E$, and its probability the softmax of the scores. That is all of GPT-2, and it fits
# in a cell:

# %%
from gptjax.models.transformer import unstack


def norm(x, p):
    """LayerNorm: mean 0 and variance 1, then a learned scale and bias."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def multi_head(x, p, visible):
    """[T, D] to [T, D] and the weights [H, T, T]."""
    query, key, value = (
        jnp.einsum("td,dhk->htk", x, p[name]["kernel"]) + p[name]["bias"][:, None] for name in ("query", "key", "value")
    )
    heads, weights = jax.vmap(attention, (0, 0, 0, None))(query, key, value, visible)
    return jnp.einsum("htk,hkd->td", heads, p["out"]["kernel"]) + p["out"]["bias"], weights


def feed_forward(x, p):
    return jax.nn.gelu(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]


def gpt(params, ids):
    """Token ids [T] to logits [T, V], and the attention weights of each layer."""
    x, maps = embed(params, ids), []
    visible = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
    for p in unstack(params["blocks"], len(params["blocks"]["mlp_norm"]["scale"])).values():
        mixed, weights = multi_head(norm(x, p["attention_norm"]), p["attention"], visible)
        x = x + mixed
        x = x + feed_forward(norm(x, p["mlp_norm"]), p["mlp"])
        maps.append(weights)
    return norm(x, params["final_norm"]) @ params["token_embedding"]["embedding"].T, maps


logits, _ = gpt(params, ids)
np.testing.assert_allclose(logits, model.apply({"params": params}, ids[None])[0], atol=1e-4)
print(f"{logits.shape[0]} places x {logits.shape[1]} scores, the same as the model's that is trained below")

# %% [markdown]
# ## Loss
#
# What came next, $t_{i+1}$, should have been likely. The loss is the mean of its surprise:
#
# $$\mathcal{L} = -\frac{1}{T} \sum_{i=1}^{T} \ln p(t_{i+1} \mid t_1, \dots, t_i)$$
#
# A model that knows nothing gives each token $1 / V$, a loss of $\ln V$. The *perplexity* $e^\mathcal{L}$ is the number
# of equally likely tokens that would surprise as much. Both depend on the tokenizer; *bits per byte* does not, and so
# compares models with different ones. Pretraining is nothing but lowering this number, by its gradient, over very much
# text.

# %%
from gptjax.training.losses import cross_entropy

total, _ = cross_entropy(logits[None, :-1], ids[None, 1:], jnp.ones((1, len(ids) - 1)))
print(f"untrained: {total / (len(ids) - 1):.2f} nats a token; ln V = {np.log(tokenizer.vocab_size):.2f}")

# %% [markdown]
# ## Pretraining
#
# The corpus is Python's own standard library, which every machine has. `configs/stdlib_gpt.py` is the experiment, and
# every field of it may be changed on the command line. `max_minutes` ends a session cleanly, state saved, before Colab
# does it less cleanly; `mesh.platform` makes a missing accelerator an error.
#
# While the command trains, the cell reads its `metrics.jsonl` and draws the curve.

# %%
FIELDS = ["train.max_minutes=60", "eval.num_samples=2", "eval.sample_tokens=60", f"mesh.platform={PLATFORM}"]
if SMALL:
    FIELDS += ["model.num_layers=2", "model.num_heads=2", "model.embed_dim=64", "model.max_seq_len=64"]
    FIELDS += ["data.vocab_size=512", "train.num_train_steps=160", "optimizer.learning_rate=0.01"]
    FIELDS += ["eval.every_steps=40", "eval.max_batches=4", "checkpoint.every_steps=20"]
else:
    FIELDS += ["model.num_layers=6", "model.num_heads=6", "model.embed_dim=384", "model.dropout=0.1"]
    FIELDS += ["model.dtype=bfloat16", "train.num_train_steps=1000", "train.batch_size=32"]
COMMAND = f"experiments.train --config configs/stdlib_gpt.py --workdir {WORKDIR} "
COMMAND += " ".join(f"--config.{field}" for field in FIELDS)


def draw():
    """Draws the losses so far; returns the last step, 0 before the first."""
    metrics = gptjax.read_runs(WORKDIR).metrics if (WORKDIR / "metrics.jsonl").exists() else []
    if not len(metrics):
        return 0
    figure, axes = plt.subplots(figsize=(7, 3))
    for name, style in (("train/loss", "-"), ("eval/loss", "o-")):
        if name in metrics:
            known = metrics.dropna(subset=name)
            axes.plot(known["step"], known[name], style, label=name)
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend()
    clear_output(wait=True)
    display(figure)
    plt.close(figure)
    return metrics["step"].max()


def train(disconnect_at=None):
    """Trains, or goes on, and draws meanwhile; kills the run at a step, as a machine does that goes away."""
    with open("train.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *shlex.split(COMMAND)], env=ENVIRONMENT, stdout=log, stderr=log
        )
    try:
        while process.poll() is None:
            if disconnect_at and draw() >= disconnect_at:
                process.kill()
                print(f"killed after step {draw()}")
                return
            time.sleep(0.3 if SMALL else 2)
        draw()
    finally:
        process.terminate()  # if it was interrupted here: it saves, and ends
        process.wait()
    print(pathlib.Path("train.log").read_text())
    if process.returncode not in (0, 143):  # 143: max_minutes are over; run the cell again
        raise RuntimeError(f"training ended with code {process.returncode}")


train(disconnect_at=60 if SMALL else 300)

# %% [markdown]
# That was a disconnection: the process was killed in the middle of its work. Now the same command again, as you would
# run this cell again tomorrow, on another machine. It goes on from the last checkpoint, with the next row of the data
# and the same random numbers: losses and parameters are those of a run that was never touched.

# %%
train()

# %% [markdown]
# ## What it has learned
#
# Evaluation is the same loss over text that training never saw; it stands above, with the share of tokens that were the
# model's first guess. The samples are what the model writes: a token is drawn from its probabilities and appended,
# again and again, which notebook 04 is about. And all of it is in the run's folder:

# %%
gptjax.read_runs(WORKDIR).table

# %% [markdown]
# With the formulas from above we can watch it attend. Each row is a token, and its dark cells are where it looks.
# Nobody tells a head what to do; in models trained for long, some look at the token before, some at the first token (a
# place to rest, when there is nothing to find), and some at what followed an earlier copy of the same token.

# %%
model, params, tokenizer = gptjax.load(WORKDIR)
ids = tokenizer.encode("def add(self, name): self.name = name")
labels = [tokenizer.decode([token]) for token in ids]
_, maps = gpt(params, ids)
shown = [(layer, head) for layer in (0, len(maps) - 1) for head in (0, 1)]
figure, panels = plt.subplots(1, len(shown), figsize=(4 * len(shown), 4), layout="constrained")
for axes, (layer, head) in zip(panels, shown, strict=True):
    axes.imshow(maps[layer][head], cmap="Blues")
    axes.set_xticks(range(len(ids)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(ids)), labels, fontsize=7)
    axes.set_title(f"layer {layer + 1}, head {head + 1}")
plt.show()

# %% [markdown]
# Next, `02_sweep_and_read`: which learning rate is best, and by more than chance?
