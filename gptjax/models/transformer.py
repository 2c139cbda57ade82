"""The Transformer's block and the stack of blocks, scanned or unrolled, that every family reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.models.attention import Attention, KVCache
from gptjax.models.layers import ACTIVATIONS, INIT_STD, Einsum, LayerNorm, RMSNorm, dropout

NORMS = ("layernorm", "rmsnorm")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What a block keeps for its backward pass; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The constructor arguments of a model, as `model.json` holds them.

    Attributes:
      vocab_size, num_layers, num_heads, num_kv_heads, head_dim, embed_dim, mlp_dim, max_seq_len: sizes.
      norm: 'layernorm' or 'rmsnorm'; `norm_epsilon` is added to the variance.
      activation: of the MLP, a name in `layers.ACTIVATIONS`.
      use_bias: biases in projections, MLP and LayerNorm.
      tie_embeddings: the head scores against the token embedding.
      dtype: 'float32' or 'bfloat16', of the computation; parameters are always float32.
      scan_layers: compile one block and scan, or compile all of them; the values are the same.
      remat: 'none', 'dots' (keep matrix products of weights) or 'full' (keep block inputs only).

    Raises:
      ValueError: a size below 1, sizes that do not divide, or an unknown name.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    max_seq_len: int
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    activation: str = "gelu"
    use_bias: bool = True
    tie_embeddings: bool = True
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"model.{field.name} {value} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.num_kv_heads}"
            )
        for name, known in [("norm", NORMS), ("activation", ACTIVATIONS), ("dtype", DTYPES), ("remat", REMAT_POLICIES)]:
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"model.{name} {value!r} is not one of {', '.join(known)}")

    @property
    def residual_std(self) -> float:
        """Initial deviation of what writes to the residual stream (Radford et al., 2019, section 2.3)."""
        return INIT_STD / (2 * self.num_layers) ** 0.5


def make_norm(config: TransformerConfig, name: str) -> nn.Module:
    """The norm that `config` names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.norm_epsilon, name=name)
    return LayerNorm(config.norm_epsilon, config.use_bias, name=name)


class MLP(nn.Module):
    """activation(x W_up + b_up) W_down + b_down."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        up = Einsum((c.embed_dim, c.mlp_dim), (c.mlp_dim,) if c.use_bias else None, name="up")
        down = Einsum((c.mlp_dim, c.embed_dim), (c.embed_dim,) if c.use_bias else None, c.residual_std, name="down")
        return down("btf,fd->btd", ACTIVATIONS[c.activation](up("btd,df->btf", x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm block of GPT-2."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        *,
        dropout_rate: Array | None = None,
        cache: KVCache | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        c = self.config
        attention = Attention(c.num_heads, c.num_kv_heads, c.head_dim, c.use_bias, c.residual_std, name="attention")
        y, cache = attention(
            make_norm(c, "attention_norm")(x), mask, dropout_rate=dropout_rate, cache=cache, positions=positions
        )
        x = x + y
        y = MLP(c, name="mlp")(make_norm(c, "mlp_norm")(x))
        return x + dropout(y, dropout_rate, lambda: self.make_rng("dropout")), cache


class Blocks(nn.Module):
    """`num_layers` blocks whose parameters are stacked on a leading [L], however they are compiled.

    Scanned and unrolled are therefore the same values, the same checkpoint and the same parameter paths.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        *,
        dropout_rate: Array | None = None,
        cache: KVCache | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Applies the blocks to `x` [B, T, D]; `cache` is [L, ...] and comes back updated."""
        c = self.config
        block = Block(c, parent=None)
        if self.is_initializing():
            keys = jax.random.split(self.make_rng("params"), c.num_layers)
            stacked = jax.vmap(lambda key: block.init(key, x, mask)["params"])(keys)
            for name, value in stacked.items():
                self.param(name, lambda _, value=value: value)
            return x, cache

        def apply_block(x: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, Any]:
            params, key, layer_cache = layer
            return block.apply(
                {"params": params},
                x,
                mask,
                dropout_rate=dropout_rate,
                cache=layer_cache,
                positions=positions,
                rngs=None if key is None else {"dropout": key},
            )

        if c.remat != "none":
            # Within a scan nothing can be merged across layers, so the barrier against it is not needed.
            apply_block = jax.checkpoint(apply_block, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        dropout_keys = None if dropout_rate is None else jax.random.split(self.make_rng("dropout"), c.num_layers)
        layers = (self.variables["params"], dropout_keys, cache)
        return (_scan if c.scan_layers else _unroll)(apply_block, x, layers, c.num_layers)


def _scan(apply_block: Callable, x: Array, layers: Any, num_layers: int) -> tuple[Array, Any]:
    return jax.lax.scan(apply_block, x, layers, length=num_layers)


def _unroll(apply_block: Callable, x: Array, layers: Any, num_layers: int) -> tuple[Array, Any]:
    # lax.split, not indexing: its transpose is one concatenation, where the transpose of L slices is a sum of L arrays.
    leaves, structure = jax.tree.flatten(layers)
    columns = [jax.lax.split(leaf, (1,) * num_layers) for leaf in leaves]
    outputs = []
    for layer in range(num_layers):
        x, output = apply_block(x, jax.tree.unflatten(structure, [jnp.squeeze(column[layer], 0) for column in columns]))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
