"""Writes what all notebooks share, and each .ipynb from its .py: python -m colab.pair

A notebook is written in its .py, with cells that begin with `# %%`. Its first two cells, and the badges of the README, are
made here, from REPOSITORY_URL: after a change of either, run this.
"""

import pathlib
import re

import jupytext
import nbformat

REPOSITORY_URL = "https://github.com/gptjax/gptjax"
FOLDER = pathlib.Path(__file__).parent
# What each is called, what it installs, and the accelerator that Colab offers it.
NOTEBOOKS = {
    "01_train_on_tpu": ("Train a GPT on a TPU", "gptjax", "TPU"),
    "02_sweep_and_read": ("Sweep, and read what came out", "gptjax", "TPU"),
    "03_finetune_and_chat": ("Fine-tune a model, and chat with it", "gptjax[serve] openai", "TPU"),
    "04_load_gpt2_and_generate": ("Load GPT-2, and generate", "gptjax", "TPU"),
    "05_plan_for_a_pod": ("Plan for a pod", "gptjax[plan]", None),
}
_FIRST_CELLS = """\
# %% [markdown]
# # TITLE
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](BADGE)
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
    packages = [PACKAGES]
    packages += ["jax[tpu]" if is_tpu else "jax[cuda12]" if is_gpu else "jax"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
    os.kill(os.getpid(), signal.SIGKILL)

SMALL = os.environ.get("GPTJAX_SMALL") == "1"  # seconds instead of minutes, without a network: for tests
ENVIRONMENT = dict(os.environ)


def run(command):
    \"\"\"Runs `python -m command` as a process of its own, shows what it says, and raises if it fails.\"\"\"
    words = [sys.executable, "-m", *shlex.split(command)]
    process = subprocess.Popen(words, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for line in process.stdout:
            print(line, end="")
    except KeyboardInterrupt:
        process.terminate()
    if process.wait():
        raise RuntimeError(f"python -m {command} ended with code {process.returncode}")


"""


def badge_url(name: str) -> str:
    """Where a notebook opens in Colab."""
    path = REPOSITORY_URL.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{path}/blob/main/colab/{name}.ipynb"


def script(name: str) -> str:
    """The text of a notebook's .py, its first two cells made anew."""
    title, packages, _ = NOTEBOOKS[name]
    ours, *others = packages.split()
    listed = ", ".join(f'"{package}"' for package in [f"{ours} @ git+{REPOSITORY_URL}", *others])
    first = _FIRST_CELLS.replace("TITLE", title).replace("BADGE", badge_url(name)).replace("PACKAGES", listed)
    cells = re.split(r"^(?=# %%)", (FOLDER / f"{name}.py").read_text(), flags=re.MULTILINE)
    return first + "".join(cells[3:])


def notebook(name: str, text: str) -> str:
    """The .ipynb of a .py."""
    found = jupytext.reads(text, "py:percent")
    for number, cell in enumerate(found.cells):
        cell.id, cell.metadata = f"{number:02}", nbformat.NotebookNode()
    found.metadata = nbformat.from_dict(
        {
            "colab": {"provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    if accelerator := NOTEBOOKS[name][2]:
        found.metadata["accelerator"] = accelerator
    found.nbformat, found.nbformat_minor = 4, 5
    return nbformat.writes(found) + "\n"


def readme(text: str) -> str:
    """A README, its badges leading to this repository."""
    for name in NOTEBOOKS:
        text = re.sub(rf"https://colab\.research\.google\.com/github/\S*/{name}\.ipynb", badge_url(name), text)
    return text


def main() -> None:
    """Writes all of it."""
    for name in NOTEBOOKS:
        text = script(name)
        (FOLDER / f"{name}.py").write_text(text)
        (FOLDER / f"{name}.ipynb").write_text(notebook(name, text))
    for path in FOLDER.parent.glob("README*.md"):
        path.write_text(readme(path.read_text()))


if __name__ == "__main__":
    main()
