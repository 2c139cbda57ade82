"""The pages: built without a warning, whole without a network; what they say to type is real; both READMEs say the same."""

import html.parser
import importlib
import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator

import pytest

from experiments import build, cli
from experiments.sweep import SweepFile
from tests import runs

DOCS = runs.ROOT / "docs"
README, CHINESE = runs.ROOT / "README.md", runs.ROOT / "README.zh.md"
PAGES = [README, CHINESE, *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Page(html.parser.HTMLParser):
    """What a page refers to, and the places in it that can be referred to."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.references, self.needed, self.places = [], [], {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.places.add(found.get("id"))
        self.references += [found[name] for name in ("href", "src") if found.get(name)]
        if tag == "script" or (tag, found.get("rel")) == ("link", "stylesheet"):
            self.needed += [found.get("src") or found.get("href") or ""]


def test_the_site_builds_without_a_warning_and_every_link_in_it_leads_somewhere(tmp_path):
    arguments = ["-q", "--fail-on-warning", "--keep-going", "--doctree-dir", str(tmp_path / "read"), str(DOCS)]
    site = tmp_path / "site"
    built = runs.run([sys.executable, "-m", "sphinx", *arguments, str(site)])
    assert built.returncode == 0, built.stderr
    pages = {path: Page(path) for path in site.rglob("*.html")}
    names = {path.relative_to(site).as_posix() for path in pages}
    assert {f"notebooks/{path.stem}.html" for path in (runs.ROOT / "colab").glob("*.ipynb")} < names
    assert {f"{path.stem}.html" for path in DOCS.glob("*.md")} | {"api/gptjax.models.html"} < names
    broken = []
    for path, page in pages.items():
        assert not [url for url in page.needed if "//" in url], "a page must not need the network"
        for reference in page.references:
            parts = urllib.parse.urlsplit(reference)
            target = (
                pathlib.Path(os.path.normpath(path.parent / urllib.parse.unquote(parts.path))) if parts.path else path
            )
            places = pages[target].places if target in pages else {""}
            if not parts.scheme and not (target.exists() and urllib.parse.unquote(parts.fragment) in places):
                broken.append(f"{path.relative_to(site)}: {reference}")
    assert not broken
    assert "<math" in (site / "models.html").read_text()


def typed(line: str) -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of each of our commands in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    for i, word in enumerate(words):
        if "python -m " in word:  # quoted, for another machine
            yield from typed(word)
        if word == "-m" and words[i + 1].startswith(("experiments.", "benchmarks.")):
            yield words[i + 1], list(itertools.takewhile(lambda word: word not in "&&;||>", words[i + 2 :]))


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, module, arguments) of what pages say to type."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [
            re.sub(r"[\[\],]", " ", line) if language == "yaml" else line
            for language, block in BLOCK.findall(text)
            for line in re.sub(r"\\\n|,\n", " ", block).splitlines()
            if language in ("", "yaml")
        ]
        inline = [" ".join(code.split()) for code in re.findall("`(python -m [^`]*)`", BLOCK.sub("", text))]
        found += [(page.name, *command) for line in lines + inline if "-m" in line for command in typed(line)]
    return found


ADDED = {"configs/backward.py"}  # by the patches of adding.md
TYPED = [pytest.param(*c, id=f"{c[0]} {i} {c[1]}") for i, c in enumerate(commands()) if not ADDED & set(c[2])]


@pytest.mark.parametrize(("page", "module", "arguments"), TYPED)
def test_a_command_is_one(monkeypatch, capsys, page, module, arguments):
    """The command itself reads its arguments, and gets no further; config and sweep file are read and checked, too."""
    parsed = []
    parse = cli.Parser.parse

    class Parsed(Exception):
        pass

    def parse_only(self, argv):
        parsed.append(parse(self, argv))
        raise Parsed

    monkeypatch.setattr(cli.Parser, "parse", parse_only)
    main = importlib.import_module(module).main
    if not arguments:  # it is only named
        return
    try:
        main([argument for argument in arguments if argument != "..."])
    except SystemExit as done:
        assert done.code == 0 and "usage" in capsys.readouterr().out
        return
    except Parsed:
        (given,) = parsed
    if hasattr(given, "config"):
        build.check(given.config)
    if hasattr(given, "sweep"):
        SweepFile(given.config, given.sweep).runs()


def test_commands_were_found():
    modules = {module for _, module, _ in commands()}
    assert {f"experiments.{name}" for name in ("train", "sweep", "report", "plan", "serve", "convert")} < modules
    assert len(TYPED) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:gptjax|experiments|configs|tests|benchmarks|colab|docs)/[\w/.]+)`", page.read_text())
    assert [name for name in named if not (runs.ROOT / name).exists()] == []


def test_the_patches_apply_and_what_they_add_trains(tmp_path):
    """adding.md, on a copy: its patches, then its commands."""
    for folder in ("gptjax", "experiments", "configs", "tests"):
        shutil.copytree(runs.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (DOCS / "adding.md").read_text()
    for language, patch in BLOCK.findall(text):
        if language == "diff":
            applied = subprocess.run(["git", "apply"], input=patch, text=True, cwd=tmp_path, capture_output=True)
            assert applied.returncode == 0, applied.stderr
    (tmp_path / "notes").mkdir()
    for i, page in enumerate(PAGES[:2]):
        shutil.copy(page, tmp_path / "notes" / f"{i}.txt")
    short = ["--config.train.num_train_steps=2", "--config.eval.max_batches=1", "--config.eval.num_samples=0"]
    own = [(module, arguments) for page, module, arguments in commands() if page == "adding.md"]
    assert [module for module, _ in own] == ["experiments.preview_data", "experiments.train"]
    code = "".join(f"import {module}\nassert {module}.main({arguments + short}) == 0\n" for module, arguments in own)
    variables = runs.environment(PYTHONPATH=str(tmp_path), GPTJAX_CACHE=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "⟦xajtpg #<|endoftext|>⟧" in done.stdout and "step 2: validation loss" in done.stdout
    assert '"layer_scale": 0.1' in (tmp_path / "runs" / "backward" / "model.json").read_text()


def sections(path: pathlib.Path) -> list[dict[str, list[str]]]:
    """Of each section of a README what no translation changes."""
    found = []
    for section in re.split(r"^## .*$", path.read_text(), flags=re.MULTILINE):
        code = "".join(block for _, block in BLOCK.findall(section))
        prose = " ".join(BLOCK.sub("", section).split())
        facts = {
            "code but for comments": re.sub(r"(?<=\S)(?: {2,}| # ).*$", "", code, flags=re.MULTILINE).splitlines(),
            "numbers": sorted(re.findall(r"\d+(?:[.,]\d+)*", prose)),
            "links": sorted(link for link in re.findall(r"\]\(([^)]*)\)", prose) if "README" not in link),
            "names": sorted(re.findall(r"`[^`]*`", prose)),
        }
        found.append(facts)
    return found


def test_the_chinese_readme_says_the_same():
    assert sections(README) == sections(CHINESE)
    assert "](README.zh.md)" in README.read_text() and "](README.md)" in CHINESE.read_text()
