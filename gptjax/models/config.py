"""The constructor arguments of a model: one dataclass for every family, checked when it is made."""

import dataclasses

import jax.numpy as jnp

from gptjax.models.attention_ops import IMPLEMENTATIONS
from gptjax.models.layers import ACTIVATIONS, GATED_ACTIVATIONS, INIT_STD
from gptjax.models.positions import POSITIONS, ROPE_SCALINGS, Rope

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
HEADS = (
    "language_model",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "span",
    "embedding",
    "none",
)
AT_LEAST_ONE = (
    *("vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("embed_dim", "mlp_dim", "max_seq_len", "num_labels", "mup_base_dim"),
)
AT_LEAST_ZERO = ("num_encoder_layers", "window", "num_experts", "token_types", "attention_softcap", "logit_softcap")
# Each field that names one of a few things, and their names.
CHOICES = {
    "position": POSITIONS,
    "rope_scaling": ROPE_SCALINGS,
    "attention": ("auto", *IMPLEMENTATIONS),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "activation": (*ACTIVATIONS, *GATED_ACTIVATIONS),
    "residual_init": ("scaled", "zero"),
    "head": HEADS,
    "pooling": ("first", "last", "mean"),
    "dtype": tuple(DTYPES),
    "remat": ("none", "dots", "full"),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The constructor arguments of a model, as `model.json` holds them; the defaults are GPT-2's.

    Attributes:
      vocab_size, num_layers, num_heads, num_kv_heads, head_dim, embed_dim, mlp_dim, max_seq_len: sizes.
      num_encoder_layers: blocks of the encoder in front of the decoder; 0 without an encoder.
      position: 'learned', 'sinusoidal', 'rotary', 'alibi', 'relative' (T5) or 'none'.
      rope_theta, rope_scaling, rope_factor, rope_original_len, rope_low, rope_high: of rotary, see `positions.Rope`.
      relative_buckets, relative_max_distance: of relative positions, see `positions.relative_bucket`.
      prefix_lm: tokens of a row's prefix see each other in both directions.
      window, window_pattern: layers marked W in the pattern, which is repeated, see the latest `window` positions; those
        marked G see all. A window of 0 is none.
      attention: an implementation in `attention_ops.IMPLEMENTATIONS`, or 'auto' for the fastest that can.
      attention_scale: multiplies query times key; 0 for 1 / sqrt(head_dim).
      attention_softcap, logit_softcap: cap * tanh(x / cap) on scores and logits (Gemma 2); 0 for none.
      attention_sinks: a learned score a head that takes a share of the softmax and gives nothing (gpt-oss).
      attention_dropout: the dropout rate also applies to the attention weights.
      qk_norm: RMSNorm of queries and keys within each head (Qwen3).
      value_embeddings: a second embedding of the tokens, a table a layer, added to the values.
      norm: 'layernorm' or 'rmsnorm'; `norm_epsilon` is added to the variance.
      norm_position: 'pre', of what goes into a sublayer, or 'post', of the sum after it.
      embed_norm: a norm after the embeddings (BERT).
      embed_scale: the token embedding is multiplied by this; 0 for sqrt(embed_dim).
      activation: of the MLP; 'swiglu', 'geglu' multiply it with a second projection.
      num_experts, experts_per_token: a mixture of experts in place of the MLP; 0 experts for none.
      balance_loss, router_z_loss: coefficients of the mixture's two losses.
      use_bias: biases in projections, MLP and LayerNorm; qkv_bias: in query, key and value even so.
      residual_scales: each block mixes in the embedded tokens, by two learned scales (modded-nanogpt).
      residual_init: what writes to the residual stream starts at std / sqrt(2 * num_layers), or at zero.
      token_types: rows of the token-type table of an encoder (BERT's segments); 0 for none.
      pooler: an encoder's dense layer with tanh over the first token.
      tie_embeddings: the head scores against the token embedding.
      scale_logits: logits are divided by sqrt(embed_dim) (T5 1.0, tied).
      head: what the model gives, see `heads`.
      num_labels: of a classification head; 1 is regression.
      pooling: which token, or the mean, speaks for a text in 'sequence_classification' and 'embedding'.
      mup: maximal update parametrisation, in which what is best for a narrow model is best for a wide one (Yang et al.,
        2022, arXiv:2203.03466, table 8): the wider, the smaller hidden kernels start and the less AdamW moves them; logits
        are divided by the width, and scores by head_dim. Widths (embed_dim, mlp_dim, num_heads x head_dim) grow together.
      mup_base_dim: the embed_dim at which it is like the standard parametrisation.
      dtype: 'float32' or 'bfloat16', of the computation; parameters are always float32.
      scan_layers: compile one block and scan, or compile all of them; the values are the same.
      remat: 'none', 'dots' (keep matrix products of weights) or 'full' (keep block inputs only).

    Raises:
      ValueError: a size below 1, sizes that do not divide, an unknown name, or an attention implementation that cannot
        express the rest.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    max_seq_len: int
    num_encoder_layers: int = 0
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_len: int = 0
    rope_low: float = 1.0
    rope_high: float = 4.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    prefix_lm: bool = False
    window: int = 0
    window_pattern: str = "W"
    attention: str = "auto"
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    attention_sinks: bool = False
    attention_dropout: bool = False
    qk_norm: bool = False
    value_embeddings: bool = False
    norm: str = "layernorm"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-5
    embed_norm: bool = False
    embed_scale: float = 1.0
    activation: str = "gelu"
    num_experts: int = 0
    experts_per_token: int = 2
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    use_bias: bool = True
    qkv_bias: bool = False
    residual_scales: bool = False
    residual_init: str = "scaled"
    token_types: int = 0
    pooler: bool = False
    tie_embeddings: bool = True
    scale_logits: bool = False
    logit_softcap: float = 0.0
    head: str = "language_model"
    num_labels: int = 2
    pooling: str = "first"
    mup: bool = False
    mup_base_dim: int = 256
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} {getattr(self, name)} must be at least 1")
        for name in AT_LEAST_ZERO:
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} {getattr(self, name)} must be at least 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.num_kv_heads}"
            )
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"model.{name} {value!r} is not one of {', '.join(known)}")
        if not self.window_pattern or set(self.window_pattern) - set("WG"):
            raise ValueError(f"model.window_pattern {self.window_pattern!r} must be made of W (window) and G (global)")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(f"model.head_dim {self.head_dim} must be even for model.position 'rotary'")
        if self.position == "sinusoidal" and self.embed_dim % 2:
            raise ValueError(f"model.embed_dim {self.embed_dim} must be even for model.position 'sinusoidal'")
        if self.rope_scaling in ("llama3", "yarn") and self.rope_original_len < 1:
            raise ValueError(f"model.rope_original_len {self.rope_original_len} must be at least 1 for rope_scaling")
        if self.rope_theta <= 0 or self.rope_factor <= 0:
            raise ValueError(f"model.rope_theta {self.rope_theta} and rope_factor {self.rope_factor} must be above 0")
        if self.rope_scaling == "llama3" and self.rope_high <= self.rope_low:
            raise ValueError(f"model.rope_high {self.rope_high} must be above model.rope_low {self.rope_low}")
        if self.position == "relative" and not 4 <= self.relative_buckets < 2 * self.relative_max_distance:
            raise ValueError(
                f"model.relative_buckets {self.relative_buckets} must be at least 4 and below twice "
                f"model.relative_max_distance {self.relative_max_distance}"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.experts_per_token {self.experts_per_token} must be from 1 to model.num_experts {self.num_experts}"
            )
        if self.mup and (
            self.scale_logits or not self.embed_scale or self.num_experts or self.head != "language_model"
        ):
            raise ValueError(
                "model.mup is for model.head 'language_model' without experts, scale_logits or an embed_scale of 0, "
                "whose scales depend on the width in other ways"
            )
        if self.attention != "auto":
            missing = IMPLEMENTATIONS[self.attention].missing(self.attention_needs)
            if missing:
                raise ValueError(f"model.attention {self.attention!r} cannot express model.{missing}")

    @property
    def attention_needs(self) -> dict[str, bool]:
        """What an implementation must be able to do, by the field that asks for it."""
        return {
            "position": self.position in ("alibi", "relative"),
            "attention_softcap": self.attention_softcap > 0,
            "attention_sinks": self.attention_sinks,
            "attention_dropout": self.attention_dropout,
            "prefix_lm": self.prefix_lm,
            "window_pattern": len(set(self.windows)) > 1,
        }

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer, 0 for none."""
        pattern = self.window_pattern
        return tuple(self.window if pattern[i % len(pattern)] == "W" else 0 for i in range(self.num_layers))

    @property
    def rope(self) -> Rope:
        """Rotary positions."""
        return Rope(
            self.rope_theta,
            self.rope_scaling,
            self.rope_factor,
            self.rope_original_len,
            self.rope_low,
            self.rope_high,
        )

    @property
    def width(self) -> float:
        """How many times wider than muP's base; 1 without muP."""
        return self.embed_dim / self.mup_base_dim if self.mup else 1.0

    @property
    def query_scale(self) -> float:
        """What multiplies query times key; muP's 8 / head_dim is 1 / sqrt(head_dim) for the usual 64."""
        return self.attention_scale or (8 / self.head_dim if self.mup else self.head_dim**-0.5)

    @property
    def hidden_std(self) -> float:
        """Initial deviation of kernels between hidden layers."""
        return INIT_STD / self.width**0.5

    @property
    def residual_std(self) -> float:
        """Initial deviation of what writes to the residual stream (Radford et al., 2019, section 2.3)."""
        return 0.0 if self.residual_init == "zero" else self.hidden_std / (2 * self.num_layers) ** 0.5
