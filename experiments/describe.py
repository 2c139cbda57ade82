"""Say what a config would make, without making it: python -m experiments.describe --config configs/NAME.py

Parameters by part, FLOPs a token, and bytes of a training step and of generation; sums over all devices.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import build, cli

# The part of a parameter, by the first pattern that its path matches.
PARTS = (
    (r"/lora_", "adapters"),
    (r"^head/", "head"),
    (r"^pooler/", "pooler"),
    (r"norm/", "norms"),
    (r"(embedding|relative_bias)(/|$)", "embeddings"),
    (r"/cross_attention/", "cross-attention"),
    (r"/attention/", "attention"),
    (r"/mlp/router/", "router"),
    (r"/mlp/", "MLP"),
    (r"/residual_scales$", "residual scales"),
)

ORDER = [
    "embeddings",
    *(stack + part for stack in ("encoder ", "decoder ", "") for _, part in PARTS[3:] if stack + part != "embeddings"),
    "pooler",
    "head",
    *(stack + "adapters" for stack in ("encoder ", "decoder ", "")),
]


def main(argv: Sequence[str]) -> int:
    """Prints the description; returns the exit code."""
    arguments = cli.Parser(__doc__, config=True).parse(argv)
    config = arguments.config
    build.check(config)
    with cli.user_errors():
        config, _, _ = build.initial_model(config)
        metrics = describe(config)
    print("\n".join(table(config, metrics)))
    if arguments.json:
        from gptjax.workdir import environment

        cli.write_report(arguments.json, environment(), [config.seed], metrics)
    return 0


def describe(config: ConfigDict) -> dict[str, int]:
    """The figures of a config by name; nothing is allocated.

    Returns:
      params/total, params/active (of a mixture of experts, what one token uses), params/STACK PART for each stack and part
      of the model, flops/token, and bytes: weights, gradients, optimizer, ema, batch and activations of a training step,
      kv_cache of one row at full context.

    Raises:
      ValueError: if the config does not make a model.
    """
    import jax

    from gptjax.distributed.sharding import path_of
    from gptjax.generation.decoding import init_cache
    from gptjax.models import BERT, EncoderDecoder, make_model
    from gptjax.training.throughput import flops_per_token

    model = make_model(**build.model_sizes(config, vocab_size(config)))
    c, settings = model.config, build.step_settings(config)
    numbers = jax.numpy.uint32(0), jax.numpy.float32(1), build.hyperparameters(config)
    state = jax.eval_shape(build.initial_state(config, model), *numbers, {})
    params = state.model_params
    parts = Counter(dict.fromkeys(ORDER, 0))
    experts = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, size = path_of(path), math.prod(leaf.shape)
        parts[_part(name, isinstance(model, EncoderDecoder))] += size
        experts += size if "/experts_" in name else 0
    batch = abstract_batch(config, config.train.batch_size // config.train.accumulation_steps)
    metrics = {
        "params/total": sum(parts.values()),
        **{f"params/{name}": size for name, size in parts.items() if size},
        "params/active": sum(parts.values()) - round(experts * (1 - c.experts_per_token / max(1, c.num_experts))),
        "flops/token": flops_per_token(model, state.params, build.seq_len(config), state.frozen),
        "bytes/weights": _bytes(params),
        "bytes/gradients": _bytes(state.params),
        "bytes/optimizer": _bytes(state.opt_state),
        "bytes/ema": _bytes(state.ema),
        "bytes/batch": _bytes(batch),
        "bytes/activations": activation_bytes(model, params, batch, dropout=settings.use_dropout),
    }
    if not isinstance(model, BERT) and c.head == "language_model":
        memory_len = c.max_seq_len if isinstance(model, EncoderDecoder) else 0
        metrics["bytes/kv_cache"] = _bytes(jax.eval_shape(lambda: init_cache(model, 1, c.max_seq_len, memory_len)))
    return metrics


def vocab_size(config: ConfigDict) -> int:
    """V as far as it is known before the corpus is read: for 'char' and 'bpe', what the config has."""
    from gptjax.data.objectives import special_tokens
    from gptjax.data.tokenizers import KINDS, Tokenizer

    if config.init.model:
        return config.data.vocab_size
    if config.data.tokenizer == "byte":
        return 257 + len(special_tokens(config.data.objective))
    if config.data.tokenizer in KINDS:
        return config.data.vocab_size
    return Tokenizer.load(config.data.tokenizer).vocab_size


def target_len(config: ConfigDict) -> int:
    """T, the tokens that a row has to predict."""
    from gptjax.data import objectives

    return objectives.target_len(build.objective(config.data), build.seq_len(config))


def abstract_batch(config: ConfigDict, num_rows: int) -> dict[str, Any]:
    """Names, shapes and types of a batch."""
    import jax

    def integers(length: int) -> Any:
        return jax.ShapeDtypeStruct((num_rows, length), "int32")

    length, whole = target_len(config), config.data.objective in ("classification", "question_answering")
    read = ("inputs", "positions", "segment_ids", *(("token_types",) if whole else ()))
    batch = {name: integers(build.seq_len(config) if whole else length) for name in read} | {
        "targets": integers(length)
    }
    batch["loss_weights"] = jax.ShapeDtypeStruct((num_rows, length), "float32")
    if config.data.objective == "dpo":
        batch["reference"] = batch["loss_weights"]
    if config.model.prefix_lm:
        batch["prefix"] = jax.ShapeDtypeStruct((num_rows, length), "bool")
    if config.model.family == "encoder_decoder":
        names = ("encoder_tokens", "encoder_positions", "encoder_segment_ids")
        batch |= {name: integers(build.seq_len(config)) for name in names}
    return batch


def activation_bytes(model: Any, params: Any, batch: Any, *, dropout: bool) -> int:
    """Bytes of everything that depends on the batch and is kept from the forward for the backward pass.

    Read off JAX's own derivative, with rematerialisation as configured. It is a lower bound of what a step needs besides
    its state: XLA adds what one operation needs while it runs, above all the gradient of the logits.
    """
    import jax
    from jax.extend.core import Literal

    from gptjax.training.step import loss_sum

    if model.config.head not in ("language_model", "masked_lm", "sequence_classification", "span"):
        raise ValueError(f"model.head {model.config.head!r} has no loss over tokens, so no activations are known")

    def residuals(params: Any, batch: Any) -> list[Any]:
        noise = (jax.numpy.float32(0.1), jax.random.key(0)) if dropout else None
        return jax.tree.leaves(jax.vjp(lambda params: loss_sum(model, params, batch, dropout=noise)[0], params)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, batch).jaxpr
    inputs = set(jaxpr.invars)
    computed = set(jaxpr.invars[len(jax.tree.leaves(params)) :])  # from the batch, not from parameters alone
    for equation in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in computed for x in equation.invars):
            computed.update(equation.outvars)
    kept = {x for x in jaxpr.outvars if not isinstance(x, Literal) and x in computed and x not in inputs}
    return _bytes([x.aval for x in kept])


def table(config: ConfigDict, metrics: dict[str, int]) -> Iterator[str]:
    """The lines of the printed description."""
    m, total = config.model, metrics["params/total"]
    layers = f"{m.num_encoder_layers} + {m.num_layers}" if m.num_encoder_layers else str(m.num_layers)
    sizes = build.model_sizes(config, vocab_size(config))
    vocabulary = f"vocabulary {sizes['vocab_size']:,}"
    if config.data.tokenizer == "char":
        vocabulary += " (data.vocab_size; the corpus decides)"
    yield (
        f"{m.family}: {layers} layers, {m.embed_dim} wide, {m.num_heads} heads of {sizes['head_dim']}, "
        f"MLP {sizes['mlp_dim']}, context {m.max_seq_len:,}, {vocabulary}, {m.dtype}"
    )
    yield from ("", "parameters")
    parts = {name.removeprefix("params/"): size for name, size in metrics.items() if name.startswith("params/")}
    head = parts.get("head", 0)
    tied = m.tie_embeddings and m.head in ("language_model", "masked_lm")
    for name, size in parts.items():
        if name not in ("total", "active"):
            yield _line(name, f"{size:,}", f"{size / total:6.1%}")
    yield _line("total", f"{total:,}")
    yield _line("without the head", f"{total - head:,}", "its scores share the token embedding" if tied else "")
    if metrics["params/active"] != total:
        yield _line("used by one token", f"{metrics['params/active']:,}")
    rows = config.train.batch_size // config.train.accumulation_steps
    yield from ("", "training, over all devices")
    convention = "6 N + 12 L H K T (Chowdhery et al., 2022, appendix B)"
    if m.num_encoder_layers:
        yield _line("compute a target token", _flops(metrics["flops/token"]), f"{convention}, its source as long")
    else:
        yield _line("compute a token", _flops(metrics["flops/token"]), convention)
        steps, tokens = config.train.num_train_steps, config.train.batch_size * build.seq_len(config)
        budget = _flops(metrics["flops/token"] * tokens * steps)
        yield _line("compute in all", budget, f"{steps:,} steps of {tokens:,} tokens")
    yield _line("weights", _size(metrics["bytes/weights"]), "float32")
    yield _line("gradients", _size(metrics["bytes/gradients"]))
    yield _line("optimizer", _size(metrics["bytes/optimizer"]), config.optimizer.name)
    if metrics["bytes/ema"]:
        yield _line("moving average", _size(metrics["bytes/ema"]))
    yield _line(
        "activations",
        _size(metrics["bytes/activations"]),
        f"kept for the backward pass of {rows} rows, remat {m.remat}",
    )
    if "bytes/kv_cache" in metrics:
        yield from ("", "generation")
        yield _line("KV cache", _size(metrics["bytes/kv_cache"]), f"one row of {m.max_seq_len:,} tokens, {m.dtype}")


def _part(path: str, has_encoder: bool) -> str:
    """The name of a parameter's part, with its stack where there are two."""
    part = next((part for pattern, part in PARTS if re.search(pattern, path)), "other")
    if not has_encoder or part == "head" or ("blocks/" not in path and part == "embeddings"):
        return part
    return ("encoder " if path.startswith("encoder_") else "decoder ") + part


def _bytes(tree: Any) -> int:
    import jax

    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _line(name: str, figure: str, note: str = "") -> str:
    return f"  {name:<24} {figure:>16}  {note}".rstrip()


def _flops(number: float) -> str:
    """Operations in a unit that suits."""
    for unit in ("", "K", "M", "G", "T", "P", "E", "Z"):
        if number < 1000:
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    return f"{number:,.0f} YFLOP"


def _size(num_bytes: float) -> str:
    """Bytes in a unit that suits."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


if __name__ == "__main__":
    cli.run(main)
