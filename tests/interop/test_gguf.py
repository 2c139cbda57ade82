"""GGUF files, written by the `gguf` package as llama.cpp's converter does, are read as the models they were."""

import json

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptjax.interop import gguf as interop
from gptjax.interop import huggingface
from gptjax.models import make_model
from gptjax.models.positions import Rope
from tests.interop.random_params import random_params

TEXT = "Hello world, it's 2024!  \n\n  The WORLD isn't 12345 thick; naïve café — ok\r\n\tend"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def bpe():
    """The words, merges and pre-tokenizer of a byte-level BPE as GPT-2's, trained on this file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(__file__) as file:
        tokenizer.train_from_iterator([file.read()], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def llama(bpe):
    model = make_model(
        "gpt",
        vocab_size=bpe.get_vocab_size(),
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        embed_dim=32,
        mlp_dim=64,
        max_seq_len=64,
        position="rotary",
        rope_theta=5e5,
        norm="rmsnorm",
        activation="swiglu",
        use_bias=False,
        tie_embeddings=False,
    )
    return model, random_params(model)


@pytest.fixture
def tensors(tmp_path, llama):
    """The tensors as llama.cpp's converter writes them, from those of a Hugging Face folder."""
    huggingface.write(tmp_path / "hf", *llama)
    converted = {}
    for name, x in safetensors.numpy.load_file(tmp_path / "hf/model.safetensors").items():
        for kind, num_heads in (("q_proj", 4), ("k_proj", 2)):
            if kind in name:
                x = x.reshape(num_heads, 2, len(x) // num_heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        converted[name] = np.ascontiguousarray(x)
    return converted


def write(path, bpe, tensors, kind=None, pre="gpt-2", architecture="llama", **fields):
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5e5)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    vocab = bpe.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocab, key=vocab.get))
    writer.add_token_types([3, 3] + [1] * (len(vocab) - 2))
    writer.add_token_merges([" ".join(m) for m in _merges(bpe)])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for name, value in fields.items():
        writer.add_key_value(name.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    for name, x in tensors.items():
        if kind is None or x.ndim == 1:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(bpe):
    return json.loads(bpe.to_str())["model"]["merges"]


def test_weights_and_config_are_the_models(tmp_path, bpe, llama, tensors):
    model, params, _ = interop.read(write(tmp_path / "m.gguf", bpe, tensors))
    assert model.config == llama[0].config
    jax.tree.map(np.testing.assert_array_equal, params, llama[1])


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_quantised_weights_are_those_of_the_package(tmp_path, bpe, tensors, kind):
    _, params, _ = interop.read(write(tmp_path / "m.gguf", bpe, tensors, kind))
    up = tensors["blk.1.ffn_up.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(up, kind), kind)
    assert 0 < np.abs(expected - up).max() < 0.05
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][1], expected.T)


def test_no_output_tensor_is_a_tied_head(tmp_path, bpe, tensors):
    del tensors["output.weight"]
    model, params, _ = interop.read(write(tmp_path / "m.gguf", bpe, tensors))
    assert model.config.tie_embeddings and "head" not in params


def test_rope_factors_are_llama_3s_or_an_error(tmp_path, bpe, tensors):
    rope = Rope(5e5, "llama3", 32.0, 8192, 1.0, 4.0)
    factors = (Rope(5e5).inverse_wavelengths(8) / rope.inverse_wavelengths(8)).astype(np.float32)
    model, _, _ = interop.read(write(tmp_path / "m.gguf", bpe, tensors | {"rope_freqs.weight": factors}))
    assert model.config.rope == rope
    path = write(tmp_path / "n.gguf", bpe, tensors | {"rope_freqs.weight": factors + np.arange(4, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight are not Llama 3's"):
        interop.read(path)


def test_the_tokenizer_is_the_one_written(tmp_path, bpe, tensors):
    _, _, tokenizer = interop.read(write(tmp_path / "m.gguf", bpe, tensors))
    assert tokenizer.encode(TEXT).tolist() == bpe.encode(TEXT).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.roles == {"bos": "<|im_start|>", "eos": "<|endoftext|>"}
    assert tokenizer.chat_template == "{{ messages }}"
    assert 0 not in tokenizer.encode("<|endoftext|>")


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["it", "'s", " 2024", "  \n\n ", " isn", "'", "T", " 12", "\t", "end"]),
        ("smollm", ["it", "'s", " ", "2", "0", "2", "4", "  \n\n ", " isn", "'", "T", " ", "1", "2", "\t", "end"]),
        ("llama-bpe", ["it", "'s", " ", "202", "4", "  \n\n", " ", " isn", "'T", " ", "12", "\tend"]),
        ("qwen2", ["it", "'s", " ", "2", "0", "2", "4", "  \n\n", " ", " isn", "'T", " ", "1", "2", "\tend"]),
    ],
)
def test_words_are_cut_as_each_tokenizer_cuts_them(pre, words):
    cutter = pre_tokenizers.Sequence(interop.PRE_TOKENIZERS[pre]())
    text = "it's 2024  \n\n  isn'T 12\tend"
    assert [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)] == words


def test_a_leading_bos_where_the_file_asks_for_it(tmp_path, bpe, tensors):
    path = write(tmp_path / "m.gguf", bpe, tensors, tokenizer__ggml__add_bos_token=True)
    _, _, tokenizer = interop.read(path)
    assert tokenizer.encode_with_specials("Hello").ids.tolist() == [1, *bpe.encode("Hello").ids]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "mamba"}, r"general\.architecture 'mamba' is not known, only 'llama'"),
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre 'tekken' is not one of gpt-2, smollm"),
        ({"llama__expert_count": 8}, r"llama\.expert_count 8 is not supported"),
        ({"llama__rope__scaling__type": "yarn"}, r"rope\.scaling\.type 'yarn' is not one of none, linear"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, bpe, tensors, arguments, message):
    with pytest.raises(ValueError, match=message):
        interop.read(write(tmp_path / "m.gguf", bpe, tensors, **arguments))


def test_missing_and_misshapen_tensors_are_named(tmp_path, bpe, tensors):
    lacking = {name: x for name, x in tensors.items() if name != "blk.0.ffn_up.weight"}
    with pytest.raises(ValueError, match=r"lacks tensor blk\.0\.ffn_up\.weight"):
        interop.read(write(tmp_path / "m.gguf", bpe, lacking))
    with pytest.raises(ValueError, match=r"output_norm\.weight has shape \[7\], its config needs \[32\]"):
        interop.read(write(tmp_path / "n.gguf", bpe, tensors | {"output_norm.weight": np.zeros(7, np.float32)}))


@pytest.mark.parametrize("keep", [2, 100, 3000, -100])
def test_a_truncated_file_is_named(tmp_path, bpe, tensors, keep):
    path = write(tmp_path / "m.gguf", bpe, tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.gguf is not a whole GGUF file") as caught:
        interop.read(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_type_of_tensor_is_an_error(tmp_path, bpe, tensors):
    path = write(tmp_path / "m.gguf", bpe, tensors)
    content = path.read_bytes()
    name = b"output_norm.weight"
    # After a tensor's name: the number of its axes, 4 bytes; each axis, 8; its type, 4.
    at = content.index(name) + len(name) + 4 + 8
    assert content[at : at + 4] == bytes(4)
    path.write_bytes(content[:at] + (250).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ValueError, match=r"m\.gguf is not a whole GGUF file of known types: .*250"):
        interop.read(path)
