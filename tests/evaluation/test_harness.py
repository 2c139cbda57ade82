"""lm-eval's scores of local tasks, with our models in process, are our own."""

import json

import jax
import numpy as np
import pytest

from gptjax.data.chat import prompt_ids
from gptjax.data.tokenizers import build_tokenizer
from gptjax.evaluation.task_files import Task
from gptjax.evaluation.tasks import Settings, Subject, run_task
from gptjax.interop import huggingface
from gptjax.loading import load
from gptjax.models import init_params, make_model

lm_eval = pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
FACTS = {"config": {}, "generation_config": {}, "trained_here": False}
WORDS = ["red", "green", "blue", "a cat", "two dogs", "nothing at all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = build_tokenizer("byte", documents=lambda: iter(()), vocab_size=0)
    sizes = dict(vocab_size=tokenizer.vocab_size, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, embed_dim=16)
    model = make_model("gpt", **sizes, mlp_dim=32, max_seq_len=72)
    huggingface.write(folder / "model", model, init_params(model, jax.random.key(1), 4.0), tokenizer)
    rng = np.random.default_rng(0)
    choice = [
        {"context": f"question {i}:", "choices": [*rng.choice(WORDS, 3, replace=False)], "answer": int(rng.integers(3))}
        for i in range(12)
    ]
    text = [{"text": " ".join(rng.choice(WORDS, n))} for n in (1, 3, 40)]
    generate = [{"prompt": f"say {word}", "answer": word} for word in WORDS]
    output = {"choice": "multiple_choice", "text": "loglikelihood_rolling", "generate": "generate_until"}
    rules = {
        "choice": "doc_to_text: context\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]",
        "text": 'doc_to_text: ""\ndoc_to_target: text\nmetric_list: [{metric: bits_per_byte}]',
        "generate": "doc_to_text: prompt\ndoc_to_target: answer\nmetric_list: [{metric: exact_match}]\n"
        'generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 8, do_sample: false}',
    }
    for name, examples in {"choice": choice, "text": text, "generate": generate}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
        (folder / f"{name}.yaml").write_text(
            f"task: ours_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            f"test_split: test\noutput_type: {output[name]}\n{rules[name]}\n"
        )
    return folder, {"choice": choice, "text": text, "generate": generate}


def evaluate(folder, *names, model=None, **options):
    """With `model` as lm-eval names it, or ours in process."""
    from lm_eval.tasks import TaskManager

    from gptjax.evaluation.harness import HarnessLM

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"ours_{name}" for name in names]
    model = model or HarnessLM(folder / "model")
    return lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def test_scores_are_ours(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, examples = folder
    theirs = evaluate(folder, "choice", "text", "generate")
    subject = Subject(load(folder / "model"), FACTS)
    ours = {
        name: run_task(
            Task(name, kind, examples[name]), subject, Settings(stride=72, max_new_tokens=8, metrics=("f1",))
        )
        for name, kind in (("choice", "choice"), ("text", "perplexity"))
    }
    measured = ours["choice"].metrics["accuracy"]
    assert theirs["results"]["ours_choice"]["acc,none"] == pytest.approx(measured.value(measured.rows))
    for sample, our in zip(theirs["samples"]["ours_choice"], ours["choice"].samples, strict=True):
        logs = [response[0][0] for response in sample["resps"]]
        np.testing.assert_allclose(logs, our["log_likelihoods"], rtol=1e-6)
    measured = ours["text"].metrics["bits_per_byte"]
    assert theirs["results"]["ours_text"]["bits_per_byte,none"] == pytest.approx(
        measured.value(measured.rows), rel=1e-6
    )
    stopped = [{**e, "stop": ["e", "\n"]} for e in examples["generate"]]
    outputs = run_task(Task("t", "generate", stopped), subject, Settings(metrics=("f1",), max_new_tokens=8)).samples
    said = [sample["resps"][0][0] for sample in theirs["samples"]["ours_generate"]]
    assert said == [sample["output"] for sample in outputs] and len(set(said)) > 1


def test_chat_template(folder, monkeypatch):
    from gptjax.evaluation import harness

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, _ = folder
    seen = []
    generate = harness.generate
    monkeypatch.setattr(
        harness, "generate", lambda m, p, prompts, **o: seen.extend(prompts) or generate(m, p, prompts, **o)
    )
    evaluate(folder, "generate", apply_chat_template=True, system_instruction="Be brief.", limit=1)
    tokenizer = load(folder / "model").tokenizer
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say red"}]
    known = prompt_ids(tokenizer, messages)
    assert len(seen) == 1 and len(known) > 64 and list(seen[0]) == list(known[-64:])  # the context, less 8 to write
    assert tokenizer.eos_id in seen[0]  # the end of the user's turn, as a special token
    lm = harness.HarnessLM(folder / "model")
    text = lm.apply_chat_template([{"role": "user", "content": "<|endoftext|>"}])
    assert list(lm._context(text)).count(tokenizer.eos_id) == 1  # what the user wrote stays text
    with pytest.raises(ValueError, match="generation options"):
        lm.generate_until([type("Instance", (), {"args": ("a", {"num_beams": 3})})])
