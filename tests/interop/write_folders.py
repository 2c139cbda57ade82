"""Writes every golden model as a Hugging Face folder: python -m tests.interop.write_folders DIR

What `tests/goldens/make.py --check DIR` then reads with Transformers.
"""

import pathlib
import sys
import tempfile

import numpy as np

from gptjax.interop import huggingface
from tests.interop.test_parity import CASES, GOLDENS, write_folder

for name in CASES:
    with tempfile.TemporaryDirectory() as folder:
        write_folder(pathlib.Path(folder), name, dict(np.load(GOLDENS / f"{name}.npz")))
        huggingface.write(pathlib.Path(sys.argv[1]) / name, *huggingface.read(folder))
