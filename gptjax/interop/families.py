"""The model types of Transformers that ours can express: tables of their tensors, and their config.json as our config."""

import dataclasses
import functools
import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from gptjax.interop.rules import Rule
from gptjax.models import Model, model_arguments
from gptjax.models.config import TransformerConfig

Json = dict[str, Any]

# Theirs to ours: 'gelu_new' is the tanh form, 'gelu' the exact one. Of two with the same meaning the first is written.
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
}
ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
BERT_HEADS = {
    "BertModel": "none",
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "masked_lm",
    "BertForSequenceClassification": "sequence_classification",
    "BertForTokenClassification": "token_classification",
    "BertForQuestionAnswering": "span",
}
# Fields of ours that say how a model is computed or trained, not what it is: config.json has no place for them.
NOT_WRITTEN = ("attention", "attention_dropout", "residual_init", "dtype", "scan_layers", "remat")
# Fields of ours that mean nothing unless others say so.
CONDITIONAL: dict[str, Callable[[TransformerConfig], bool]] = {
    "rope_theta": lambda c: c.position == "rotary",
    "rope_scaling": lambda c: c.position == "rotary",
    "rope_factor": lambda c: c.position == "rotary" and c.rope_scaling != "none",
    "rope_original_len": lambda c: c.position == "rotary" and c.rope_scaling in ("llama3", "yarn"),
    "rope_low": lambda c: c.position == "rotary" and c.rope_scaling in ("llama3", "yarn"),
    "rope_high": lambda c: c.position == "rotary" and c.rope_scaling in ("llama3", "yarn"),
    "relative_buckets": lambda c: c.position == "relative",
    "relative_max_distance": lambda c: c.position == "relative",
    "experts_per_token": lambda c: c.num_experts > 0,
    "balance_loss": lambda c: c.num_experts > 0,
    "router_z_loss": lambda c: c.num_experts > 0,
    "mup_base_dim": lambda c: c.mup,
    "qkv_bias": lambda c: not c.use_bias,
    "num_labels": lambda c: c.head in ("sequence_classification", "token_classification"),
    "pooling": lambda c: c.head == "embedding",
    "tie_embeddings": lambda c: c.head in ("language_model", "masked_lm"),
}


class Family(NamedTuple):
    """How one model type is read and written.

    Attributes:
      kind: our family.
      architectures: their classes that we read; the first is meant where config.json names none.
      prefix: of names in a model with a head; files without a head leave it out.
      rules: makes the table of tensors for a config.
      fields: their names of fields that both sides have, and ours.
      defaults: their fields that config.json may leave out, as Transformers fills them in.
      only: their fields that must have this value, for we have nothing else.
      arguments: our other fields, from config.json with its defaults.
      write: their other fields, from our config.
      copies: tensors that may be in a file as copies of others; the first is a tied head.
      ignored: a pattern of names that are buffers, or parts of a model that its architecture does not use.
    """

    kind: str
    architectures: tuple[str, ...]
    prefix: str
    rules: Callable[[TransformerConfig], list[Rule]]
    fields: dict[str, str]
    defaults: Json
    only: Json
    arguments: Callable[[Json], Json]
    write: Callable[[TransformerConfig], Json]
    copies: dict[str, str]
    ignored: str


def find_family(config: Json) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: an architecture that is not ours.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    architecture = architecture_of(config, family)
    if architecture not in family.architectures:
        raise ValueError(f"architecture {architecture!r} is not one of {', '.join(family.architectures)}")
    return family


def architecture_of(config: Json, family: Family) -> str:
    """The class that config.json names, or the family's first."""
    return (config.get("architectures") or family.architectures)[0]


def is_tied(config: Json, family: Family) -> bool:
    """Whether config.json says that the head is the token embedding."""
    return bool((family.defaults | config)["tie_word_embeddings"])


def our_arguments(config: Json, family: Family, names: Collection[str], tied: bool) -> Json:
    """The arguments of `make_model`.

    Args:
      config: of config.json.
      family: of `config`.
      names: of the tensors beside it.
      tied: whether they have no head of their own.

    Raises:
      ValueError: a field is missing, or says what our models cannot express.
    """
    filled = family.defaults | config
    for name in family.fields:
        if name not in filled:
            raise ValueError(f"it lacks {name}")
    for name, value in family.only.items():
        if name in filled and filled[name] not in (value, None):
            raise ValueError(f"{name} {filled[name]!r} is not supported, only {value!r}")
    arguments = {ours: filled[theirs] for theirs, ours in family.fields.items()}
    arguments |= {"family": family.kind, "tie_embeddings": tied} | family.arguments(filled)
    if "bert.pooler.dense.weight" in names:
        arguments["pooler"] = True
    return arguments


def their_config(model: Model) -> Json:
    """The config.json of `model`.

    Raises:
      ValueError: no model type of Transformers can express the model; names the field.
    """
    c = model.config
    model_type = _model_type(model)
    family = FAMILIES[model_type]
    config = {theirs: getattr(c, ours) for theirs, ours in family.fields.items()}
    config |= {"model_type": model_type, "architectures": list(family.architectures[:1]), "dtype": "float32"}
    config |= {"tie_word_embeddings": c.tie_embeddings} | family.write(c)
    # What is written must say all that the model is: read it again, and compare.
    names = ["bert.pooler.dense.weight"] if c.pooler else []
    arguments = our_arguments(json.loads(json.dumps(config)), family, names, c.tie_embeddings)
    arguments |= {"head": "embedding", "pooling": c.pooling} if c.head == "embedding" else {}
    read = _essence(TransformerConfig(**{name: value for name, value in arguments.items() if name != "family"}))
    for name, value in _essence(c).items():
        if value != read[name]:
            raise ValueError(
                f"Transformers' {model_type} has no model with {name} {value!r}, it always has {read[name]!r}"
            )
    return config


def _model_type(model: Model) -> str:
    kind = model_arguments(model)["family"]
    if kind != "gpt":
        return "bert" if kind == "bert" else "t5"
    return _rotary_type(model.config) if model.config.position == "rotary" else "gpt2"


def _rotary_type(c: TransformerConfig) -> str:
    if c.qk_norm:
        return "qwen3"
    if c.qkv_bias:
        return "qwen2"
    # Transformers refuses a Llama whose width its heads do not divide; without a window Mistral is the same model.
    return "mistral" if any(c.windows) or c.embed_dim % c.num_heads else "llama"


def _essence(config: TransformerConfig) -> Json:
    """What makes `config` the model it is, in one form for equal models."""
    fields = dataclasses.asdict(config) | {"window": config.windows}
    for name in (*NOT_WRITTEN, "window_pattern"):
        del fields[name]
    return {name: value for name, value in fields.items() if name not in CONDITIONAL or CONDITIONAL[name](config)}


def _linear(path: str, axes: str, name: str, *, part: int | None = None, transposed: bool = True) -> list[Rule]:
    """The kernel and bias of a projection with `axes` IN -> OUT, which torch.nn.Linear holds as OUT IN."""
    into, out = axes.split(" -> ")
    sides = [side.replace(" ", "") for side in ((out, into) if transposed else (into, out))]
    return [
        Rule(f"{path}/kernel", f"{into} {out}", f"{name}.weight", " ".join(sides), part),
        Rule(f"{path}/bias", out, f"{name}.bias", out.replace(" ", ""), part),
    ]


def _layer_norm(path: str, name: str) -> list[Rule]:
    return [Rule(f"{path}/scale", "D", f"{name}.weight", "D"), Rule(f"{path}/bias", "D", f"{name}.bias", "D")]


def _gpt2_rules(config: TransformerConfig) -> list[Rule]:
    layer = "transformer.h.{}."
    linear = functools.partial(_linear, transposed=False)
    return [
        Rule("token_embedding/embedding", "V D", "transformer.wte.weight", "V D"),
        Rule("position_embedding/embedding", "P D", "transformer.wpe.weight", "P D"),
        *_layer_norm("blocks/attention_norm", layer + "ln_1"),
        *linear("blocks/attention/query", "D -> H K", layer + "attn.c_attn", part=0),
        *linear("blocks/attention/key", "D -> H K", layer + "attn.c_attn", part=1),
        *linear("blocks/attention/value", "D -> H K", layer + "attn.c_attn", part=2),
        *linear("blocks/attention/out", "H K -> D", layer + "attn.c_proj"),
        *_layer_norm("blocks/mlp_norm", layer + "ln_2"),
        *linear("blocks/mlp/up", "D -> F", layer + "mlp.c_fc"),
        *linear("blocks/mlp/down", "F -> D", layer + "mlp.c_proj"),
        *_layer_norm("final_norm", "transformer.ln_f"),
        Rule("head/scores/kernel", "D V", "lm_head.weight", "V D"),
    ]


def _llama_rules(config: TransformerConfig) -> list[Rule]:
    layer = "model.layers.{}."
    return [
        Rule("token_embedding/embedding", "V D", "model.embed_tokens.weight", "V D"),
        Rule("blocks/attention_norm/scale", "D", layer + "input_layernorm.weight", "D"),
        *_linear("blocks/attention/query", "D -> H K", layer + "self_attn.q_proj"),
        Rule("blocks/attention/query_norm/scale", "K", layer + "self_attn.q_norm.weight", "K"),
        *_linear("blocks/attention/key", "D -> G K", layer + "self_attn.k_proj"),
        Rule("blocks/attention/key_norm/scale", "K", layer + "self_attn.k_norm.weight", "K"),
        *_linear("blocks/attention/value", "D -> G K", layer + "self_attn.v_proj"),
        *_linear("blocks/attention/out", "H K -> D", layer + "self_attn.o_proj"),
        Rule("blocks/mlp_norm/scale", "D", layer + "post_attention_layernorm.weight", "D"),
        *_linear("blocks/mlp/gate", "D -> F", layer + "mlp.gate_proj"),
        *_linear("blocks/mlp/up", "D -> F", layer + "mlp.up_proj"),
        *_linear("blocks/mlp/down", "F -> D", layer + "mlp.down_proj"),
        Rule("final_norm/scale", "D", "model.norm.weight", "D"),
        Rule("head/scores/kernel", "D V", "lm_head.weight", "V D"),
    ]


def _bert_rules(config: TransformerConfig) -> list[Rule]:
    layer = "bert.encoder.layer.{}."
    labels = "qa_outputs" if config.head == "span" else "classifier"
    return [
        Rule("token_embedding/embedding", "V D", "bert.embeddings.word_embeddings.weight", "V D"),
        Rule("position_embedding/embedding", "P D", "bert.embeddings.position_embeddings.weight", "P D"),
        Rule("type_embedding/embedding", "U D", "bert.embeddings.token_type_embeddings.weight", "U D"),
        *_layer_norm("embed_norm", "bert.embeddings.LayerNorm"),
        *_linear("blocks/attention/query", "D -> H K", layer + "attention.self.query"),
        *_linear("blocks/attention/key", "D -> H K", layer + "attention.self.key"),
        *_linear("blocks/attention/value", "D -> H K", layer + "attention.self.value"),
        *_linear("blocks/attention/out", "H K -> D", layer + "attention.output.dense"),
        *_layer_norm("blocks/attention_norm", layer + "attention.output.LayerNorm"),
        *_linear("blocks/mlp/up", "D -> F", layer + "intermediate.dense"),
        *_linear("blocks/mlp/down", "F -> D", layer + "output.dense"),
        *_layer_norm("blocks/mlp_norm", layer + "output.LayerNorm"),
        *_linear("pooler/dense", "D -> E", "bert.pooler.dense"),
        *_linear("head/transform", "D -> E", "cls.predictions.transform.dense"),
        *_layer_norm("head/transform_norm", "cls.predictions.transform.LayerNorm"),
        Rule("head/bias", "V", "cls.predictions.bias", "V"),
        Rule("head/scores/kernel", "D V", "cls.predictions.decoder.weight", "V D"),
        *_linear("head/labels", "D -> N", labels),
    ]


def _t5_rules(config: TransformerConfig) -> list[Rule]:
    gated = config.activation in ("geglu", "swiglu")

    def attention(path: str, name: str) -> list[Rule]:
        return [
            Rule(f"{path}/query/kernel", "D H K", f"{name}.q.weight", "HK D"),
            Rule(f"{path}/key/kernel", "D H K", f"{name}.k.weight", "HK D"),
            Rule(f"{path}/value/kernel", "D H K", f"{name}.v.weight", "HK D"),
            Rule(f"{path}/out/kernel", "H K D", f"{name}.o.weight", "D HK"),
        ]

    def stack(path: str, name: str, norms: tuple[str, ...]) -> list[Rule]:
        mlp = f"{name}.block.{{}}.layer.{len(norms) - 1}.DenseReluDense."
        return [
            *(
                Rule(f"{path}/{norm}/scale", "D", f"{name}.block.{{}}.layer.{i}.layer_norm.weight", "D")
                for i, norm in enumerate(norms)
            ),
            *attention(f"{path}/attention", f"{name}.block.{{}}.layer.0.SelfAttention"),
            Rule(f"{path}/mlp/up/kernel", "D F", mlp + ("wi_1.weight" if gated else "wi.weight"), "F D"),
            Rule(f"{path}/mlp/gate/kernel", "D F", mlp + "wi_0.weight", "F D"),
            Rule(f"{path}/mlp/down/kernel", "F D", mlp + "wo.weight", "D F"),
        ]

    relative = ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        Rule("token_embedding/embedding", "V D", "shared.weight", "V D"),
        Rule("encoder_relative_bias/embedding", "B H", "encoder" + relative, "B H"),
        *stack("encoder_blocks", "encoder", ("attention_norm", "mlp_norm")),
        Rule("encoder_norm/scale", "D", "encoder.final_layer_norm.weight", "D"),
        Rule("relative_bias/embedding", "B H", "decoder" + relative, "B H"),
        *stack("blocks", "decoder", ("attention_norm", "cross_attention_norm", "mlp_norm")),
        *attention("blocks/cross_attention", "decoder.block.{}.layer.1.EncDecAttention"),
        Rule("final_norm/scale", "D", "decoder.final_layer_norm.weight", "D"),
        Rule("head/scores/kernel", "D V", "lm_head.weight", "V D"),
    ]


def _gpt2_arguments(config: Json) -> Json:
    return {
        "num_kv_heads": config["n_head"],
        "head_dim": config["n_embd"] // config["n_head"],
        "mlp_dim": config["n_inner"] or 4 * config["n_embd"],
        "activation": _activation(config["activation_function"]),
        "attention_scale": 0.0 if config["scale_attn_weights"] else 1.0,
    }


def _gpt2_config(c: TransformerConfig) -> Json:
    return {
        "n_inner": c.mlp_dim,
        "activation_function": _their_activation(c.activation),
        "scale_attn_weights": c.attention_scale != 1.0,
    }


def _llama_arguments(config: Json) -> Json:
    model_type, num_layers = config["model_type"], config["num_hidden_layers"]
    num_heads = config["num_attention_heads"]
    arguments = {
        "num_kv_heads": config["num_key_value_heads"] or num_heads,
        "head_dim": config["head_dim"] or config["hidden_size"] // num_heads,
        "position": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "use_bias": config["attention_bias"],
        "qkv_bias": model_type == "qwen2",
        "qk_norm": model_type == "qwen3",
    } | _rope(config)
    if config["mlp_bias"] != config["attention_bias"]:
        raise ValueError("attention_bias without mlp_bias, or the other way round, is not supported")
    if model_type == "mistral" and config["sliding_window"]:
        arguments["window"] = config["sliding_window"]
    if model_type in ("qwen2", "qwen3") and config["use_sliding_window"] and config["sliding_window"]:
        first = config["max_window_layers"]
        types = config["layer_types"] or ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
        arguments["window"] = config["sliding_window"]
        arguments["window_pattern"] = "".join("W" if t == "sliding_attention" else "G" for t in types[:num_layers])
    return arguments


def _rope(config: Json) -> Json:
    """Our fields of rotary positions; Transformers 5 keeps them in rope_parameters, earlier ones beside rope_scaling."""
    rope = {"rope_theta": config["rope_theta"]} | (config.get("rope_parameters") or config["rope_scaling"] or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not one of {', '.join(ROPE_TYPES)}")
    for name in ("attention_factor", "mscale", "mscale_all_dim", "truncate"):
        if kind == "yarn" and rope.get(name) is not None:
            raise ValueError(f"{name} of rope_type 'yarn' is not supported")
    fields = {"rope_theta": float(rope["rope_theta"]), "rope_scaling": ROPE_TYPES[kind]}
    if kind != "default":
        fields["rope_factor"] = float(rope["factor"])
    if kind in ("llama3", "yarn"):
        low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
        fields["rope_original_len"] = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        fields["rope_low"] = float(rope.get(low) or 1)
        fields["rope_high"] = float(rope.get(high) or (4 if kind == "llama3" else 32))
    return fields


def _llama_config(c: TransformerConfig) -> Json:
    kind = next(theirs for theirs, ours in ROPE_TYPES.items() if ours == c.rope_scaling)
    rope: Json = {"rope_theta": c.rope_theta, "rope_type": kind}
    if kind != "default":
        rope["factor"] = c.rope_factor
    if kind in ("llama3", "yarn"):
        low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
        rope |= {"original_max_position_embeddings": c.rope_original_len, low: c.rope_low, high: c.rope_high}
    model_type = _rotary_type(c)
    config: Json = {
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rope_parameters": rope,
        # Transformers before 5 read these two instead.
        "rope_theta": c.rope_theta,
        "rope_scaling": None if kind == "default" else rope,
    }
    if model_type == "llama":
        config |= {"attention_bias": c.use_bias, "mlp_bias": c.use_bias}
    elif model_type == "mistral":
        config["sliding_window"] = c.window or None
    elif any(c.windows):
        types = ["sliding_attention" if window else "full_attention" for window in c.windows]
        config |= {"use_sliding_window": True, "sliding_window": c.window, "layer_types": types}
        config["max_window_layers"] = c.num_layers
    return config


def _bert_arguments(config: Json) -> Json:
    head = BERT_HEADS[architecture_of(config, FAMILIES["bert"])]
    return {
        "num_kv_heads": config["num_attention_heads"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "activation": _activation(config["hidden_act"]),
        "norm_position": "post",
        "embed_norm": True,
        "head": head,
        "pooler": head == "sequence_classification",
        "num_labels": len(config.get("id2label") or range(config.get("num_labels", 2))),
    }


def _bert_config(c: TransformerConfig) -> Json:
    head = "none" if c.head == "embedding" else c.head
    config: Json = {
        "architectures": [next((theirs for theirs, ours in BERT_HEADS.items() if ours == head), "BertModel")],
        "hidden_act": _their_activation(c.activation),
    }
    if head in ("sequence_classification", "token_classification"):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(c.num_labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(c.num_labels)}
    return config


def _t5_arguments(config: Json) -> Json:
    gate, _, name = config["feed_forward_proj"].rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(
            f"feed_forward_proj {config['feed_forward_proj']!r} is neither an activation nor gated-ACTIVATION"
        )
    if gate:
        gated = {"gelu": "geglu", "gelu_new": "geglu", "silu": "swiglu"}  # 'gated-gelu' is the tanh form in T5
        if name not in gated:
            raise ValueError(
                f"feed_forward_proj {config['feed_forward_proj']!r}: {name} is not one of {', '.join(gated)}"
            )
        activation = gated[name]
    else:
        activation = _activation(name)
    scale = config.get("scale_decoder_outputs")
    return {
        "num_layers": config["num_decoder_layers"] or config["num_layers"],
        "num_kv_heads": config["num_heads"],
        "position": "relative",
        "norm": "rmsnorm",
        "use_bias": False,
        "attention_scale": 1.0,
        "activation": activation,
        # Version 1.0 is tied and scales, 1.1 neither; only files of late versions of Transformers say it by itself.
        "scale_logits": config["tie_word_embeddings"] if scale is None else scale,
    }


def _t5_config(c: TransformerConfig) -> Json:
    gated = {"geglu": "gated-gelu", "swiglu": "gated-silu"}
    return {
        "num_decoder_layers": c.num_layers,
        "feed_forward_proj": gated[c.activation] if c.activation in gated else _their_activation(c.activation),
        "scale_decoder_outputs": c.scale_logits,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
    }


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _their_activation(name: str) -> str:
    theirs = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == name), None)
    if theirs is None:
        raise ValueError(f"Transformers has no activation {name!r} in this architecture")
    return theirs


_LLAMA = Family(
    kind="gpt",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    prefix="model.",
    rules=_llama_rules,
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "embed_dim",
        "intermediate_size": "mlp_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_epsilon",
    },
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    only={"hidden_act": "silu", "partial_rotary_factor": 1.0},
    arguments=_llama_arguments,
    write=_llama_config,
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=r"rotary_emb\.inv_freq$",
)
_QWEN_WINDOW: Json = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        kind="gpt",
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        prefix="transformer.",
        rules=_gpt2_rules,
        fields={
            "vocab_size": "vocab_size",
            "n_positions": "max_seq_len",
            "n_embd": "embed_dim",
            "n_layer": "num_layers",
            "n_head": "num_heads",
            "layer_norm_epsilon": "norm_epsilon",
        },
        defaults={
            "n_inner": None,
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        only={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        arguments=_gpt2_arguments,
        write=_gpt2_config,
        copies={"lm_head.weight": "transformer.wte.weight"},
        ignored=r"\.attn\.(masked_)?bias$",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA._replace(
        architectures=("MistralForCausalLM", "MistralModel"),
        defaults=_LLAMA.defaults | {"sliding_window": 4096},
    ),
    "qwen2": _LLAMA._replace(
        architectures=("Qwen2ForCausalLM", "Qwen2Model"),
        defaults=_LLAMA.defaults | _QWEN_WINDOW,
    ),
    "qwen3": _LLAMA._replace(
        architectures=("Qwen3ForCausalLM", "Qwen3Model"),
        defaults=_LLAMA.defaults | _QWEN_WINDOW | {"head_dim": 128},
        only=_LLAMA.only | {"attention_bias": False},
    ),
    "bert": Family(
        kind="bert",
        architectures=tuple(BERT_HEADS),
        prefix="bert.",
        rules=_bert_rules,
        fields={
            "vocab_size": "vocab_size",
            "hidden_size": "embed_dim",
            "intermediate_size": "mlp_dim",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "max_position_embeddings": "max_seq_len",
            "type_vocab_size": "token_types",
            "layer_norm_eps": "norm_epsilon",
        },
        defaults={"hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12, "tie_word_embeddings": True},
        only={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
        arguments=_bert_arguments,
        write=_bert_config,
        copies={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        ignored=r"embeddings\.position_ids$|^cls\.seq_relationship\.",
    ),
    "t5": Family(
        kind="encoder_decoder",
        architectures=("T5ForConditionalGeneration",),
        prefix="",
        rules=_t5_rules,
        fields={
            "vocab_size": "vocab_size",
            "d_model": "embed_dim",
            "d_kv": "head_dim",
            "d_ff": "mlp_dim",
            "num_layers": "num_encoder_layers",
            "num_heads": "num_heads",
            "relative_attention_num_buckets": "relative_buckets",
            "relative_attention_max_distance": "relative_max_distance",
            "n_positions": "max_seq_len",
            "layer_norm_epsilon": "norm_epsilon",
        },
        defaults={
            "num_decoder_layers": None,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "n_positions": 512,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "relu",
            "tie_word_embeddings": True,
        },
        only={},
        arguments=_t5_arguments,
        write=_t5_config,
        copies={
            "lm_head.weight": "shared.weight",
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        },
        # A table that some T5 files hold and T5 has never used: cross-attention has no relative positions.
        ignored=r"EncDecAttention\.relative_attention_bias\.weight$",
    ),
}
