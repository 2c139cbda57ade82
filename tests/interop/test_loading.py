"""`gptjax.load` finds what its source is, and says what it is not; `experiments.convert` writes it elsewhere."""

import json
import shutil

import jax
import numpy as np
import pytest

import gptjax
from experiments import cli, convert
from gptjax.data.tokenizers import build_tokenizer
from gptjax.generation.engine import generate
from gptjax.interop import huggingface
from gptjax.models import make_model
from tests.interop.random_params import random_params

SIZES = dict(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, embed_dim=16, mlp_dim=32, max_seq_len=24)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("byte", documents=lambda: iter(["a"]), vocab_size=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("source") / "model"
    model = make_model("gpt", vocab_size=tokenizer.vocab_size, **SIZES)
    huggingface.write(path, model, random_params(model), tokenizer)
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's cache in a folder of this test, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_folder_with_its_tokenizer(folder, tokenizer):
    model, params, loaded = gptjax.load(folder)
    assert loaded.encode("héllo").tolist() == tokenizer.encode("héllo").tolist()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    logits = model.apply({"params": params}, loaded.encode("hello")[None])
    assert logits.shape == (1, 5, tokenizer.vocab_size) and np.isfinite(logits).all()


def test_a_hub_name_from_the_cache_without_a_network(hub, folder):
    snapshot = hub / "models--someone--small/snapshots/abc"
    shutil.copytree(folder, snapshot)
    (hub / "models--someone--small/refs").mkdir()
    (hub / "models--someone--small/refs/main").write_text("abc")
    loaded, expected = gptjax.load("someone/small"), gptjax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/absent", "no such model: 'someone/absent' is no file or folder here, nor can the hub give it"),
        ("no/such/folder", "no such model: 'no/such/folder' is neither a file nor a folder, nor a name"),
    ],
)
def test_what_is_nowhere_is_one_line(hub, source, message):
    with pytest.raises(ValueError, match=message) as caught:
        gptjax.load(source)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"neither a workdir's model\.json nor a Hugging Face folder's config\.json"):
        gptjax.load(tmp_path)


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin' is not a GGUF file"):
        gptjax.load(tmp_path / "pytorch_model.bin")


def test_a_step_is_for_workdirs(folder):
    with pytest.raises(ValueError, match="step 3 is for a workdir"):
        gptjax.load(folder, step=3)


def test_no_tokenizer(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        gptjax.load(tmp_path)


def test_a_tokenizer_with_ids_beyond_the_vocabulary(tmp_path, tokenizer):
    model = make_model("gpt", vocab_size=200, **SIZES)
    huggingface.write(tmp_path, model, random_params(model), tokenizer)
    with pytest.raises(ValueError, match="ids up to 256, beyond the model's vocabulary of 200"):
        gptjax.load(tmp_path)


def test_ids_beyond_the_vocabulary_and_more_positions_than_there_are(folder):
    model, params, tokenizer = gptjax.load(folder)
    with pytest.raises(ValueError, match="token id 257; the vocabulary's are 0 to 256"):
        generate(model, params, [np.array([3, 257])], max_new_tokens=1, eos_ids=[tokenizer.eos_id])
    with pytest.raises(ValueError, match=r"25 tokens; the model's context holds 1 to 24"):
        generate(model, params, [np.zeros(25, np.int32)], max_new_tokens=1, eos_ids=[tokenizer.eos_id])
    with pytest.raises(ValueError, match=r"25 tokens are more than model\.max_seq_len 24"):
        model.apply({"params": params}, np.zeros((1, 25), np.int32))


def test_convert_writes_checks_and_reports(folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    code = convert.main(["--model", str(folder), "--to", str(tmp_path / "copy"), "--check", "--json", str(report)])
    assert code == 0 and "differ by at most 0.0e+00" in capsys.readouterr().out
    assert json.loads(report.read_text())["metrics"]["convert/largest_difference"] == 0
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "copy/tokenizer.json").exists()


def test_convert_overwrites_nothing(folder, tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(cli.UserError, match="it exists and is not an empty folder"):
        convert.main(["--model", str(folder), "--to", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_convert_names_a_source_that_cannot_be_read(tmp_path):
    with pytest.raises(cli.UserError, match="neither a workdir"):
        convert.main(["--model", str(tmp_path), "--to", str(tmp_path / "copy")])


def test_convert_fails_where_outputs_differ(folder, tmp_path, monkeypatch):
    write = huggingface.write

    def damaged(folder, model, params, tokenizer):
        write(folder, model, jax.tree.map(lambda x: x * 1.01, params), tokenizer)

    monkeypatch.setattr(huggingface, "write", damaged)
    assert convert.main(["--model", str(folder), "--to", str(tmp_path / "copy"), "--check"]) == 1
