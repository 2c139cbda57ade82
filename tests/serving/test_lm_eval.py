"""lm-eval scores a model through the server as in process."""

import pytest

from gptjax.generation.engine import Engine
from gptjax.loading import load
from gptjax.serving.models import ServedModel
from gptjax.serving.openai_api import make_app
from tests.serving.conftest import KEY, serve

# Asked here too: the module below, once skipped, cannot be imported.
for name in ("lm_eval", "tenacity"):
    pytest.importorskip(name, reason="the extra `verify` is not installed")
from tests.evaluation.test_harness import evaluate, folder  # noqa: E402, F401 - a fixture


@pytest.fixture(scope="module")
def url(folder):  # noqa: F811
    loaded = load(folder[0] / "model")
    served = ServedModel("it", loaded, Engine(loaded.model, loaded.params, num_slots=4))
    with serve(make_app([served], api_keys=[KEY]), [served]) as server:
        yield f"{server.url}/v1"


@pytest.mark.parametrize(
    ("api", "path", "names", "options"),
    [
        # Longer texts are cut into windows a token shorter than in process, where nothing is written after them.
        ("local-completions", "completions", ["choice", "text", "generate"], {"samples": {"ours_text": [0, 1]}}),
        ("local-chat-completions", "chat/completions", ["generate"], {"apply_chat_template": True}),
    ],
)
def test_scores_through_the_server_are_those_in_process(folder, url, monkeypatch, api, path, names, options):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    arguments = {"model": "it", "base_url": f"{url}/{path}", "max_length": 72, "num_concurrent": 3, "auth_token": KEY}
    there = evaluate(folder[0], *names, model=api, model_args=arguments, **options)
    here = evaluate(folder[0], *names, **options)
    for task, scores in here["results"].items():
        numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
        assert numbers and {name: there["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
        for one, other in zip(there["samples"][task], here["samples"][task], strict=True):
            assert one["doc_id"] == other["doc_id"]
            for answer, wanted in zip(one["resps"], other["resps"], strict=True):
                assert answer[0] == (wanted[0] if isinstance(wanted[0], str) else pytest.approx(wanted[0], rel=1e-5))
