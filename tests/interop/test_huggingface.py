"""Hugging Face folders: every form that files take, memory, meshes, and each mistake in one line."""

import dataclasses
import json
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gptjax.distributed.mesh import make_mesh
from gptjax.distributed.sharding import tree_shardings
from gptjax.interop import huggingface, rules
from gptjax.models import make_model
from tests.interop.random_params import random_params

SIZES = dict(
    vocab_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, embed_dim=16, mlp_dim=20, max_seq_len=12
)
LLAMA = SIZES | dict(position="rotary", norm="rmsnorm", activation="swiglu", use_bias=False, tie_embeddings=False)
GPT2 = SIZES | dict(num_kv_heads=4)


@pytest.fixture(scope="module")
def llama():
    model = make_model("gpt", **LLAMA)
    return model, random_params(model)


@pytest.fixture(scope="module")
def gpt2():
    model = make_model("gpt", **GPT2)
    return model, random_params(model, 1)


@pytest.fixture
def folder(tmp_path, llama):
    huggingface.write(tmp_path, *llama)
    return tmp_path


def change(folder, tensors=None, config=None):
    """Rewrites a folder with some tensors replaced (None: left out) and fields of config.json."""
    file = folder / "model.safetensors"
    kept = safetensors.numpy.load_file(file) | (tensors or {})
    safetensors.numpy.save_file({name: value for name, value in kept.items() if value is not None}, file)
    fields = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(fields))


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_files_split_by_size_are_read_as_one(tmp_path, llama):
    model, params = llama
    huggingface.write(tmp_path, model, params, max_file_bytes=4000)
    files = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    assert all(file.stat().st_size < 4000 + 4000 for file in files)
    index = json.loads((tmp_path / huggingface.INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    again, params_again = huggingface.read(tmp_path)
    assert again.config == model.config
    assert_same(params_again, params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_give_float32_of_the_same_values(folder, llama, dtype):
    _, params = llama
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(folder, {name: value.astype(dtype) for name, value in tensors.items()})
    _, loaded = huggingface.read(folder)
    assert_same(loaded, jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_gpt2_without_prefix_with_buffers_and_a_copy_of_the_head(tmp_path, gpt2):
    """As GPT-2's own files are, and those of early versions of Transformers."""
    model, params = gpt2
    huggingface.write(tmp_path, model, params)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare |= {"h.0.attn.bias": np.tri(12, dtype=np.float32), "h.0.attn.masked_bias": np.full((), -1e4, np.float32)}
    change(tmp_path, dict.fromkeys(tensors) | bare | {"lm_head.weight": bare["wte.weight"]})
    again, loaded = huggingface.read(tmp_path)
    assert again.config == model.config
    assert_same(loaded, params)


def test_a_tied_head_that_differs_is_a_head_of_its_own(tmp_path, gpt2):
    huggingface.write(tmp_path, *gpt2)
    head = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
    change(tmp_path, {"lm_head.weight": head})
    model, params = huggingface.read(tmp_path)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["scores"]["kernel"], head.T)


def test_onto_a_mesh_each_parameter_goes_where_it_belongs(folder, llama):
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "context": 1})
    _, loaded = huggingface.read(folder, mesh)
    shardings = tree_shardings(loaded, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, shardings))
    query = loaded["blocks"]["attention"]["query"]["kernel"]
    assert len({shard.index for shard in query.addressable_shards}) == 4
    assert_same(loaded, llama[1])


def test_one_tensor_at_a_time_is_in_memory(llama):
    model, _ = llama
    alive, most = 0, 0

    class Tensor(np.ndarray):
        """An array that can be counted."""

    def gone():
        nonlocal alive
        alive -= 1

    def read(name):
        nonlocal alive, most
        tensor = np.zeros(shapes[name], np.float32).view(Tensor)
        weakref.finalize(tensor, gone)
        alive += 1
        most = max(most, alive)
        return tensor

    table = huggingface.FAMILIES["llama"].rules(model.config)
    shapes = rules.their_shapes(model, table)
    rules.load_params(model, table, read)
    assert len(shapes) > 20 and most <= 2


def test_what_transformers_lacks_is_not_written(tmp_path, llama, gpt2):
    cases = {
        "activation": (gpt2, {"activation": "relu2"}),
        "num_kv_heads": (gpt2, {"num_kv_heads": 2}),
        "position": (gpt2, {"position": "alibi"}),
        "norm_position": (llama, {"norm_position": "post"}),
        "logit_softcap": (llama, {"logit_softcap": 30.0}),
        "window": (llama, {"window": 4, "window_pattern": "WG"}),
        "head": (llama, {"head": "sequence_classification"}),
    }
    for field, ((model, params), fields) in cases.items():
        changed = type(model)(dataclasses.replace(model.config, **fields))
        with pytest.raises(ValueError, match=f"Transformers.*{field}"):
            huggingface.write(tmp_path / "folder", changed, params)
    assert not (tmp_path / "folder").exists()


def test_what_does_not_change_the_model_is_no_obstacle(tmp_path, llama):
    model, params = llama
    config = dataclasses.replace(model.config, dtype="bfloat16", scan_layers=True, attention="plain", remat="full")
    huggingface.write(tmp_path, type(model)(config), params)
    assert huggingface.read(tmp_path)[0].config == model.config


MISTAKES = {
    "lacks tensors model.layers.0.mlp.up_proj.weight, model.norm.weight": dict(
        tensors={"model.norm.weight": None, "model.layers.0.mlp.up_proj.weight": None}
    ),
    "has unknown tensor model.layers.0.extra.weight": dict(
        tensors={"model.layers.0.extra.weight": np.zeros(3, np.float32)}
    ),
    r"tensor model.norm.weight has shape \[7\], its config needs \[16\]": dict(
        tensors={"model.norm.weight": np.zeros(7, np.float32)}
    ),
    "model_type 'mamba' is not one of gpt2, llama, mistral, qwen2, qwen3, bert, t5": dict(
        config={"model_type": "mamba"}
    ),
    "'LlamaForTokenClassification' is not one of LlamaForCausalLM": dict(
        config={"architectures": ["LlamaForTokenClassification"]}
    ),
    "hidden_act 'relu' is not supported, only 'silu'": dict(config={"hidden_act": "relu"}),
    "rope_type 'longrope' is not one of default, linear, llama3, yarn": dict(
        config={"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}
    ),
    "it lacks hidden_size": dict(config={}, remove="hidden_size"),
    "num_heads 4 is not divisible by model.num_kv_heads 3": dict(config={"num_key_value_heads": 3}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named_in_one_line(folder, message):
    arguments = dict(MISTAKES[message])
    removed = arguments.pop("remove", None)
    change(folder, **arguments)
    if removed:
        fields = json.loads((folder / "config.json").read_text())
        del fields[removed]
        (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as caught:
        huggingface.read(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_many_missing_tensors_are_counted_not_listed(folder):
    change(
        folder, {name: None for name in safetensors.numpy.load_file(folder / "model.safetensors") if "layers" in name}
    )
    with pytest.raises(ValueError, match=r"lacks tensors .* and 22 more$"):
        huggingface.read(folder)


@pytest.mark.parametrize("cut", [4, 1000, -1])
def test_a_truncated_file_is_named(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file") as caught:
        huggingface.read(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_part_of_several_files_is_named(tmp_path, llama):
    huggingface.write(tmp_path, *llama, max_file_bytes=4000)
    file = sorted(tmp_path.glob("model-*"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=file.name):
        huggingface.read(tmp_path)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no model\.safetensors.*pytorch_model\.bin is pickled"):
        huggingface.read(folder)


def test_config_json_must_be_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        huggingface.read(folder)
