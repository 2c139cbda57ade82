"""The Transformer's block and the stack of blocks, scanned or unrolled, that every family reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.distributed.sharding import HIDDEN, constrain
from gptjax.models.attention import Attention, BlockInputs, KVCache
from gptjax.models.config import TransformerConfig
from gptjax.models.dropout import dropout
from gptjax.models.experts import mix_experts
from gptjax.models.layers import ACTIVATIONS, GATED_ACTIVATIONS, INIT_STD, PRODUCT, Einsum, LayerNorm, RMSNorm

# What a block keeps for its backward pass; the rest is computed again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def make_norm(config: TransformerConfig, name: str) -> nn.Module:
    """The norm that `config` names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.norm_epsilon, name=name)
    return LayerNorm(config.norm_epsilon, config.use_bias, name=name)


class MLP(nn.Module):
    """activation(x W_up + b_up) W_down + b_down; gated, (activation(x W_gate) * x W_up) W_down."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        shape, bias_shape = (c.embed_dim, c.mlp_dim), (c.mlp_dim,) if c.use_bias else None
        hidden = Einsum(shape, bias_shape, c.hidden_std, name="up")("btd,df->btf", x)
        if c.activation in GATED_ACTIVATIONS:
            gate = Einsum(shape, bias_shape, c.hidden_std, name="gate")("btd,df->btf", x)
            hidden *= GATED_ACTIVATIONS[c.activation](gate)
        else:
            hidden = ACTIVATIONS[c.activation](hidden)
        down = Einsum((c.mlp_dim, c.embed_dim), (c.embed_dim,) if c.use_bias else None, c.residual_std, name="down")
        return down("btf,fd->btd", hidden)


class ExpertMLP(nn.Module):
    """A mixture of MLPs: each token goes to the `experts_per_token` that its router scores highest, and none is dropped.

    The chosen experts' outputs are weighted by their probabilities, made to add up to 1 (Mixtral, Jiang et al., 2024,
    arXiv:2401.04088, section 2.1). Experts have no biases.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Returns ([B, T, D], the router's losses, a scalar).

        The balance loss is `num_experts` times the sum over experts of the share of tokens times the mean probability
        (Fedus et al., 2021, arXiv:2101.03961, section 2.2); the z-loss is the mean square of the router's logsumexp (Zoph
        et al., 2022, arXiv:2202.08906, section 3). Both are means over the tokens of one micro-batch, padding included,
        and so depend on how a batch is cut, by definition; the outputs do not.
        """
        c = self.config
        logits = Einsum((c.embed_dim, c.num_experts), name="router")("btd,de->bte", x.astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, c.experts_per_token)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        def kernel(name: str, shape: tuple[int, int], std: float = INIT_STD) -> Array:
            return Kernel((c.num_experts, *shape), std, name=name)().astype(x.dtype)

        up = kernel("experts_up", (c.embed_dim, c.mlp_dim))
        gate = kernel("experts_gate", (c.embed_dim, c.mlp_dim)) if c.activation in GATED_ACTIVATIONS else None
        down = kernel("experts_down", (c.mlp_dim, c.embed_dim), c.residual_std)
        mixed = mix_experts(x, weights, chosen, (up, gate, down), c.activation)

        sizes = jnp.bincount(chosen.reshape(-1), length=c.num_experts)
        share = sizes.astype(jnp.float32) / chosen.size
        balance = c.num_experts * jnp.sum(share * jnp.mean(probabilities, axis=(0, 1)))
        z = jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
        return mixed, c.balance_loss * balance + c.router_z_loss * z


class Kernel(nn.Module):
    """A parameter `kernel` alone, for what is not an einsum."""

    shape: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", nn.initializers.normal(self.std), self.shape)


class Block(nn.Module):
    """Self-attention, attention over the encoder's output if there is one, and the MLP, each added to what it reads.

    Pre-norm: x + f(norm(x)), as GPT-2 has it. Post-norm: norm(x + f(x)), as the original Transformer and BERT have it.
    """

    config: TransformerConfig
    cross: bool = False

    @nn.compact
    def __call__(
        self, x: Array, inputs: BlockInputs, *, window: Array | int = 0, cache: KVCache | None = None
    ) -> tuple[Array, tuple[KVCache | None, Array]]:
        """Returns ([B, T, D], (the updated cache or None, the losses of a mixture of experts))."""
        c = self.config
        loss = jnp.zeros(())
        if c.residual_scales:
            scales = self.param("residual_scales", lambda _, shape: jnp.array([1.0, 0.0]), (2,)).astype(x.dtype)
            x = scales[0] * x + scales[1] * inputs.embedded

        def add(x: Array, norm_name: str, sublayer: Callable[[Array], Array]) -> Array:
            norm = make_norm(c, norm_name)
            return x + sublayer(norm(x)) if c.norm_position == "pre" else norm(x + sublayer(x))

        def self_attention(y: Array) -> Array:
            nonlocal cache
            y, cache = Attention(c, name="attention")(y, inputs, window=window, cache=cache)
            return y

        def cross_attention(y: Array) -> Array:
            nonlocal cache
            y, cache = Attention(c, cross=True, name="cross_attention")(y, inputs, cache=cache)
            return y

        def mlp(y: Array) -> Array:
            nonlocal loss
            if c.num_experts:
                y, loss = ExpertMLP(c, name="mlp")(y)
            else:
                y = MLP(c, name="mlp")(y)
            return dropout(y, inputs.dropout_rate, lambda: self.make_rng("dropout"))

        x = add(x, "attention_norm", self_attention)
        if self.cross:
            x = add(x, "cross_attention_norm", cross_attention)
        return add(x, "mlp_norm", mlp), (cache, loss)


class Blocks(nn.Module):
    """Blocks whose parameters are stacked on a leading [L], however they are compiled.

    Scanned and unrolled are therefore the same values, the same checkpoint and the same parameter paths.
    """

    config: TransformerConfig
    cross: bool = False

    @nn.compact
    def __call__(
        self, x: Array, inputs: BlockInputs, cache: list[KVCache] | None = None
    ) -> tuple[Array, list[KVCache] | None]:
        """Applies the blocks to `x` [B, T, D]; `cache` has one for each layer and comes back updated.

        The losses of a mixture of experts, averaged over layers, are sown as 'router' in the collection 'losses'.
        """
        c = self.config
        block = Block(c, self.cross, parent=None)
        if self.is_initializing():
            keys = jax.random.split(self.make_rng("params"), c.num_layers)
            # Parameters do not depend on who computes attention, and not everyone computes it for one token.
            plain = Block(dataclasses.replace(c, attention="plain"), self.cross, parent=None)
            stacked = jax.vmap(lambda key: plain.init(key, x, inputs, cache=None)["params"])(keys)
            for name, value in stacked.items():
                self.param(name, lambda _, value=value: value)
            return x, cache

        def apply_block(x: Array, layer: tuple[Any, ...]) -> tuple[Array, Any]:
            params, key, layer_cache, window = layer
            return block.apply(
                {"params": params},
                constrain(x, HIDDEN),
                inputs,
                window=windows[0] if window is None else window,
                cache=layer_cache,
                rngs=None if key is None else {"dropout": key},
            )

        if c.remat != "none":
            # Within a scan nothing can be merged across layers, so the barrier against it is not needed.
            apply_block = jax.checkpoint(apply_block, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        windows = c.windows
        dropout_keys = None
        if inputs.dropout_rate is not None:
            dropout_keys = jax.random.split(self.make_rng("dropout"), c.num_layers)
        # One window for all layers stays a number, which more implementations of attention can express.
        by_layer = jnp.asarray(windows) if len(set(windows)) > 1 else None
        params = self.variables["params"]
        if cache is not None or "layer_0" in params:  # caches may differ in length, and are updated in place
            by_name = params if "layer_0" in params else unstack(params, c.num_layers)
            written = []
            for i, window in enumerate(windows):
                x, (updated, _) = apply_block(x, (by_name[f"layer_{i}"], None, cache and cache[i], window))
                written.append(updated)
            return x, written if cache else None
        layers = (params, dropout_keys, None, by_layer)
        x, (_, losses) = (_scan if c.scan_layers else _unroll)(apply_block, x, layers, c.num_layers)
        if c.num_experts:
            self.sow("losses", "router", jnp.mean(losses))
        return x, None


def _scan(apply_block: Callable, x: Array, layers: Any, num_layers: int) -> tuple[Array, Any]:
    return jax.lax.scan(apply_block, x, layers, length=num_layers)


def unstack(params: Any, num_layers: int) -> dict[str, Any]:
    """Parameters stacked on a leading [L] as {'layer_0': parameters, ...}, which `Blocks` takes too to decode.

    Within a compiled function this copies every weight, so generation does it once, before.
    """
    # lax.split, not indexing: its transpose is one concatenation, where the transpose of L slices is a sum of L arrays.
    leaves, structure = jax.tree.flatten(params)
    columns = [jax.lax.split(leaf, (1,) * num_layers) for leaf in leaves]
    return {
        f"layer_{layer}": jax.tree.unflatten(structure, [jnp.squeeze(column[layer], 0) for column in columns])
        for layer in range(num_layers)
    }


def _unroll(apply_block: Callable, x: Array, layers: Any, num_layers: int) -> tuple[Array, Any]:
    outputs = []
    for layer in unstack(layers, num_layers).values():
        x, output = apply_block(x, layer)
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
