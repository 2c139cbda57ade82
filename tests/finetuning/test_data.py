"""Conversations and records: whose tokens are whose, what each shape becomes, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers

from gptjax.data import chat
from gptjax.data.corpora import Record
from gptjax.data.examples import make_encoder
from gptjax.data.objectives import Objective
from gptjax.data.pipeline import eval_batches, prepare, train_batches
from gptjax.data.tokenizers import Tokenizer, build_tokenizer

SAID = [
    {"role": "user", "content": "Hi <|im_end|> there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
    {"role": "user", "content": "no one answers this"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes with ChatML's tokens, and a template that writes a beginning of its own."""
    inner = tokenizers.Tokenizer.from_str(build_tokenizer("byte", documents=lambda: iter(()), vocab_size=0).to_json())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template = "{{ eos_token }}" + chat.CHATML
    return Tokenizer(inner, {"eos": "<|endoftext|>"}, template)


def test_parts_are_the_speakers(tokenizer):
    parts = chat.conversation_ids(tokenizer, SAID)
    said = [tokenizer.decode(ids, skip_special_tokens=False) for ids, is_said in parts if is_said]
    assert said == ["Hello!<|im_end|>", "So long.<|im_end|>"]
    whole = "".join(tokenizer.decode(ids, skip_special_tokens=False) for ids, _ in parts)
    assert whole == (
        "<|endoftext|><|im_start|>user\nHi <|im_end|> there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long.<|im_end|>"
    )
    # What a user types is never a special token: four turns end, and the fifth end is text.
    ids = np.concatenate([ids for ids, _ in parts])
    assert (ids == tokenizer.special_id("<|im_end|>")).sum() == 4
    np.testing.assert_array_equal(parts[0][0], chat.prompt_ids(tokenizer, SAID[:1]))


def test_a_tokenizer_without_template_gets_chatml():
    bare = build_tokenizer("byte", documents=lambda: iter(()), vocab_size=0)
    (_, (ids, is_said)) = chat.conversation_ids(bare, SAID[:2])
    assert is_said and ids[-1] == bare.eos_id and bare.decode(ids) == "Hello!"
    assert bare.chat_template and "im_start" in bare.chat_template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content", "chat template fails: TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "chat template fails: TemplateError: roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "chat template fails: SecurityError"),
        ("{{ messages|length }}", "differently once the conversation goes on"),
    ],
)
def test_templates_that_fail(template, message):
    bare = build_tokenizer("byte", documents=lambda: iter(()), vocab_size=0)
    bare.chat_template = template
    with pytest.raises(ValueError, match=message):
        chat.conversation_ids(bare, SAID)


RECORDS = {
    "sft": [
        {"messages": SAID},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"instruction": "Greet", "input": "", "output": "Hello!"},
        {"prompt": "Say: ", "completion": "Hello!"},
    ],
    "dpo": [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {"conversations": [{"from": "human", "value": "Hi"}]}
        | {"chosen": {"from": "gpt", "value": "Hello!"}, "rejected": {"from": "gpt", "value": "No."}},
        {"chosen": [*SAID[:1], SAID[1]], "rejected": [*SAID[:1], {"role": "assistant", "content": "No."}]},
    ],
    "classification": [{"text": "fine", "label": "1"}, {"sentence": "fine", "text_pair": "bad", "label": 1}],
    "question_answering": [
        {"question": "who?", "context": "it was me", "answers": [{"text": "me", "answer_start": 7}]},
        {"question": "who?", "context": "it was me", "answers": {"text": ["me"], "answer_start": [7]}},
    ],
}


@pytest.mark.parametrize("objective", RECORDS)
def test_every_shape_asks_for_the_same(tokenizer, objective):
    encode = make_encoder(objective, tokenizer, 500)
    for fields in RECORDS[objective]:
        (group,) = encode(Record("here", fields))
        inputs, targets, other = group[0]
        if objective in ("sft", "dpo"):
            predicted = tokenizer.decode(targets[other > 0])
            assert predicted == ("Hello!So long." if fields.get("messages") else "Hello!")
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            assert [tokenizer.decode(t[mask > 0]) for _, t, mask in group[1:]] == ["No."] * (objective == "dpo")
        elif objective == "classification":
            assert targets[0] == 1
        else:
            assert tokenizer.decode(inputs[targets[0] : targets[1] + 1]) == "me"


def test_a_long_context_is_cut_and_the_answer_is_in_one_window_or_more(tokenizer):
    context = "word " * 100 + "needle" + " word" * 20
    fields = {"question": "?", "context": context, "answers": [{"text": "needle", "answer_start": 500}]}
    groups = make_encoder("question_answering", tokenizer, 256)(Record("here", fields))
    found = [tokenizer.decode(x[t[0] : t[1] + 1]) for ((x, t, _),) in groups if t[1]]
    assert len(groups) > 2 and set(found) == {"needle"} and len(found) < len(groups)


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("sft", {"messages": SAID[:1]}, "no assistant turn"),
        ("sft", {"messages": [SAID[0], {"role": "assistant", "content": " "}]}, "turn 2 is empty"),
        ("sft", {"prompt": "a", "completion": " "}, "the completion is empty"),
        ("sft", {"text": "a"}, r"its fields are \['text'\], and not messages"),
        ("sft", {"messages": [{"role": "user"}]}, "malformed"),
        ("classification", {"text": "a", "label": "good"}, "label 'good' is not a whole number from 0"),
        ("classification", {"text": "a", "label": -1}, "label -1 is not a whole number"),
        ("question_answering", {"question": "a", "context": "b", "answers": [{"text": "c", "answer_start": 0}]}, "'c'"),
    ],
)
def test_bad_records_name_where_they_stand(tokenizer, objective, fields, message):
    with pytest.raises(ValueError, match=f"data.objective '{objective}': file line 3: .*{message}"):
        make_encoder(objective, tokenizer, 100)(Record("file line 3", fields))


def prepared(folder, records, objective="sft", suffix="jsonl", **changes):
    file = folder / f"records.{suffix}"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) if suffix == "jsonl" else records)
    arguments = {"corpus": suffix, "files": str(file), "text_field": "text", "tokenizer": "byte", "vocab_size": 0}
    arguments |= {"validation_fraction": 0.3, "seq_len": 64, "cache_dir": folder / "cache"}
    return prepare(**arguments | changes, objective=Objective(objective))


def test_nothing_leaks_between_the_examples_of_a_row(tmp_path):
    """Each whole example is one segment, and all of them come back."""
    records = [{"prompt": f"{i} ", "completion": "x" * (5 + i % 20)} for i in range(40)]
    data = prepared(tmp_path, records)
    found = []
    for split in ("train", "validation"):
        for batch in eval_batches(data, split, batch_size=1):
            for number in range(1, 1 + batch["segment_ids"].max()):
                here = batch["segment_ids"][0] == number
                assert (batch["positions"][0][here] == np.arange(here.sum())).all()
                mask = batch["loss_weights"][0][here] > 0
                prompt, said = batch["inputs"][0][here][: mask.argmax() + 1], batch["targets"][0][here][mask]
                assert said[-1] == data.tokenizer.eos_id
                found.append({"prompt": data.tokenizer.decode(prompt), "completion": data.tokenizer.decode(said)})
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, records))


@pytest.mark.parametrize("objective", ["sft", "dpo", "classification"])
def test_what_is_too_long_is_counted_and_the_policy_kept(tmp_path, capsys, objective):
    pair = {"chosen": "y", "rejected": "n"}
    records = [{"text": "a" * n, "label": 0, "prompt": "a" * 8, "completion": "b" * n} for n in (5, 9, 13, 300, 500)]
    records = [r | pair if objective == "dpo" else r for r in records]
    for r, n in zip(records, (1, 2, 3, 300, 500), strict=True):
        r["prompt"] = "a" * n if objective == "dpo" else r["prompt"]
    seq_len = 160 if objective == "dpo" else 64
    with pytest.raises(
        ValueError, match=f"2 of 5 examples do not fit in a row of {seq_len} tokens.*'drop'.*'truncate'"
    ):
        prepared(tmp_path, records, objective, seq_len=seq_len, too_long="error")
    sizes = {}
    for policy in ("drop", "truncate"):
        data = prepared(tmp_path, records, objective, seq_len=seq_len, too_long=policy)
        assert f"too long (data.too_long={policy!r})" in capsys.readouterr().err
        sizes[policy] = sum(data.num_tokens.values())
    # An answer that is cut off whole has nothing to teach.
    assert sizes["drop"] == sizes["truncate"] if objective == "dpo" else sizes["drop"] < sizes["truncate"]
    if objective == "classification":
        for batch in eval_batches(data, "train", batch_size=1):
            assert batch["inputs"][0][batch["segment_ids"][0] > 0][-1] == data.tokenizer.eos_id


def test_tables_arrays_and_lines(tmp_path):
    """The same pairs from every kind of file, also compressed; a table of text and number needs no names."""
    import gzip

    from gptjax.data.corpora import open_corpus

    rows = [("one, two", "1"), ("three", "0"), ('four "five"', "1")]
    files = {
        "jsonl": "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows),
        "json": json.dumps([{"text": text, "label": label} for text, label in rows]),
        "csv": 'text,label\n"one, two",1\nthree,0\n"four ""five""",1\n',
        "tsv": "".join(f"{text}\t{label}\n" for text, label in rows),
    }
    for kind, content in files.items():
        (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress(content.encode()))
        corpus = open_corpus(kind, files=str(tmp_path / f"a.{kind}.gz"), as_records=True, cache_dir=tmp_path)
        records = [record.fields for split in corpus.splits.values() for record in split()]
        assert sorted((r["text"], r["label"]) for r in records) == sorted(rows)
    for name, column in (("en", 0), ("de", 1)):
        (tmp_path / name).write_text("".join(row[column] + "\n" for row in rows))
    lines = {"files": f"{tmp_path}/en,{tmp_path}/de", "text_field": "source", "target_field": "target"}
    corpus = open_corpus("lines", **lines, validation_files=lines["files"], cache_dir=tmp_path)
    assert list(corpus.splits["train"]()) == list(corpus.splits["validation"]()) == rows
    (tmp_path / "de").write_text("1\n")
    with pytest.raises(ValueError, match="unequal numbers of lines"):
        list(open_corpus("lines", **lines, cache_dir=tmp_path).splits["train"]())


def test_the_questions_of_an_article_stay_together(tmp_path):
    articles = [
        {"title": f"article {a}", "paragraphs": [{"context": f"it was {a}", "qas": [
            {"id": f"{a}-{q}", "question": f"{q}?", "answers": [{"text": "was", "answer_start": 3}]} for q in range(4)
        ]}]} for a in range(12)
    ]  # fmt: skip
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "1", "data": articles}))
    arguments = {"corpus": "json", "files": str(file), "text_field": "", "tokenizer": "byte", "vocab_size": 0}
    arguments |= {"validation_fraction": 0.3, "seq_len": 64, "cache_dir": tmp_path / "cache"}
    data = prepare(**arguments, objective=Objective("question_answering"))
    of_split = []
    for split in ("train", "validation"):
        batches = list(eval_batches(data, split, batch_size=1))
        assert all(
            data.tokenizer.decode(b["inputs"][0][b["targets"][0][0] : b["targets"][0][1] + 1]) == "was" for b in batches
        )
        texts = (data.tokenizer.decode(b["inputs"][0][b["segment_ids"][0] > 0]) for b in batches)
        of_split.append({text.split("it was ")[1] for text in texts})
    assert not of_split[0] & of_split[1] and len(of_split[0] | of_split[1]) == 12


def test_columns_follow_their_rows(tmp_path):
    """What is added to rows, such as a reference's scores, comes with its row in every epoch."""
    data = prepared(tmp_path, [{"prompt": f"{i}", "completion": "x" * 40} for i in range(12)])
    first = {s: [b["inputs"][0, 0] for b in eval_batches(data, s, batch_size=1)] for s in data.num_rows}
    columns = {s: {"first": np.array(values, np.float32)[:, None]} for s, values in first.items()}
    batches = train_batches(data._replace(columns=columns), batch_size=2, seed=0)
    for _ in range(20):
        batch = next(batches)
        np.testing.assert_array_equal(batch["first"][:, 0], batch["inputs"][:, 0])
    batches.close()
