"""Fine-tuning through the command: it goes on exactly, needs its start once, and refuses bad input in one line."""

import json
import shutil

import numpy as np
import pytest

import gptjax
from experiments import cli, evaluate, preview_data, train
from gptjax import workdir
from gptjax.data.objectives import loss_unit
from tests.runs import assert_same_run

SMALL = {
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.embed_dim": 16,
    "model.max_seq_len": 192,
    "train.num_train_steps": 6,
    "train.batch_size": 4,
    "train.log_every_steps": 1,
    "eval.every_steps": 0,
    "eval.num_samples": 1,
    "eval.sample_tokens": 4,
    "checkpoint.every_steps": 2,
    "optimizer.warmup_steps": 1,
    "train.ema_decay": 0.5,
}
TUNED = {name: value for name, value in SMALL.items() if not name.startswith("model.")} | {"data.seq_len": 64}


def arguments(folder, changes):
    overrides = [f"--config.{name}={value}" for name, value in changes.items()]
    return ["--config", "configs/default.py", "--workdir", str(folder), *overrides]


def trained(folder, changes):
    """The exit code of the command, run here."""
    return cli.exit_code(lambda: train.main(arguments(folder, changes)))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"data.corpus": "jsonl", "data.files": path, "data.validation_fraction": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetuning")


@pytest.fixture(scope="module")
def base(folder):
    """A tiny model of bytes, pretrained for six steps."""
    texts = write(folder / "texts.jsonl", [{"text": f"some words {i} " * 9} for i in range(30)])
    assert trained(folder / "base", SMALL | texts | {"data.tokenizer": "byte"}) == 0
    return folder / "base"


@pytest.fixture(scope="module")
def pairs(folder):
    records = [
        {"prompt": f"{i}?", "completion": "yes" * (i % 4 + 1), "chosen": "yes", "rejected": "no"} for i in range(30)
    ]
    return write(folder / "pairs.jsonl", records)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_fine_tune_goes_on_exactly_without_what_it_began_with(folder, base, pairs, capsys, objective):
    start = folder / f"start-{objective}"
    shutil.copytree(base, start)
    own = {"data.objective": objective, "init.model": start, "lora.rank": 2, "lora.dropout": 0.1}
    own |= {"data.seq_len": 192 if objective == "dpo" else 64}
    if objective == "dpo":
        own |= {"lora.rank": 0, "optimizer.factors": '(("embedding$", 0), ("norm", 2.0))'}
    tuned = TUNED | pairs | own
    whole, stopped = folder / f"{objective}-whole", folder / f"{objective}-stopped"
    assert trained(whole, tuned) == 0
    taken = len(list(_leaves(gptjax.load(start).params)))
    assert f"{taken} arrays from {start}" in capsys.readouterr().err
    assert trained(stopped, tuned | {"train.max_minutes": 1e-4}) == 143
    shutil.rmtree(start)
    assert trained(stopped, tuned) == 0
    assert "resuming from step" in capsys.readouterr().err
    assert_same_run(whole, stopped, least=5)
    begun, first = (json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()[:2])
    assert (begun["step"], first["step"]) == (0, 1)
    # What is loaded is whole, and what was frozen is as it was.
    model, params, _ = gptjax.load(whole)
    before = gptjax.load(base).params
    assert {p: x.shape for p, x in _leaves(params)} == {p: x.shape for p, x in _leaves(before)}
    for (path, x), (_, y) in zip(_leaves(params), _leaves(before), strict=True):
        is_frozen = "embedding" in path or (objective == "sft" and "kernel" not in path)
        assert (np.asarray(x) == np.asarray(y)).all() == is_frozen, path
    if objective == "sft":
        apart = workdir.read(whole, merged=False)
        tokens = np.arange(8)[None]
        outputs = [model.apply({"params": p}, tokens) for p in (params, apart.params)]
        np.testing.assert_allclose(*outputs, atol=1e-5)
        # Checkpoints hold the adapter alone.
        sizes = [sum(f.stat().st_size for f in (whole / "checkpoints" / n).rglob("*")) for n in ("6/params", "frozen")]
        assert sizes[0] < sizes[1]
    else:
        for line, split in ((begun, "eval"), (first, "train")):
            assert line[f"{split}/loss"] == pytest.approx(np.log(2), rel=1e-5)
            assert line[f"{split}/margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("objective", ["classification", "question_answering"])
def test_what_is_said_of_held_out_texts_is_what_training_saw(folder, base, capsys, objective):
    """`evaluate` reads a text at a time and training packs several a row: the same labels come of it; no perplexity."""
    if objective == "classification":
        records = [{"text": "so " * (i % 5) + "very" * (i % 3), "label": i % 2, "id": i} for i in range(60)]
        own = {"model.head": "sequence_classification", "model.pooling": "last"}
    else:
        answer = [{"text": "red", "answer_start": 7}]
        records = [{"question": f"{i}?", "context": f"it was red {i}", "answers": answer} for i in range(60)]
        own = {"model.head": "span"}
    data = write(folder / f"{objective}.jsonl", records)
    run = folder / objective
    assert trained(run, TUNED | data | own | {"data.objective": objective, "init.model": base}) == 0
    said = capsys.readouterr().out
    assert f"nats a {loss_unit(objective)}" in said and f"% of {loss_unit(objective)}s right" in said
    assert evaluate.main(["--model", str(run), "--json", str(run / "report.json")]) == 0
    assert "perplexity" not in capsys.readouterr().out
    metrics = json.loads((run / "report.json").read_text())["metrics"]
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    if objective == "classification":
        assert metrics["validation/accuracy"] == pytest.approx(final["eval/accuracy"])
    else:
        assert metrics["validation/exact_match"] <= metrics["validation/f1"] <= 100
    given = ["--model", str(run), "--seq_len", "32"]
    assert cli.exit_code(lambda: evaluate.main(given)) == 2 and "--seq_len has no use" in capsys.readouterr().err


def _leaves(tree, path=""):
    for name, value in sorted(tree.items()):
        yield from _leaves(value, f"{path}/{name}") if isinstance(value, dict) else [(f"{path}/{name}", value)]


def refused(folder, changes):
    """The line that the command says before anything is compiled."""
    with pytest.raises(cli.UserError) as error:
        train.main(arguments(folder / "refused", TUNED | changes))
    assert not (folder / "refused" / "checkpoints").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("objective", "records", "more", "words"),
    [
        (
            "sft",
            [{"messages": [{"role": "user", "content": "a"}]}],
            {},
            "line 1: the conversation has no assistant turn",
        ),
        ("sft", [{"prompt": "a", "completion": ""}], {}, "line 1: the completion is empty"),
        ("sft", [{"prompt": "a", "completion": "b" * 99}] * 3, {}, "3 of 3 examples do not fit in a row of 64 tokens"),
        ("sft", [{"text": "a"}], {}, "its fields are ['id', 'text'], and not messages"),
        ("sft", [{"prompt": "a", "completion": "b"}], {"optimizer.factors": '(("blcks", 0),)'}, "'blcks' finds none"),
        ("sft", [{"prompt": "a", "completion": "b"}], {"optimizer.factors": '(("", 0),)'}, "freezes every parameter"),
        ("sft", [{"prompt": "a", "completion": "b"}], {"optimizer.factors": "((1,),)"}, "must be pairs of a regex"),
        ("sft", [{"prompt": "a", "completion": "b"}], {"optimizer.decayed": "("}, "is not a regex"),
        ("sft", [{"prompt": "a", "completion": "b"}], {"model.num_layers": 7}, "config.model.num_layers=7 is not what"),
        (
            "sft",
            [{"prompt": "a", "completion": "b"}],
            {"model.head": "none"},
            "needs config.model.head='language_model'",
        ),
        ("sft", [{"prompt": "a", "completion": "b"}], {"data.seq_len": 200}, "more than the 192 learned positions"),
        ("sft", [{"prompt": "a", "completion": "b"}], {"init.model": "/no/such"}, "no such model: '/no/such'"),
        (
            "sft",
            [{"prompt": "a", "completion": "b"}],
            {"lora.rank": 2, "lora.projections": "q_proj"},
            "lora.projections",
        ),
        (
            "classification",
            [{"text": f"{i}", "label": i % 3} for i in range(9)],
            {"model.head": "sequence_classification", "model.pooling": "last"},
            "label 2 is out of range: config.model.num_labels=2",
        ),
    ],
)
def test_bad_input_is_one_line(folder, base, objective, records, more, words):
    different = [r | {"id": i} for i, r in enumerate(records * (9 if len(records) == 1 else 1))]
    data = write(folder / "bad.jsonl", different)
    line = refused(folder, data | {"data.objective": objective, "init.model": base} | more)
    assert words in line and "\n" not in line


def test_a_template_that_fails_is_one_line(folder, base):
    broken = folder / "broken"
    shutil.copytree(base, broken)
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ undefined.field }}"}))
    records = [{"instruction": f"a {i}", "output": "b"} for i in range(9)]
    data = write(folder / "chat.jsonl", records)
    line = refused(folder, data | {"data.objective": "sft", "init.model": broken})
    assert "chat.jsonl line" in line and "chat template fails" in line


def test_preview_shows_the_mask_and_the_lengths(base, pairs, capsys):
    changes = pairs | {"data.objective": "sft", "init.model": base}
    given = [f"--config.{name}={value}" for name, value in changes.items()]
    assert preview_data.main(["--config", "configs/default.py", *given, "--num_examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- example") == 2 and "\u27e6yes" in shown
    assert "tokens an example: mean" in shown and "of tokens are predicted; rows are" in shown


@pytest.mark.parametrize("name", ["sst2_minilm", "xquad_minilm", "smollm2_chat_lora", "smollm2_dpo"])
def test_configs_that_start_from_a_model_leave_its_fields_alone(base, name):
    """They take those of any model that has their head's family; the rest is checked."""
    from experiments import build

    config = cli.load_config(f"configs/{name}.py", [("init.model", str(base))])
    build.check(config)
    model = json.loads((base / "model.json").read_text()) | {"max_seq_len": 2048}
    if config.model.head == "sequence_classification":
        model["family"] = "bert"
    assert build.with_model(config, model).model.embed_dim == 16
