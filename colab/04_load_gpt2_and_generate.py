# %% [markdown]
# # Load GPT-2, and generate
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gptjax/gptjax/blob/main/colab/04_load_gpt2_and_generate.ipynb)
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
# A language model gives probabilities of the next token. Everything else about writing a text is how to choose from
# them.

# %%
import time

import gptjax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

if SMALL:  # a folder as Transformers writes it, made here
    fields = "model.num_layers=2 model.embed_dim=64 model.max_seq_len=64 data.vocab_size=512 train.num_train_steps=120 "
    fields += "optimizer.learning_rate=0.01 eval.every_steps=0 eval.max_batches=1 eval.num_samples=0"
    flags = " ".join(f"--config.{field}" for field in fields.split())
    run(f"experiments.train --config configs/stdlib_gpt.py --workdir runs/base {flags}")
    run("experiments.convert --model runs/base --to gpt2_tiny --check")
MODEL, PROMPT = ("gpt2_tiny", "def get") if SMALL else ("gpt2", "The quick brown fox jumps over the")

# %% [markdown]
# ## One line
#
# A hub name, a folder, a GGUF file or a run of yours. The arguments are those of Transformers.

# %%
generator = gptjax.pipeline("text-generation", model=MODEL)
for result in generator(PROMPT, max_length=50, num_return_sequences=3, seed=0):
    print("-", result["generated_text"])

# %% [markdown]
# ## What was loaded
#
# A module without state, a dict of arrays, and a tokenizer. The weights of all layers are stacked, so `[12, ...]` in
# GPT-2.

# %%
model, params, tokenizer = gptjax.load(MODEL)
for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    print(f"{jax.tree_util.keystr(path, simple=True, separator='/'):<36} {leaf.shape}")
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## From scores to a choice
#
# The last layer gives a score $z_t$ for each token of the vocabulary; a *temperature* $\tau$ divides them before the
# softmax:
#
# $$p(t) = \frac{e^{z_t / \tau}}{\sum_u e^{z_u / \tau}}$$
#
# Below 1 the likely become likelier, and towards 0 the likeliest is certain: *greedy* decoding. Sampling from $\tau =
# 1$ is what the model believes, with its many tokens that are each unlikely and together are not. So the tail is cut:
# *top-k* keeps the $k$ likeliest, *top-p* as many as together reach $p$, *min-p* those at least a share as likely as
# the likeliest.

# %%
ids = tokenizer.encode(PROMPT)
logits = jax.jit(model.apply)({"params": params}, ids[None])[0, -1].astype(jnp.float32)
order = np.argsort(-logits)[:15]
figure, panels = plt.subplots(1, 3, figsize=(12, 3), layout="constrained", sharey=True)
for axes, temperature in zip(panels, (0.5, 1.0, 1.5), strict=True):
    probabilities = jax.nn.softmax(logits / temperature)
    nucleus = np.cumsum(probabilities[order]) - probabilities[order] < 0.9  # what top_p=0.9 keeps
    axes.bar(range(15), probabilities[order], color=np.where(nucleus, "tab:blue", "lightgray"))
    axes.set_xticks(range(15), [repr(tokenizer.decode([token])) for token in order], rotation=90)
    axes.set_title(f"temperature {temperature}; blue: top-p 0.9")
panels[0].set_ylabel("probability")
figure.suptitle(f"after {PROMPT!r}")
plt.show()

# %% [markdown]
# ## Greedy, sampled

# %%
from gptjax.generation.engine import Engine
from gptjax.generation.sampling import Sampling

NEW = 24
engine = Engine(model, params, num_slots=4)
choices = {
    "greedy": Sampling(temperature=0.0),
    "sampled, temperature 1": Sampling(),
    "top-p 0.9": Sampling(top_p=0.9),
    "top-k 40, temperature 0.7": Sampling(temperature=0.7, top_k=40),
}
written = {}
for name, sampling in choices.items():
    (written[name],) = engine.generate([ids], max_new_tokens=NEW, eos_ids=[tokenizer.eos_id], sampling=sampling, seed=0)
    print(f"--- {name}\n{PROMPT}{tokenizer.decode(written[name])}")

# %% [markdown]
# ## Beam search
#
# Greedy decoding takes the best token, which need not lead to the best text. Beam search keeps the $K$ best beginnings,
# and judges a text by its log-probability over its length to a power, as long texts are always less likely:
#
# $$\mathrm{score}(t_1, \dots, t_n) = \frac{1}{n^{\gamma}} \sum_{i=1}^{n} \ln p(t_i \mid t_{<i})$$
#
# It helps where there is one right answer, as in translation. An open-ended story gets dull and repeats itself.

# %%
from gptjax.generation.beam import beam_search


@jax.jit
def log_probability(params, ids, given):
    """Of ids [T], the sum over all after the first `given`."""
    scores = jax.nn.log_softmax(model.apply({"params": params}, ids[None, :-1])[0].astype(jnp.float32))
    found = jnp.take_along_axis(scores, ids[1:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(jnp.arange(len(found)) >= given - 1, found, 0))


(beams,) = beam_search(engine, [ids], num_beams=5, max_new_tokens=NEW, eos_ids=[tokenizer.eos_id])
for name, new in {"greedy": written["greedy"], "beam search": beams[0][0]}.items():
    total = log_probability(params, np.concatenate([ids, new]), len(ids))
    print(f"--- {name}: {total / max(1, len(new)):.3f} a token\n{PROMPT}{tokenizer.decode(new)}")

# %% [markdown]
# ## The key-value cache
#
# Written naively, each new token reads the whole text again. But the keys and values of earlier tokens do not change,
# for they never see later ones. So they are kept, $2 L G d$ numbers a token ($G$ heads that keep them, $d$ numbers
# each), and a new token costs one column instead of a table. The texts
# are the same, unless rounding decides between two tokens that are as likely; the time is not:

# %%
padded = np.zeros(len(ids) + NEW, np.int32)
padded[: len(ids)] = ids
forward = jax.jit(model.apply)
forward({"params": params}, padded[None]).block_until_ready()
started = time.perf_counter()
for i in range(len(ids), len(padded)):  # what is behind place i cannot be seen from before it
    padded[i] = np.argmax(forward({"params": params}, padded[None])[0, i - 1])
naive = time.perf_counter() - started
started = time.perf_counter()
(cached,) = engine.generate([ids], max_new_tokens=NEW, eos_ids=[], sampling=choices["greedy"])
print(f"{NEW} tokens: {1e3 * naive:.1f} ms without a cache, {1e3 * (time.perf_counter() - started):.1f} ms with one")
print("the same tokens:", cached.tolist() == padded[len(ids) :].tolist())

# %% [markdown]
# The engine keeps a cache for many texts at once, and lets one begin where another ended; `python -m experiments.serve`
# puts it behind OpenAI's protocol, and `python -m experiments.generate --model gpt2 --interactive` in your terminal.
# There, `--draft` and `--lookup` write several tokens a step by guessing and checking, with the same result.
