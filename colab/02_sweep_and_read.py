# %% [markdown]
# # Sweep, and read what came out
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/gptjax/gptjax/blob/main/colab/02_sweep_and_read.ipynb)
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
# Which learning rate is best? One run each does not tell: other seeds, other losses. So we train several seeds of each
# rate, and then ask what the numbers allow us to say.

# %%
import html
import pathlib
import time

os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator serves one process at a time: the commands, not this notebook
import gptjax  # isort: skip - before jax
import matplotlib.pyplot as plt
from IPython.display import IFrame

CONFIG = "--config configs/default.py --config.eval.every_steps=0 --config.eval.num_samples=0 "
if SMALL:
    CONFIG += "--config.model.num_layers=2 --config.model.embed_dim=64 --config.model.max_seq_len=64 --config.eval.max_batches=4 "
    CONFIG += "--config.data.vocab_size=512 --config.train.num_train_steps=80 --config.optimizer.warmup_steps=10"
else:
    CONFIG += "--config.model.dtype=bfloat16 --config.train.num_train_steps=500 --config.optimizer.warmup_steps=50"

# %% [markdown]
# ## A sweep is a file that lists runs
#
# `sweep` varies one field and `product` combines them; `zipit`, `chainit` and `sample` do what their names say. A field
# that does not exist, or a value of another type, is an error before anything starts. `--dry_run` prints the command of
# each run.

# %%
sweep_file = """
def get_hyper(h):
    return h.product([h.sweep("config.optimizer.learning_rate", RATES), h.sweep("config.seed", range(SEEDS))])
"""
pathlib.Path("all.py").write_text(sweep_file.replace("RATES", "[1e-4, 1e-3, 1e-2]").replace("SEEDS", "3"))
pathlib.Path("two.py").write_text(sweep_file.replace("RATES", "[1e-3, 1e-2]").replace("SEEDS", "1"))
run(f"experiments.sweep {CONFIG} --sweep two.py --sweepdir runs/processes --dry_run")

# %% [markdown]
# ## Two ways to run it
#
# `--launcher local` starts a process for each run, which may differ in anything. Kill it and type it again: finished
# runs stay as they are, the others go on.

# %%
started = time.time()
run(f"experiments.sweep {CONFIG} --sweep two.py --sweepdir runs/processes" + SMALL * " --parallel 2")
print(f"2 runs, a process each: {time.time() - started:.0f} s")

# %% [markdown]
# `--launcher vmap` makes one program of all runs, as long as they differ only in numbers: learning rate, weight decay,
# betas, warm-up, seed, initial scale, dropout. The training step is a function of its state, and those numbers are a
# part of it, so `jax.vmap` turns it into a step of many runs. It is compiled once, and each product of matrices is a
# larger one, which an accelerator that a small model leaves idle does in nearly the same time. Each run still writes a
# folder of its own.

# %%
started = time.time()
run(f"experiments.sweep {CONFIG} --sweep all.py --sweepdir runs/together --launcher vmap")
print(f"9 runs, one program: {time.time() - started:.0f} s")

# %% [markdown]
# The same run, alone and in company, computes the same but for rounding, which grows with the steps, and the faster the
# higher the rate:

# %%
metrics, table = gptjax.read_runs("runs/processes", "runs/together")
losses = table.assign(
    launcher=table["run"].map(lambda run: pathlib.Path(run).parent.name),
    loss=table["run"].map(metrics.groupby("run", observed=True)["eval/loss"].last()).astype(float),
)
losses.pivot(index=["optimizer.learning_rate", "seed"], columns="launcher", values="loss").dropna()

# %% [markdown]
# ## What may we conclude?
#
# Runs that differ only in their seed are a group. Of its $n$ losses, the report gives the mean with a 95 % interval, by
# Student's $t$ with $n - 1$ degrees of freedom and the deviation $s$ between seeds:
#
# $$\bar{\mathcal{L}} \pm t_{n-1} \, s / \sqrt{n}$$
#
# Groups are compared with a baseline *seed by seed*. The same seed means the same initial weights and order of data, so
# that much of the chance cancels in the difference. The verdict is *better*, *worse* or *cannot tell*, and then how
# many seeds would probably tell.

# %%
run("experiments.report runs/together --baseline learning_rate=0.001 --html report.html")
page = html.escape(pathlib.Path("report.html").read_text())
IFrame("about:blank", "100%", 600, extras=[f'srcdoc="{page}"'])

# %% [markdown]
# ## Your own picture
#
# `gptjax.read_runs` gives two data frames, also of runs that are still going: `metrics`, a row for each logged step,
# and `table`, a row for each run with the config fields in which they differ. The rest is pandas.

# %%
metrics, table = gptjax.read_runs("runs/together")
joined = metrics.astype({"run": str}).merge(table, on="run")
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for rate, group in joined.groupby("optimizer.learning_rate"):
    over_seeds = group.groupby("step")["train/loss"].agg(["mean", "min", "max"])
    left.plot(over_seeds["mean"], label=f"{rate:g}")
    left.fill_between(over_seeds.index, over_seeds["min"], over_seeds["max"], alpha=0.2)
left.set(xlabel="step", ylabel="training loss, nats a token", title="mean and range over seeds")
left.legend(title="learning rate")
final = joined.dropna(subset="eval/loss").groupby("run").last()
right.semilogx(final["optimizer.learning_rate"], final["eval/loss"], "o")
right.set(xlabel="learning rate", ylabel="validation loss, nats a token", title="a point for each run")
plt.show()

# %% [markdown]
# ## From here
#
# - Where the file holds ranges (`configs/sweeps/search.py`), Optuna searches them: `--num_trials 50`.
# - `report --watch` follows a sweep in a terminal, and `tensorboard --logdir runs` in a browser.
# - A sweep over sizes and lengths, and `report --scaling` fits Chinchilla's law $L = E + A / N^\alpha + B / D^\beta$ for $N$
#   parameters and $D$ tokens, and names the best size for a budget of FLOPs.
# - With `config.model.mup=True` the best rate of a narrow model is that of a wide one, so sweep the narrow one.
# - `--launcher ray` makes each run a job on a Ray cluster; `docs/sweeps.md` has the same command as a SLURM array.
