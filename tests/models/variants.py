"""Variants of all three families, which between them use every field of the config, and parameters for them."""

import functools

import jax
import numpy as np

from gptjax.models import init_params, make_model

SIZES = dict(
    vocab_size=23, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4, embed_dim=16, mlp_dim=12, max_seq_len=8
)
LLAMA = {"position": "rotary", "norm": "rmsnorm", "use_bias": False, "activation": "swiglu", "tie_embeddings": False}
SCALED = {"rope_factor": 4.0, "rope_original_len": 16}
WINDOWS = {"window": 3, "window_pattern": "WG"}
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
# Named after the models that are built so, where there is one.
VARIANTS = {
    "gpt": {
        "gpt2": {},
        "llama3": {**LLAMA, **SCALED, "rope_scaling": "llama3", "num_kv_heads": 2},
        "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 6, "head": "embedding", "pooling": "last"},
        "gpt_oss": {**LLAMA, **SCALED, **WINDOWS, **EXPERTS, "rope_scaling": "yarn", "attention_sinks": True},
        "gemma2": {
            **WINDOWS,
            "position": "rotary",
            "activation": "geglu",
            "norm": "rmsnorm",
            "embed_scale": 0.0,
            "attention_softcap": 2.0,
            "logit_softcap": 3.0,
            "attention_scale": 0.3,
            "num_kv_heads": 2,
        },
        "mup": {"mup": True, "mup_base_dim": 4, "activation": "swiglu"},
        "bloom": {"position": "alibi", "embed_norm": True, "head": "none"},
        "t5_decoder": {"position": "relative", "relative_buckets": 6, "relative_max_distance": 6, "window": 3},
        "no_positions": {"position": "none", "head": "sequence_classification", "pooling": "last", "num_labels": 3},
        "prefix": {
            "prefix_lm": True,
            "num_kv_heads": 1,
            "activation": "gelu_exact",
            "head": "token_classification",
            "num_labels": 3,
        },
        "prefix_windows": {"prefix_lm": True, "window": 2, "position": "alibi", "attention_sinks": True},
        "nanogpt_speedrun": {
            "position": "rotary",
            "norm": "rmsnorm",
            "activation": "relu2",
            "qk_norm": True,
            "use_bias": False,
            "value_embeddings": True,
            "residual_scales": True,
            "residual_init": "zero",
            "logit_softcap": 5.0,
            "rope_scaling": "linear",
            "rope_factor": 2.0,
            "qkv_bias": True,
        },
        "switch": {
            "num_experts": 4,
            "experts_per_token": 1,
            "activation": "relu",
            "position": "sinusoidal",
            "norm_position": "post",
            "embed_scale": 0.0,
        },
    },
    "bert": {
        "bert": {
            "norm_position": "post",
            "embed_norm": True,
            "activation": "gelu_exact",
            "token_types": 2,
            "pooler": True,
            "head": "masked_lm",
        },
        "modernbert": {**WINDOWS, "position": "rotary", "activation": "geglu", "norm": "rmsnorm", "head": "masked_lm"},
        "no_positions": {
            "position": "none",
            "head": "token_classification",
            "attention_sinks": True,
            "attention_softcap": 2.0,
            "value_embeddings": True,
            "residual_scales": True,
            "qk_norm": True,
            "num_kv_heads": 2,
        },
        "no_positions_experts": {**EXPERTS, "position": "none", "head": "none", "token_types": 2},
        "relative": {"position": "relative", "relative_buckets": 8, "relative_max_distance": 6, "head": "span"},
        "alibi_windows": {"position": "alibi", "window": 2, "head": "embedding", "pooling": "mean"},
        "regression": {"position": "sinusoidal", "pooler": True, "head": "sequence_classification", "num_labels": 1},
    },
    "encoder_decoder": {
        "vaswani": {"position": "sinusoidal", "norm_position": "post", "activation": "relu", "embed_scale": 0.0},
        "t5": {
            "position": "relative",
            "relative_buckets": 6,
            "relative_max_distance": 6,
            "norm": "rmsnorm",
            "use_bias": False,
            "activation": "relu",
            "scale_logits": True,
            "attention_scale": 1.0,
        },
        "gated": {"embed_norm": True, "activation": "geglu", "tie_embeddings": False, "num_kv_heads": 2},
        "rotary": {
            **WINDOWS,
            "position": "rotary",
            "qk_norm": True,
            "attention_sinks": True,
            "attention_softcap": 2.0,
            "value_embeddings": True,
            "residual_scales": True,
            "num_kv_heads": 2,
        },
        "experts": {**EXPERTS, "position": "alibi", "head": "none"},
    },
}
ALL = [(family, name) for family, variants in VARIANTS.items() for name in variants]


@functools.cache
def model_of(family, name, **change):
    encoder = {"num_encoder_layers": 1 if name == "rotary" else 2} if family == "encoder_decoder" else {}
    return make_model(family, **(SIZES | encoder | VARIANTS[family][name] | change))


def draw_parameters(model, seed=0):
    """Parameters of which none is at its initial value, so that each has a say.

    By NumPy: compiling `init_params` takes seconds a model.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape).astype(np.float32)
        kind = path[-1].key
        if kind in ("scale", "residual_scales"):
            return 1 + 0.2 * x
        return x / np.sqrt(model.config.embed_dim) if kind == "kernel" else 0.5 * x

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
