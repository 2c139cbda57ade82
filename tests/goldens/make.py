"""Makes the golden files: what Transformers computes with models of tiny, odd shapes.

    .venv-referee/bin/python tests/goldens/make.py             # writes tests/goldens/*.npz
    .venv-referee/bin/python tests/goldens/make.py --check DIR # do the folders in DIR, written by
                                                               # `python -m tests.interop.write_folders DIR`, load alike?

A file holds config.json and the shapes of the weights as JSON, the inputs, and the outputs: logits (the last of a long
text), loss, a sample of every tensor's gradient with its largest entry, and what greedy decoding writes.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers
from weights import draw_weights, some_entries

HERE = pathlib.Path(__file__).parent
VOCAB = 101
GPT2 = dict(vocab_size=VOCAB, n_positions=96, n_embd=30, n_layer=2, n_head=3)
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
)
BERT = dict(
    vocab_size=VOCAB,
    hidden_size=30,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=40,
)
T5 = dict(
    vocab_size=VOCAB,
    d_model=24,
    d_kv=10,
    d_ff=44,
    num_layers=2,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    decoder_start_token_id=0,
    n_positions=96,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=50000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN_ROPE = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
# Name: architecture, config, length of the texts, whether greedy decoding is stored.
CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2, 17, True),
    "gpt2_untied": (
        "GPT2LMHeadModel",
        GPT2 | dict(tie_word_embeddings=False, n_inner=44, activation_function="gelu", scale_attn_weights=False),
        17,
        False,
    ),
    "llama_tied": ("LlamaForCausalLM", LLAMA | dict(head_dim=12, tie_word_embeddings=True), 17, False),
    "llama_long": (
        "LlamaForCausalLM",
        LLAMA | dict(rope_parameters=LLAMA3_ROPE, max_position_embeddings=640, num_hidden_layers=3),
        600,
        True,
    ),
    "llama_biases": (
        "LlamaForCausalLM",
        LLAMA | dict(rope_parameters=YARN_ROPE, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
        80,
        False,
    ),
    "mistral": ("MistralForCausalLM", LLAMA | dict(sliding_window=5), 17, False),
    "qwen2": (
        "Qwen2ForCausalLM",
        LLAMA
        | dict(
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
        ),
        17,
        False,
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        LLAMA
        | dict(hidden_size=30, num_attention_heads=6, num_key_value_heads=3, head_dim=8, tie_word_embeddings=True),
        17,
        False,
    ),
    "bert": ("BertModel", BERT, 17, False),
    "bert_masked_lm": ("BertForMaskedLM", BERT | dict(hidden_act="gelu_new"), 17, False),
    "bert_classes": ("BertForSequenceClassification", BERT | dict(num_labels=3), 17, False),
    "bert_regression": ("BertForSequenceClassification", BERT | dict(num_labels=1), 17, False),
    "bert_tokens": ("BertForTokenClassification", BERT | dict(num_labels=5), 17, False),
    "bert_span": ("BertForQuestionAnswering", BERT, 17, False),
    "minilm": ("BertModel", BERT | dict(num_hidden_layers=3), 17, False),
    "t5_v1_0": ("T5ForConditionalGeneration", T5, 33, True),
    "t5_v1_1": (
        "T5ForConditionalGeneration",
        T5 | dict(num_layers=3, num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        17,
        True,
    ),
}


def make_inputs(architecture: str, length: int) -> dict[str, np.ndarray]:
    """Two texts, the second of them padded, and what the loss needs."""
    rng = np.random.default_rng(length)
    draw = rng.integers
    tokens = draw(2, VOCAB, (2, length))
    mask = np.ones((2, length), np.int64)
    if architecture != "BertForQuestionAnswering":  # where Transformers lets padding compete for the answer
        mask[1, length - 5 :] = 0
    tokens = np.where(mask == 1, tokens, 0)
    real = np.where(mask == 1, tokens, -100)
    inputs = {"tokens": tokens, "mask": mask}
    if architecture.startswith("T5"):
        targets = draw(2, VOCAB, (2, 12))
        return inputs | {"targets": np.where(np.arange(12) < [[12], [9]], targets, -100)}
    if not architecture.startswith("Bert"):
        return inputs | {"targets": real}
    inputs["token_types"] = np.tile(np.arange(length) >= 8, (2, 1)).astype(np.int64)
    kind = architecture.removeprefix("BertFor")
    if kind == "MaskedLM":
        chosen = (draw(0, 3, (2, length)) == 0) & (mask == 1)
        inputs["targets"] = np.where(chosen, draw(2, VOCAB, (2, length)), -100)
    if kind == "SequenceClassification":
        inputs["targets"] = np.array([0, 0])
    if kind == "TokenClassification":
        inputs["targets"] = np.where(mask == 1, draw(0, 5, (2, length)), -100)
    if kind == "QuestionAnswering":
        inputs["targets"] = np.array([[3, 2], [9, 4]])  # firsts, lasts
    return inputs


def load(folder: pathlib.Path, architecture: str) -> torch.nn.Module:
    """Reads a folder with Transformers, which must find all of its tensors and no others."""
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    wrong = {name: value for name, value in info.items() if value}
    assert not wrong, (folder, wrong)
    return model.eval()


def forward(name: str, model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the loss."""
    t = {key: torch.tensor(value) for key, value in inputs.items()}
    arguments = {"input_ids": t["tokens"], "attention_mask": t["mask"]}
    if "token_types" in t:
        arguments["token_type_ids"] = t["token_types"]
    if name == "bert_span":
        arguments |= {"start_positions": t["targets"][0], "end_positions": t["targets"][1]}
    elif "targets" in t:
        arguments["labels"] = t["targets"].float() if name == "bert_regression" else t["targets"]
    outputs = model(**arguments)
    if name == "bert":
        return outputs.pooler_output, outputs.pooler_output.square().mean()
    if name == "minilm":
        mask = t["mask"][..., None]
        mean = (outputs.last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors = torch.nn.functional.normalize(mean)
        return vectors, vectors[0] @ vectors[1]
    if name == "bert_span":
        return torch.stack([outputs.start_logits, outputs.end_logits], -1), outputs.loss
    return outputs.logits, outputs.loss


def greedy(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """64 tokens after the first 7, or for the first source."""
    source = torch.tensor(inputs["tokens"][:1])
    is_t5 = model.config.is_encoder_decoder
    start = {"decoder_start_token_id": 0} if is_t5 else {}
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=64, pad_token_id=0, **start)
    prompt = source if is_t5 else source[:, :7]
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return ids[0, 1 if is_t5 else 7 :].numpy()


def make(name: str) -> None:
    """Writes one golden file."""
    architecture, fields, length, is_greedy = CASES[name]
    config = getattr(transformers, architecture).config_class(**fields)
    shapes = {key: tuple(p.shape) for key, p in getattr(transformers, architecture)(config).named_parameters()}
    config = config.to_dict() | {"architectures": [architecture]}
    if name == "t5_v1_1":  # Transformers 5 cannot make one, but it reads the files there are, which say it so
        shapes["lm_head.weight"] = shapes["shared.weight"]
        config["tie_word_embeddings"] = False
        del config["scale_decoder_outputs"]
    inputs = make_inputs(architecture, length)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(pathlib.Path(folder), config, shapes)
        model = load(pathlib.Path(folder), architecture)
    outputs, loss = forward(name, model, inputs)
    loss.backward()
    gradients = {key: p.grad.numpy().ravel() for key, p in sorted(model.named_parameters()) if p.grad is not None}
    arrays = inputs | {
        "config": json.dumps(config),
        "shapes": json.dumps(shapes),
        "outputs": outputs[:, -20:].detach().numpy() if outputs.ndim == 3 else outputs.detach().numpy(),
        "loss": loss.detach().numpy(),
        "gradient_names": json.dumps(list(gradients)),
        "gradients": np.concatenate([g[some_entries(key, g.size)] for key, g in gradients.items()]),
        "gradient_sizes": np.array([np.abs(g).max() for g in gradients.values()]),
    }
    if is_greedy:
        arrays["greedy"] = greedy(model, inputs)
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    print(f"{name}: loss {loss:.4f}, {(HERE / f'{name}.npz').stat().st_size:,} bytes")


def write_folder(folder: pathlib.Path, config: dict, shapes: dict) -> None:
    """config.json and model.safetensors."""
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(draw_weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})


def check(folders: pathlib.Path) -> None:
    """Compares Transformers on folders that gptjax has written with the golden outputs."""
    for name, (architecture, _, length, _) in CASES.items():
        model = load(folders / name, architecture)
        outputs, _ = forward(name, model, make_inputs(architecture, length))
        golden = np.load(HERE / f"{name}.npz")["outputs"]
        outputs = outputs[:, -20:] if outputs.ndim == 3 else outputs
        difference = np.abs(outputs.detach().numpy() - golden).max()
        print(f"{name}: largest difference {difference:.1e}")
        assert difference < 1e-5


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--only")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.check:
        check(arguments.check)
    else:
        for case in [arguments.only] if arguments.only else CASES:
            make(case)
