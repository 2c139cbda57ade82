"""The one-line tasks compute what the models say, written out here without batches, padding or windows of their own."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import loading, pipeline, pipelines
from gptjax.data import examples
from gptjax.data.tokenizers import Tokenizer, build_tokenizer
from gptjax.generation.engine import Engine
from gptjax.models import init_params, make_model
from gptjax.pipelines import reading

WORDS = ["the", "a", "cat", "dog", "fox", "sat", "ran", "on", "over", "mat", "hill", "big", "red", "where", "who", "is"]
MORE = ["?", ".", "##s", "##ing", "jump"]
SIZES = dict(num_heads=2, num_kv_heads=2, head_dim=8, embed_dim=16, mlp_dim=32, max_seq_len=64)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordpiece")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *MORE]) + "\n")
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def bpe():
    text = "The quick brown fox jumps over the lazy dog. " * 20
    return build_tokenizer("bpe", documents=lambda: iter([text]), vocab_size=300)


def loaded(family, tokenizer, **arguments):
    """A model with large random parameters, so that its choices are clear."""
    if family == "encoder_decoder":
        arguments["num_encoder_layers"] = 1
    model = make_model(family, vocab_size=tokenizer.vocab_size, num_layers=1, **SIZES, **arguments)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), shapes)
    return model, params, tokenizer


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def forward(model, params, *inputs, **named):
    return model.apply({"params": params}, *inputs, **named)


def apply(source, ids, token_types=None):
    """The model on one text as it is."""
    model, params, _ = source
    types = {"token_types": jnp.array([token_types])} if model.config.token_types else {}
    return np.asarray(forward(model, params, jnp.array([ids]), **types))[0]


def softmax(x, axis=-1):
    return np.asarray(jax.nn.softmax(x, axis=axis))


def greedy(source, ids, num_new, **inputs):
    """The likeliest next token, again and again, each time on the whole text; what follows it changes nothing."""
    model, params, tokenizer = source
    text = [*ids]
    for _ in range(num_new):
        padded = np.zeros((1, model.config.max_seq_len), np.int32)
        padded[0, : len(text)] = text
        text.append(int(forward(model, params, padded, **inputs)[0, len(text) - 1].argmax()))
        if text[-1] == tokenizer.eos_id:
            return text[len(ids) : -1]
    return text[len(ids) :]


def with_files(source, monkeypatch, tmp_path, **files):
    """A folder that holds `files`, and loads as `source`."""
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(loading, "load", lambda path: source)
    return tmp_path


class TestTextGeneration:
    @pytest.fixture(scope="class")
    @staticmethod
    def source(bpe):
        return loaded("gpt", bpe)

    def test_greedy_text_and_its_length(self, source):
        tokenizer, prompt = source[2], "The quick"
        num_prompt = len(tokenizer.encode(prompt))
        new = tokenizer.decode(greedy(source, tokenizer.encode(prompt), 6))
        generator = pipeline("text-generation", model=source, do_sample=False)
        assert generator(prompt, max_new_tokens=6) == [{"generated_text": prompt + new}]
        assert generator(prompt, max_length=6 + num_prompt) == [{"generated_text": prompt + new}]
        assert generator(prompt, max_new_tokens=6, return_full_text=False) == [{"generated_text": new}]

    def test_several_prompts_keep_their_own_max_length(self, source):
        tokenizer, prompts = source[2], ["The quick brown fox", "dog"]
        expected = [
            p + tokenizer.decode(greedy(source, tokenizer.encode(p), 12 - len(tokenizer.encode(p)))) for p in prompts
        ]
        results = pipeline("text-generation", model=source)(prompts, do_sample=False, max_length=12)
        assert results == [[{"generated_text": text}] for text in expected]

    def test_samples_differ_and_a_seed_repeats_them(self, source):
        generator = pipeline("text-generation", model=source, max_new_tokens=8, temperature=2.0)
        first = generator("The", num_return_sequences=3, seed=1)
        assert len({r["generated_text"] for r in first}) == 3
        assert generator("The", num_return_sequences=3, seed=1) == first
        assert generator("The", num_return_sequences=3) != generator("The", num_return_sequences=3)

    @pytest.mark.parametrize("trims", [False, True])
    def test_chats_are_answered_and_an_answer_is_gone_on_with(self, source, monkeypatch, trims):
        """Messages come back as Transformers 5 gives them, after the ids that the template says, written out here."""
        tokenizer, content = source[2], "message['content']" + " | trim" * trims
        template = "{% for message in messages %}{{ message['role'] + ': ' + CONTENT + '|' }}{% endfor %}"
        template += "{% if add_generation_prompt %}assistant:{% endif %}"
        monkeypatch.setattr(tokenizer, "chat_template", template.replace("CONTENT", content))
        chat = [{"role": "user", "content": "The fox "}, {"role": "assistant", "content": "jumps "}]
        opening = "user: The fox|" if trims else "user: The fox |"
        generator = pipeline("text-generation", model=source, do_sample=False, max_new_tokens=5)
        answer, rest = (
            tokenizer.decode(greedy(source, tokenizer.encode(opening + end), 5))
            for end in ("assistant:", "assistant: jumps" if trims else "assistant: jumps ")
        )
        asked, gone_on = chat[:1], [chat[0], {"role": "assistant", "content": "jumps " + rest}]
        answered = [chat[0], {"role": "assistant", "content": answer}]
        assert generator(asked) == [{"generated_text": answered}]
        assert generator(asked, return_full_text=False) == [{"generated_text": answer}]
        assert generator([asked, chat]) == [[{"generated_text": answered}], [{"generated_text": gone_on}]]
        assert len(chat[1]["content"]) == len("jumps ")  # the caller's messages are as they were

    def test_a_chat_needs_a_template_and_messages(self, source, monkeypatch):
        generator = pipeline("text-generation", model=source)
        chat = [{"role": "user", "content": "The"}]
        with pytest.raises(ValueError, match="no chat template"):
            generator(chat)
        monkeypatch.setattr(source[2], "chat_template", "{{ messages[0]['role'] }}")
        for bad in ([{"role": "user"}], [*chat, "The"], [chat, "The", 3], [chat, []]):
            with pytest.raises(ValueError, match="is no message"):
                generator(bad)
        with pytest.raises(ValueError, match="leaves out the message"):
            generator([{"role": "assistant", "content": "The"}])

    def test_an_empty_prompt_opens_with_the_end_of_text(self, source):
        new = source[2].decode(greedy(source, [source[2].eos_id], 5))
        result = pipeline("text-generation", model=source)("", do_sample=False, max_new_tokens=5)
        assert result == [{"generated_text": new}]

    def test_defaults_come_from_the_files(self, source, monkeypatch, tmp_path):
        asked = {}

        def generate(engine, prompts, **arguments):
            asked.update(arguments)
            return [np.zeros(0, np.int32)] * (len(prompts) * arguments["num_samples"])

        monkeypatch.setattr(Engine, "generate", generate)
        num_prompt = len(source[2].encode("The"))

        def ask(files, **call):
            folder = with_files(source, monkeypatch, tmp_path, **files)
            pipeline("text-generation", model=folder)("The", **call)
            s = asked["sampling"]
            return s.temperature, s.top_k, s.top_p, asked["max_new_tokens"], asked["eos_ids"]

        eos = [source[2].eos_id]
        nothing = {"config": {}, "generation_config": {}}
        gpt2 = {"config": {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}}
        chat = {"generation_config": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [1, 2]}}
        assert ask(nothing) == (0.7, 50, 1.0, 256, eos)
        assert ask(gpt2) == (0.7, 50, 1.0, 50 - num_prompt, eos)
        assert ask(gpt2, max_new_tokens=9, top_k=3) == (0.7, 3, 1.0, 9, eos)
        assert ask(nothing | chat, max_length=20) == (0.6, 50, 0.9, 20 - num_prompt, [1, 2])
        assert ask(nothing | {"generation_config": {"max_new_tokens": 7}}, max_length=20)[3] == 20 - num_prompt
        assert ask(nothing | {"generation_config": {"do_sample": False, "temperature": 0.6}})[0] == 0

    def test_what_files_ask_for_in_vain_is_said(self, source, monkeypatch, tmp_path):
        folder = with_files(source, monkeypatch, tmp_path, generation_config={"num_beams": 4})
        with pytest.warns(UserWarning, match="num_beams=4"):
            pipeline("text-generation", model=folder)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"max_length": 2}, "max_length 2 leaves nothing to write"),
            ({"do_sample": False, "num_return_sequences": 2}, "num_return_sequences 2 needs do_sample=True"),
            ({"temperature": 0.0}, "temperature 0.0 must be above 0; do_sample=False is greedy"),
            ({"top_q": 1}, "unknown argument 'top_q'; known are max_new_tokens"),
            ({"top_p": 1.5}, "top_p 1.5 must be"),
        ],
    )
    def test_bad_arguments(self, source, arguments, words):
        with pytest.raises(ValueError, match=words):
            pipeline("text-generation", model=source)("The quick brown", **arguments)

    def test_bad_inputs(self, source):
        generator = pipeline("text-generation", model=source)
        with pytest.raises(ValueError, match=r"inputs must be a text or a list of texts, not 3"):
            generator(3)
        with pytest.raises(ValueError, match="the model's context holds 1 to 64"):
            generator("The quick brown fox. " * 40)
        with pytest.warns(UserWarning, match="top_k has no use without do_sample=True"):
            generator("The", do_sample=False, top_k=5, max_new_tokens=1)


class TestText2Text:
    @pytest.fixture(scope="class")
    @staticmethod
    def source(bpe):
        return loaded("encoder_decoder", bpe)

    def expected(self, source, text, num_new):
        tokenizer = source[2]
        encoder_tokens = jnp.array([[*tokenizer.encode(text), tokenizer.eos_id]])
        return tokenizer.decode(greedy(source, [tokenizer.eos_id], num_new, encoder_tokens=encoder_tokens))

    def test_greedy_targets(self, source):
        writer = pipeline("text2text-generation", model=source, max_new_tokens=5)
        texts = ["The lazy dog", "fox"]
        expected = [{"generated_text": self.expected(source, text, 5)} for text in texts]
        assert writer(texts[0]) == expected[:1]
        assert writer(texts) == expected
        assert writer(texts, max_length=6, max_new_tokens=None) == expected
        sampled = writer(texts, do_sample=True, num_return_sequences=2)
        assert [len(samples) for samples in sampled] == [2, 2]

    def test_translation_takes_its_prefix_from_the_files(self, source, monkeypatch, tmp_path):
        tasks = {"translation_en_to_de": {"prefix": "over the ", "max_length": 6}, "translation_en_to_fr": {}}
        folder = with_files(source, monkeypatch, tmp_path, config={"task_specific_params": tasks})
        expected = [{"translation_text": self.expected(source, "over the dog", 5)}]
        assert pipeline("translation_en_to_de", model=folder)("dog") == expected
        assert pipeline("translation", model=folder, src_lang="en", tgt_lang="de")("dog") == expected
        with pytest.raises(
            ValueError, match=r"'translation' is not one of .*: translation_en_to_de, translation_en_to"
        ):
            pipeline("translation", model=folder)("dog")

    def test_the_files_choose_how_a_target_begins(self, source, monkeypatch, tmp_path):
        folder = with_files(source, monkeypatch, tmp_path, config={"decoder_start_token_id": 7})
        tokenizer = source[2]
        encoder_tokens = jnp.array([[*tokenizer.encode("dog"), tokenizer.eos_id]])
        expected = tokenizer.decode(greedy(source, [7], 4, encoder_tokens=encoder_tokens))
        assert pipeline("text2text-generation", model=folder)("dog", max_new_tokens=4) == [{"generated_text": expected}]


class TestTextClassification:
    TEXTS = ("the cat sat", "who ran over the hill ?", "a big red dog jumping on the mat. a fox")

    @pytest.fixture(scope="class")
    @staticmethod
    def source(wordpiece):
        return loaded("bert", wordpiece, head="sequence_classification", num_labels=3, token_types=2, pooler=True)

    def test_labels_and_their_probabilities(self, source, monkeypatch, tmp_path):
        names = ["bad", "so-so", "good"]
        folder = with_files(source, monkeypatch, tmp_path, config={"id2label": dict(enumerate(names))})
        classifier = pipeline("text-classification", model=folder)
        expected = []
        for text in self.TEXTS:
            scores = softmax(apply(source, *source[2].encode_with_specials(text)[:2]))
            order = np.argsort(-scores)
            expected.append([{"label": names[i], "score": pytest.approx(scores[i], abs=1e-6)} for i in order])
        assert classifier(list(self.TEXTS)) == [labels[0] for labels in expected]
        assert classifier(self.TEXTS[0]) == [expected[0][0]]
        assert classifier(list(self.TEXTS), top_k=None) == expected
        assert classifier(self.TEXTS[1], top_k=2) == expected[1][:2]
        assert pipeline("text-classification", model=folder, top_k=None)(self.TEXTS[1]) == [expected[1]]

    def test_pairs_and_unnamed_labels(self, source):
        scores = softmax(apply(source, *source[2].encode_with_specials("the cat", "a dog")[:2]))
        expected = {"label": f"LABEL_{scores.argmax()}", "score": pytest.approx(scores.max(), abs=1e-6)}
        pair = {"text": "the cat", "text_pair": "a dog"}
        assert pipeline("text-classification", model=source)(pair) == expected
        assert pipeline("text-classification", model=source)([pair, pair]) == [expected, expected]

    def test_regression_is_left_as_it_is(self, wordpiece):
        source = loaded("bert", wordpiece, head="sequence_classification", num_labels=1)
        value = apply(source, wordpiece.encode_with_specials("the cat").ids)[0]
        regression = pipeline("text-classification", model=source)
        assert regression("the cat") == [{"label": "LABEL_0", "score": pytest.approx(value, abs=1e-5)}]
        as_label = regression("the cat", function_to_apply="sigmoid")
        assert as_label[0]["score"] == pytest.approx(1 / (1 + np.exp(-value)), abs=1e-6)
        with pytest.raises(ValueError, match="function_to_apply 'tanh' is not one of softmax, sigmoid, none"):
            regression("the cat", function_to_apply="tanh")

    def test_few_shapes_are_compiled(self, source):
        classifier = pipeline("text-classification", model=source)
        classifier(["the cat"] * 3)
        compiled = reading._apply._cache_size()
        for num_words in range(1, 14):
            classifier(["the " * num_words, "a", "a dog"])
            classifier(["the " * num_words] * 4)
        assert reading._apply._cache_size() == compiled

    def test_a_text_beyond_the_context_is_an_error(self, source):
        with pytest.raises(ValueError, match="the input has 102 tokens; the model's context holds 1 to 64"):
            pipeline("text-classification", model=source)("the " * 100)


class TestFillMask:
    @pytest.fixture(scope="class")
    @staticmethod
    def source(wordpiece):
        return loaded("bert", wordpiece, head="masked_lm")

    def test_one_mask(self, source):
        tokenizer = source[2]
        ids = [2, 5, 4, 10, 3]  # [CLS] the [MASK] sat [SEP]
        scores = softmax(apply(source, ids))[2]
        results = pipeline("fill-mask", model=source)("The [MASK] sat")
        assert [r["token"] for r in results] == np.argsort(-scores)[:5].tolist()
        for result in results:
            assert result["score"] == pytest.approx(scores[result["token"]], abs=1e-6)
            token = tokenizer.decode([result["token"]], skip_special_tokens=False)
            assert result["token_str"] == token
            assert result["sequence"] == tokenizer.decode([5, result["token"], 10])
        assert pipeline("fill-mask", model=source, top_k=2)(["The [MASK] sat"] * 2) == [results[:2]] * 2

    def test_several_masks_keep_each_other(self, source):
        scores = softmax(apply(source, [2, 4, 7, 4, 3]))
        results = pipeline("fill-mask", model=source, top_k=1)("[MASK] cat [MASK]")
        assert [r["token"] for (r,) in results] == [scores[1].argmax(), scores[3].argmax()]
        assert results[0][0]["sequence"].endswith("cat [MASK] [SEP]")

    def test_in_byte_level_text_the_space_is_hidden_with_the_word(self):
        tokenizer = build_tokenizer(
            "bpe", documents=lambda: iter(["a quick a fox " * 50]), vocab_size=280, special_tokens=("<|mask|>",)
        )
        source = loaded("bert", tokenizer, head="masked_lm")
        ids = [tokenizer.eos_id, *tokenizer.encode("a quick"), tokenizer.mask_id, *tokenizer.encode(" fox")]
        place = ids.index(tokenizer.mask_id)
        scores = softmax(apply(source, ids))[place]
        (result,) = pipeline("fill-mask", model=source, top_k=1)("a quick <|mask|> fox")
        assert result["token"] == scores.argmax()

    def test_a_text_without_a_mask_is_an_error(self, source):
        with pytest.raises(ValueError, match=r"there is no mask '\[MASK\]' in 'the cat'"):
            pipeline("fill-mask", model=source)("the cat")


class TestQuestionAnswering:
    QUESTION = "where is the cat ?"
    CONTEXT = "The big dog sat on the mat. A cat ran over the hill."

    @pytest.fixture(scope="class")
    @staticmethod
    def source(wordpiece):
        return loaded("bert", wordpiece, head="span", token_types=2)

    def best_spans(self, source, question, context, max_answer_len, handle_impossible):
        """Every span, best first, by brute force on one window."""
        encoded = source[2].encode_with_specials(question, context)
        scores = apply(source, encoded.ids, encoded.token_types)
        inside = encoded.sequence == 1
        places = [0, *np.flatnonzero(inside)]  # [CLS] takes part in the softmax
        start, end = (dict(zip(places, softmax(scores[places, i]), strict=True)) for i in (0, 1))
        spans = [
            (float(start[i] * end[j]), int(encoded.offsets[i, 0]), int(encoded.offsets[j, 1]))
            for i in places[1:]
            for j in places[1:]
            if i <= j < i + max_answer_len
        ]
        spans += [(float(start[0] * end[0]), 0, 0)] if handle_impossible else []
        return sorted(spans, reverse=True)

    @pytest.mark.parametrize("max_answer_len", [1, 3, 15])
    @pytest.mark.parametrize("handle_impossible_answer", [False, True])
    def test_answers_are_the_likeliest_spans(self, source, max_answer_len, handle_impossible_answer):
        arguments = {"max_answer_len": max_answer_len, "handle_impossible_answer": handle_impossible_answer}
        answerer = pipeline("question-answering", model=source, align_to_words=False, **arguments)
        spans = self.best_spans(source, self.QUESTION, self.CONTEXT, max_answer_len, handle_impossible_answer)
        expected = [
            {"score": pytest.approx(p, abs=1e-6), "start": a, "end": b, "answer": self.CONTEXT[a:b]}
            for p, a, b in spans
        ]
        assert answerer(question=self.QUESTION, context=self.CONTEXT) == expected[0]
        assert answerer(question=self.QUESTION, context=self.CONTEXT, top_k=3) == expected[:3]

    def test_a_long_context_is_read_in_windows(self, source):
        question, context = "who ran ?", " ".join(np.random.default_rng(0).choice(WORDS[:13], 150))
        encoded = source[2].encode_with_specials(question, context)
        windows = examples.windows(encoded, 40, 10)
        inside = [w.offsets[w.sequence == 1] for w in windows]
        assert all(len(w.ids) == 40 for w in windows[:-1]) and len(windows[-1].ids) <= 40
        assert all((w.ids[:5] == encoded.ids[:5]).all() and w.ids[-1] == 3 for w in windows)
        for a, b in itertools.pairwise(inside):
            np.testing.assert_array_equal(a[-10:], b[:10])
        assert {tuple(x) for part in inside for x in part} == {tuple(x) for x in encoded.offsets[encoded.sequence == 1]}

        best = (0.0, 0, 0)
        for window in inside:
            start, end = window[0, 0], window[-1, 1]
            score, a, b = self.best_spans(source, question, context[start:end], 15, False)[0]
            best = max(best, (score, int(start) + a, int(start) + b))
        answer = pipeline("question-answering", model=source, max_seq_len=40, doc_stride=10)(
            question=question, context=context
        )
        assert (answer["start"], answer["end"]) == best[1:]
        assert answer["score"] == pytest.approx(best[0], abs=1e-6)
        assert answer["answer"] == context[best[1] : best[2]]

    def test_one_and_several_questions(self, source):
        answerer = pipeline("question-answering", model=source)
        item = {"question": self.QUESTION, "context": self.CONTEXT}
        one = answerer(**item)
        assert one.keys() == {"score", "start", "end", "answer"}
        assert answerer(item) == one
        assert answerer([item, item]) == [one, one]
        assert answerer(question=[self.QUESTION] * 2, context=self.CONTEXT) == [one, one]

    def test_answers_grow_to_whole_words(self):
        assert reading._whole_words("a jumping fox", 4, 6) == (2, 9)
        assert reading._whole_words("a jumping fox", 2, 9) == (2, 9)
        assert reading._whole_words("(fox)", 1, 3) == (1, 4)
        assert reading._whole_words("fox", 0, 3) == (0, 3)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"context": ""}, "context '' must be a text that is not empty"),
            ({"question": None}, "question None must be a text"),
            ({"question": "the " * 70}, "the question has 72 tokens, which leaves no room"),
            ({"context": "the " * 70, "doc_stride": 60}, "doc_stride 60 must be at least 0 and below 56"),
            ({"top_k": 0}, "top_k 0"),
        ],
    )
    def test_bad_arguments(self, source, arguments, words):
        with pytest.raises(ValueError, match=words):
            pipeline("question-answering", model=source)(
                **{"question": self.QUESTION, "context": self.CONTEXT} | arguments
            )


@pytest.mark.parametrize("family", ["gpt", "bert", "encoder_decoder"])
def test_feature_extraction(family, wordpiece):
    source = loaded(family, wordpiece, **({"head": "none"} if family == "bert" else {}))
    model, params, _ = source
    texts = ["the cat sat", "where is the dog ?"]
    method = "encode" if family == "encoder_decoder" else "hidden_states"
    ids = [wordpiece.encode_with_specials(text).ids for text in texts]
    expected = [np.asarray(forward(model, params, jnp.array([i]), method=method)) for i in ids]
    features = pipeline("feature-extraction", model=source)
    for result, array in zip(features(texts), expected, strict=True):
        np.testing.assert_allclose(result, array, atol=1e-4)
    np.testing.assert_allclose(features(texts[0]), expected[0], atol=1e-4)


def test_unknown_tasks_and_missing_heads(wordpiece):
    source = loaded("bert", wordpiece, head="none")
    with pytest.raises(
        ValueError, match="task 'summarise' is not one of text-generation, text2text-generation, transl"
    ):
        pipeline("summarise", model=source)
    with pytest.raises(
        ValueError, match=r"task 'text-generation' needs a GPT with model\.head 'language_model'; this is a B"
    ):
        pipeline("text-generation", model=source)
    with pytest.raises(ValueError, match=r"task 'fill-mask' needs a BERT with model\.head 'masked_lm'; this is a BERT"):
        pipeline("fill-mask", model=source)


class TestSourceFacts:
    def test_folder(self, tmp_path):
        assert pipelines.source_facts(tmp_path) == {"config": {}, "generation_config": {}}
        (tmp_path / "config.json").write_text('{"id2label": {"0": "no"}}')
        assert pipelines.source_facts(str(tmp_path))["config"] == {"id2label": {"0": "no"}}

    def test_the_config_of_a_workdir_is_not_a_models(self, tmp_path):
        (tmp_path / "model.json").write_text("{}")
        (tmp_path / "config.json").write_text('{"seed": 0}')
        assert pipelines.source_facts(tmp_path) == {"config": {}, "generation_config": {}}

    def test_single_file(self, tmp_path):
        (tmp_path / "model.gguf").touch()
        assert pipelines.source_facts(tmp_path / "model.gguf")["config"] == {}

    def test_hub_name(self, tmp_path, monkeypatch):
        (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
        monkeypatch.setattr(loading, "fetch", {"gpt2": tmp_path}.get)
        assert pipelines.source_facts("gpt2")["generation_config"] == {"top_k": 3}

    @pytest.mark.parametrize(
        ("text", "words"), [("{", "config.json is not JSON"), ("[]", "not a JSON object but a list")]
    )
    def test_damaged(self, tmp_path, text, words):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            pipelines.source_facts(tmp_path)


def test_prompts_of_a_model_trained_here_open_as_its_documents(bpe, monkeypatch, tmp_path):
    source = loaded("gpt", bpe)
    bpe.frame(opens=True, closes=False)  # as training does
    folder = with_files(source, monkeypatch, tmp_path, model={})
    new = bpe.decode(greedy(source, [bpe.eos_id, *bpe.encode("The")], 5))
    result = pipeline("text-generation", model=folder)("The", do_sample=False, max_new_tokens=5)
    assert result == [{"generated_text": "The" + new}]
