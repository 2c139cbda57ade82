"""GGUF files of the llama architecture, read: weights of any type the `gguf` package dequantises, and the tokenizer."""

import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import tokenizers
from jax.sharding import Mesh
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gptjax.array_types import Params
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop.rules import Rule, check_tensors, load_params, their_shapes
from gptjax.models import Model, make_model
from gptjax.models.positions import Rope

# llama.cpp turns neighbouring channels into each other by rotary positions, so query and key are stored in that order.
RULES = [
    Rule("token_embedding/embedding", "V D", "token_embd.weight", "V D"),
    Rule("blocks/attention_norm/scale", "D", "blk.{}.attn_norm.weight", "D"),
    Rule("blocks/attention/query/kernel", "D H rk", "blk.{}.attn_q.weight", "Hkr D"),
    Rule("blocks/attention/key/kernel", "D G rk", "blk.{}.attn_k.weight", "Gkr D"),
    Rule("blocks/attention/value/kernel", "D G K", "blk.{}.attn_v.weight", "GK D"),
    Rule("blocks/attention/out/kernel", "H K D", "blk.{}.attn_output.weight", "D HK"),
    Rule("blocks/mlp_norm/scale", "D", "blk.{}.ffn_norm.weight", "D"),
    Rule("blocks/mlp/gate/kernel", "D F", "blk.{}.ffn_gate.weight", "F D"),
    Rule("blocks/mlp/up/kernel", "D F", "blk.{}.ffn_up.weight", "F D"),
    Rule("blocks/mlp/down/kernel", "F D", "blk.{}.ffn_down.weight", "D F"),
    Rule("final_norm/scale", "D", "output_norm.weight", "D"),
    Rule("head/scores/kernel", "D V", "output.weight", "V D"),
]
ROPE_FREQS = "rope_freqs.weight"
# How text is cut into words, by the names of tokenizer.ggml.pre; the patterns are those of the models' own tokenizers.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, Callable[[], list[pre_tokenizers.PreTokenizer]]] = {
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_LLAMA3.replace("{1,3}", "")),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


def read(path: str | pathlib.Path, mesh: Mesh | None = None) -> tuple[Model, Params, Tokenizer]:
    """Reads a model and its tokenizer from a GGUF file, a tensor at a time.

    Args:
      path: the file.
      mesh: where the parameters go, as `distributed.sharding` says; None for the default device.

    Returns:
      (model, params, tokenizer), the parameters dequantised to float32.

    Raises:
      ValueError: not a whole GGUF file; an architecture, type of tensor or tokenizer that is not known; missing, unknown or
        misshapen tensors.
    """
    try:
        reader = gguf.GGUFReader(str(path))
        fields = _Fields(str(path), reader)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not a whole GGUF file of known types: {error}") from error
    freqs = tensors.pop(ROPE_FREQS, None)
    model = _model(fields, untied="output.weight" in tensors, freqs=None if freqs is None else freqs.data)
    found = {name: [int(size) for size in reversed(tensor.shape)] for name, tensor in tensors.items()}
    check_tensors(found, their_shapes(model, RULES), str(path))

    def get(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: tensor {name} is of type {tensor.tensor_type.name}, which is not read"
            ) from error

    tokenizer = _tokenizer(fields)
    return model, load_params(model, RULES, get, mesh), tokenizer


class _Fields:
    """The metadata of a file."""

    def __init__(self, path: str, reader: gguf.GGUFReader) -> None:
        self.path = path
        self._fields = reader.fields

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields[name].contents() if name in self._fields else default

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise ValueError(f"{self.path} lacks {name}")
        return self._fields[name].contents()


def _model(fields: _Fields, untied: bool, freqs: np.ndarray | None) -> Model:
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"{fields.path}: general.architecture {architecture!r} is not known, only 'llama'")
    embed_dim, num_heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    head_dim = fields.get("llama.attention.key_length", embed_dim // num_heads)
    only = {
        "llama.rope.dimension_count": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.expert_count": 0,
    }
    for name, value in only.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{fields.path}: {name} {fields[name]} is not supported, only {value}")
    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    return make_model(
        "gpt",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        num_layers=fields["llama.block_count"],
        num_heads=num_heads,
        num_kv_heads=fields.get("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        embed_dim=embed_dim,
        mlp_dim=fields["llama.feed_forward_length"],
        max_seq_len=fields["llama.context_length"],
        norm="rmsnorm",
        # Decimal again: the file has the nearest float32.
        norm_epsilon=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        position="rotary",
        activation="swiglu",
        use_bias=False,
        tie_embeddings=not untied,
        rope_theta=theta,
        **_rope_scaling(fields, theta, head_dim, freqs),
    )


def _rope_scaling(fields: _Fields, theta: float, head_dim: int, freqs: np.ndarray | None) -> dict[str, Any]:
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_scaling": "linear", "rope_factor": float(fields["llama.rope.scaling.factor"])}
    if kind != "none":
        raise ValueError(f"{fields.path}: llama.rope.scaling.type {kind!r} is not one of none, linear")
    if freqs is None:
        return {}
    # Llama 3.1 and later: the file holds what each wavelength is multiplied by, not the numbers it was made from.
    factor = float(freqs.max())
    rope = Rope(theta, "llama3", factor, original_len=8192, low=1.0, high=4.0)
    made = Rope(theta).inverse_wavelengths(head_dim) / rope.inverse_wavelengths(head_dim)
    if freqs.shape != made.shape or not np.allclose(freqs, made, rtol=1e-3):
        raise ValueError(f"{fields.path}: {ROPE_FREQS} are not Llama 3's for factor {factor:g}, the only ones known")
    return {"rope_scaling": rope.scaling} | {f"rope_{name}": getattr(rope, name) for name in rope._fields[2:]}


def _tokenizer(fields: _Fields) -> Tokenizer:
    kind = fields["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise ValueError(f"{fields.path}: tokenizer.ggml.model {kind!r} is not known, only 'gpt2', byte-level BPE")
    pre = fields["tokenizer.ggml.pre"]
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"{fields.path}: tokenizer.ggml.pre {pre!r} is not one of {', '.join(PRE_TOKENIZERS)}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    by_type = {kind: [token for token, t in zip(tokens, types, strict=True) if t == kind] for kind in set(types)}
    tokenizer.add_special_tokens(by_type.get(_CONTROL, []))
    tokenizer.add_tokens(by_type.get(_USER_DEFINED, []))
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in names.items()}
    roles = {role: tokens[index] for role, index in ids.items() if index is not None}
    if fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos" in roles:
        bos = roles["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return Tokenizer(tokenizer, roles, fields.get("tokenizer.chat_template"))


def _split(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
