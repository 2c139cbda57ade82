"""How the pages are made: make docs."""

import pathlib
import re
from typing import Any

import latex2mathml.converter
from docutils import nodes

ROOT = pathlib.Path(__file__).parent.parent
project, copyright = "gptjax", "the gptjax authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["notebooks/*.py"]  # of which the notebooks are made
html_theme, html_title, html_show_sourcelink, html_copy_source = "furo", "gptjax", False, False
html_static_path, html_css_files = ["static"], ["wide.css"]  # for tables, and lines of code
highlight_language, pygments_style = "none", "friendly"
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"  # which browsers show without a script from elsewhere

autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_mock_imports = ["gradio", "lm_eval"]  # of extras
add_module_names = False
default_role = "code"
napoleon_custom_sections = [("Attributes", "Args")]  # of a NamedTuple they are its arguments


def write_api(app: Any) -> None:
    """A page for each part of gptjax, with all its modules."""
    pages: dict[str, list[str]] = {}
    for file in sorted((ROOT / "gptjax").rglob("*.py")):
        path = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(path[:-1] if path[-1] == "__init__" else path)
        pages.setdefault(".".join(path[:-1]), []).append(name)
    (app.srcdir / "api").mkdir(exist_ok=True)
    for page, names in pages.items():
        sections = [
            f"{'#' * (2 - (name == page))} {name}\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in names
        ]
        (app.srcdir / "api" / f"{page}.md").write_text("\n".join(sections))


def lead_within(app: Any, path: pathlib.Path, parent: str, content: list[str]) -> None:
    """The links of a README, where it is a page."""
    for old, new in {"docs/": "", "README.md": "index.md", "README.zh.md": "readme_zh.md"}.items():
        content[0] = content[0].replace(f"]({old}", f"]({new}")


def to_rst(app: Any, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: blocks with columns stay as they are, and signs mean nothing."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    for i, paragraph in enumerate(paragraphs):
        if re.search(r"\S {3,}\S", paragraph) or paragraph.lstrip().startswith(">>>"):
            paragraphs[i] = "::\n\n" + re.sub("^", "    ", paragraph, flags=re.MULTILINE)
        else:
            parts = re.split(r"(`[^`]+`)", paragraph)
            parts[::2] = [re.sub(r"[*|\\]|_(?!\w)|(?<=\b\w)\.", r"\\\g<0>", part) for part in parts[::2]]
            parts[1::2] = [rf"`{part}`\ " for part in parts[1::2]]
            paragraphs[i] = "".join(parts)
    lines[:] = "\n\n".join(paragraphs).split("\n")


def skip_fields(app: Any, kind: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Those of a NamedTuple are arguments."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def shorten(app: Any, kind: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None) -> Any:
    """Without what Flax adds to a module's arguments."""
    if signature and "_Sentinel" in signature:
        return re.sub(r"(, )?parent: .*name: str \| None = None", "", signature), returned
    return None


def visit_math(translator: Any, node: nodes.Node) -> None:
    """A formula as MathML."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_api)
    app.connect("include-read", lead_within)
    app.connect("autodoc-process-docstring", to_rst, priority=1)  # before Google's sections are read
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip_fields)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
