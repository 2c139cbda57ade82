"""Who may import whom, held by reading the imports."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
# What each part of gptjax may import of gptjax, besides itself.
ALLOWED = {
    "array_types": set(),
    "platform": set(),
    "distributed": {"array_types"},
    "models": {"array_types", "distributed"},
    "data": set(),
    "analysis": {"training"},
    "training": {"array_types", "distributed", "models"},
    "generation": {"array_types", "distributed", "models"},
    "evaluation": {"array_types", "data", "distributed", "generation", "loading", "models", "pipelines", "training"},
    "finetuning": {"array_types", "distributed", "models", "training"},
    "interop": {"array_types", "data", "distributed", "models"},
    "workdir": {"array_types", "data", "distributed", "finetuning", "models", "training"},
    "loading": {"array_types", "data", "finetuning", "interop", "models", "workdir"},
    "pipelines": {"array_types", "data", "generation", "loading", "models"},
    "serving": {"array_types", "data", "generation", "loading", "models", "pipelines"},
    "__init__": {"analysis", "loading", "pipelines", "platform"},
}
# The only files that may import a library.
OWNERS = {
    "flax": "gptjax/models/",
    "orbax": "gptjax/training/checkpoints.py",
    "tensorboardX": "gptjax/training/metrics.py",
    "wandb": "gptjax/training/metrics.py",
    "ml_collections": "experiments/",
    "absl": "experiments/",
    "safetensors": "gptjax/interop/",
    "gguf": "gptjax/interop/",
    "huggingface_hub": "gptjax/loading.py",
    "tensorflow_datasets": "gptjax/data/",
    "grain": "gptjax/data/",
    "llguidance": "gptjax/generation/constraints.py",
    "fastapi": "gptjax/serving/",
    "gradio": "gptjax/serving/page.py",
    "torch": "",
    "transformers": "",
    "tensorflow": "",
}
# Commands import heavy libraries early, in the background, and configs are config.
EXCEPTIONS = {
    ("experiments/fit.py", "grain"),
    ("experiments/fit.py", "orbax"),
    ("experiments/fit.py", "tensorboardX"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_who_imports_whom():
    wrong = []
    for path in sorted((ROOT / "gptjax").rglob("*.py")):
        part = path.relative_to(ROOT / "gptjax").parts[0].removesuffix(".py")
        for name in imports(path):
            if name.startswith("gptjax."):
                other = name.split(".")[1]
                if other != part and other not in ALLOWED[part]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            if name.split(".")[0] in ("experiments", "configs", "tests"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_libraries_stay_in_their_place():
    wrong = []
    for folder in ("gptjax", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT).as_posix()
            for name in imports(path):
                library = name.split(".")[0]
                owner = OWNERS.get(library)
                misplaced = owner is not None and (not owner or not relative.startswith(owner))
                if misplaced and (relative, library) not in EXCEPTIONS:
                    wrong.append(f"{relative} imports {library}")
    assert not wrong
