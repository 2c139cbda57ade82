# %% [markdown]
# # Plan for a pod
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gptjax/gptjax/blob/main/colab/05_plan_for_a_pod.ipynb)
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
    packages = ["gptjax[plan] @ git+https://github.com/gptjax/gptjax"]
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
# Before a pod is booked, one wants to know: does it fit, and how long does a step take? The compiler knows most of it,
# and needs no accelerator to say it. Nothing here trains.

# %%
import json
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
import matplotlib.pyplot as plt
import numpy as np

FOR_TPU = importlib.util.find_spec("libtpu") is not None and not SMALL
if FOR_TPU:
    CONFIG, TOPOLOGY = "configs/llama3_8b.py", "v5e:16x16"
else:  # without the TPU's compiler (pip install 'gptjax[plan]') a small model, CPU devices, and no prediction of time
    CONFIG, TOPOLOGY = "configs/default.py --config.model.num_layers=2 --config.model.embed_dim=64", "cpu:4"
    CONFIG += " --config.model.max_seq_len=64 --config.mesh.data=1 --config.mesh.fsdp=-1"
print(CONFIG, "on", TOPOLOGY)

# %% [markdown]
# ## How large is it?
#
# A training step with AdamW keeps, for each of $N$ parameters, 4 bytes of weight, 4 of gradient and 8 of the two
# moments: $16 N$ bytes, before any activation. And it costs, for each token, 2 operations a parameter forward and 4
# backward, plus attention's products of every query with every key ($L$ layers, $H$ heads of $K$ numbers, $T$ tokens in
# context):
#
# $$\mathrm{FLOPs\ per\ token} = 6 N + 12\, L H K T$$

# %%
run(f"experiments.describe --config {CONFIG} --json describe.json")
figures = json.loads(pathlib.Path("describe.json").read_text())["metrics"]

# %% [markdown]
# ## Ways to divide it
#
# | axis of the mesh | what it divides | what it sends |
# |---|---|---|
# | `data` | rows of the batch; every device has all weights | gradients, once a step |
# | `fsdp` | rows, and weights with their optimizer state; a layer is gathered when its turn comes | weights, each layer |
# | `tensor` | heads and the MLP | activations, each layer, so keep it within a host |
# | `context` | the tokens of one row | keys and values |
#
# The model's code knows none of this: a table of patterns on parameters' names says which axis divides what
# (`gptjax/distributed/sharding.py`), and the compiler puts in what has to be sent. In the picture, the state of a
# device:

# %%
devices = 2 ** np.arange(9)
state = 16 * figures["params/total"] / 1e9
figure, axes = plt.subplots(figsize=(7, 3))
axes.loglog(devices, np.full(9, state), "o-", label="data: a copy each")
axes.loglog(devices, state / devices, "o-", label="fsdp: divided")
if FOR_TPU:
    axes.axhline(16, color="gray", linestyle="--", label="16 GB, a v5e chip")
axes.set(xlabel="devices", ylabel="GB a device", title="weights, gradients, optimizer")
axes.legend()
plt.show()

# %% [markdown]
# ## Ask the compiler
#
# The very training step is compiled for the pod that is not here. Memory and traffic are the compiler's own account.
# The time is a prediction, from the compiler's own estimate of cycles and the links' bandwidth: between everything
# overlapping and nothing.

# %%
run(f"experiments.plan --config {CONFIG} --topology {TOPOLOGY} --json plan.json")

# %%
plan = json.loads(pathlib.Path("plan.json").read_text())["metrics"]
unit, size_of = ("GB", 1e9) if FOR_TPU else ("MB", 1e6)
parts = {name: plan[f"bytes/{name}"] / size_of for name in ("weights", "optimizer", "temporaries")}
figure, axes = plt.subplots(figsize=(7, 1.7), layout="constrained")
left = 0.0
for name, size in parts.items():
    axes.barh(0, size, left=left, label=f"{name}: {size:.3g} {unit}")
    left += size
if "bytes/usable" in plan:
    axes.axvline(plan["bytes/usable"] / size_of, color="gray", linestyle="--")
axes.set(xlabel=f"{unit} a device, {TOPOLOGY}", yticks=[])
figure.legend(loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# ## Let it look for a better way
#
# `--search` tries meshes, rematerialisation (compute activations again instead of keeping them) and accumulation for
# the same batch, and ranks what fits. For 8B parameters on 256 chips that takes a while, so here is a small model on
# few.

# %%
run(f"experiments.plan --config configs/stdlib_gpt.py --topology {'v5e:2x2' if FOR_TPU else 'cpu:2'} --search")

# %% [markdown]
# ## Then start it
#
# On every host of the slice the same command. On GKE, under SLURM and Open MPI the processes find each other by
# themselves; elsewhere `--coordinator` says where the first one is.
#
# ```
# python -m experiments.train --config configs/llama3_8b.py --workdir /shared/llama --config.mesh.platform=tpu
# ```
#
# The folder must be one that all hosts see. What the plan says of `--config.mesh` and the rest goes on the same line.
