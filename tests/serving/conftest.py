"""A server on a socket of its own, with models small enough to answer at once."""

import contextlib
import socket
import threading
import time
from typing import Any, NamedTuple

import httpx
import jax
import numpy as np
import pytest
import uvicorn

from gptjax.data.tokenizers import build_tokenizer
from gptjax.generation.engine import Engine
from gptjax.loading import Loaded
from gptjax.models import BERT, GPT, EncoderDecoder, init_params
from gptjax.models.config import TransformerConfig
from gptjax.serving.models import ServedModel
from gptjax.serving.openai_api import make_app
from gptjax.serving.protocol import Limits

KEY = "sk-secret"
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
CONTEXT = 256


class Running(NamedTuple):
    """A server that runs."""

    url: str
    app: Any
    models: list[ServedModel]

    def client(self, **options):
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30, **options)

    def model(self, name="tiny"):
        return next(model for model in self.models if model.name == name)


def make_loaded(family=GPT, **fields):
    tokenizer = build_tokenizer("byte", documents=lambda: iter([]), vocab_size=0, special_tokens=SPECIALS)
    sizes = dict(vocab_size=tokenizer.vocab_size, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
    model = family(TransformerConfig(**sizes, embed_dim=16, mlp_dim=16, max_seq_len=CONTEXT, **fields))
    return Loaded(model, jax.tree.map(np.asarray, init_params(model, jax.random.key(0))), tokenizer)


def make_model(name, family=GPT, *, num_slots=4, max_waiting=8, **fields):
    loaded = make_loaded(family, **fields)
    generates = loaded.model.config.head == "language_model"
    engine = Engine(loaded.model, loaded.params, num_slots=num_slots) if generates else None
    return ServedModel(name, loaded, engine, max_waiting=max_waiting)


@contextlib.contextmanager
def serve(app, models=()):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, list(models))
    try:
        deadline = time.monotonic() + 120
        while running.client().get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield running
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")  # JAX keeps a process's last 8192 programs: other tests would push this server's out
def server():
    models = [
        make_model("tiny"),
        make_model("folder/encoder", BERT, head="embedding", pooling="mean"),
        make_model("tiny-t5", EncoderDecoder, num_slots=2, num_encoder_layers=1),
    ]
    limits = Limits(max_body_bytes=1 << 18, max_texts=12, read_seconds=2.0, seconds=20.0)
    with serve(make_app(models, api_keys=["another", KEY], limits=limits), models) as running:
        yield running
