"""The notebooks: each .ipynb is its .py, what they share has one source, and the first runs whole, headless."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types

import jupytext
import nbclient
import nbformat
import pytest

from colab import pair
from tests import runs


def execute(name: str, folder: pathlib.Path) -> str:
    """Runs a notebook with its small settings in `folder`; returns what its cells printed."""
    notebook = nbformat.read(pair.FOLDER / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=runs.environment(GPTJAX_SMALL="1"))
    nbformat.write(notebook, folder / f"{name}.ipynb")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("name", pair.NOTEBOOKS)
def test_a_notebook_is_its_script(name):
    file = pair.FOLDER / f"{name}.ipynb"
    notebook, script = nbformat.read(file, as_version=4), jupytext.read(pair.FOLDER / f"{name}.py")
    nbformat.validate(notebook)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    text = pair.script(name)
    assert (pair.FOLDER / f"{name}.py").read_text() == text and file.read_text() == pair.notebook(name, text), (
        "python -m colab.pair"
    )


def test_badges_and_installations_name_one_repository(monkeypatch):
    readme = (runs.ROOT / "README.md").read_text()
    assert readme == pair.readme(readme) and all(readme.count(pair.badge_url(name)) == 1 for name in pair.NOTEBOOKS)
    monkeypatch.setattr(pair, "REPOSITORY_URL", "https://github.com/else/where")
    for text in [pair.readme(readme), *map(pair.script, pair.NOTEBOOKS)]:
        places = re.findall(r"(?:git\+https://github\.com|research\.google\.com/github)/([\w-]+/[\w-]+)", text)
        assert places and set(places) == {"else/where"}


@pytest.mark.parametrize(("accelerator", "backend"), [("libtpu", "jax[tpu]"), ("gpu", "jax[cuda12]"), ("", "jax")])
def test_colab_installs_jax_with_its_plugin_once_and_restarts(monkeypatch, accelerator, backend):
    """The set-up cell where Colab is, with what it would start written down."""
    cell = jupytext.read(pair.FOLDER / "03_finetune_and_chat.py").cells[1].source
    done, installed = [], {accelerator}
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(os.path, "exists", lambda path: accelerator == "gpu")
    monkeypatch.setattr(subprocess, "run", lambda words, check: done.append(words[5:]))
    monkeypatch.setattr(os, "kill", lambda process, number: done.append(process))
    exec(cell, {})
    url = f"gptjax[serve] @ git+{pair.REPOSITORY_URL}"
    assert done == [[url, "openai", backend], os.getpid()]
    installed.add("gptjax")
    exec(cell, {})
    assert len(done) == 2


def test_the_first_notebook_trains_is_killed_and_goes_on(tmp_path):
    text = execute("01_train_on_tpu", tmp_path)
    assert re.search(r"cpu: 1 x \w+", text) and re.search(r"resuming from step (?!0\b)\d+", text)
    assert "step 160: validation loss" in text and "--- sample 2 ---" in text
