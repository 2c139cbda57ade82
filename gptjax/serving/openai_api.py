"""OpenAI's protocol: what requests may say, and what they get."""

import asyncio
import base64
import contextlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import prometheus_client as prometheus
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.exceptions import HTTPException

from gptjax.generation import engine
from gptjax.generation.sampling import Sampling
from gptjax.serving.guard import Guard
from gptjax.serving.models import Piece, ServedModel, TokenScore
from gptjax.serving.protocol import (
    APIError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    GenerationBody,
    Limits,
    ResponseFormat,
    TokenizeBody,
    api_error,
)
from gptjax.serving.worker import Busy, num_compiles

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_SEND_SECONDS = 30.0  # in which who reads a stream must take some of it


class Server:
    """The state of an app: its models, limits and counters."""

    def __init__(self, models: Sequence[ServedModel], limits: Limits) -> None:
        self.models, self.limits = {model.name: model for model in models}, limits
        self.registry = prometheus.CollectorRegistry()
        metric: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus.Counter("gptjax_requests", "answers sent", ["path", "status"], **metric)
        self.prompt_tokens = prometheus.Counter("gptjax_prompt_tokens", "tokens read", ["model"], **metric)
        self.tokens = prometheus.Counter("gptjax_generated_tokens", "tokens written", ["model"], **metric)
        buckets = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
        self.first_token = prometheus.Histogram(
            "gptjax_first_token_seconds", "until the first text of a request", ["model"], buckets=buckets, **metric
        )
        compiles = prometheus.Gauge("gptjax_compiles", "programs compiled; after the start it stays put", **metric)
        compiles.set_function(num_compiles)
        texts = prometheus.Gauge("gptjax_texts", "texts being written, scored, or waiting", ["model"], **metric)
        for model in models:
            if worker := model.worker:
                texts.labels(model.name).set_function(lambda worker=worker: worker.num_texts)  # type: ignore[misc]

    def model(self, name: str | None, *, generates: bool | None = None) -> ServedModel:
        """The model of that name, which must generate, must embed, or may be any."""
        model = next(iter(self.models.values())) if name is None else self.models.get(name)
        if model is None:
            raise APIError(404, f"the model {str(name)[:200]!r} does not exist", "model_not_found", "model")
        if generates is not None and generates != (model.worker is not None):
            does = "generate text" if generates else "make embeddings"
            raise APIError(400, f"the model {name!r} does not {does}", "model_not_supported", "model")
        return model


router = APIRouter()
_STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # besides JSON


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the process is sound."""
    alive = all(model.worker is None or model.worker.is_alive for model in _server(request).models.values())
    return JSONResponse({"status": "ok" if alive else "an engine has died"}, 200 if alive else 503)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether all is compiled."""
    all_ready = all(m.worker is None or m.worker.ready.is_set() for m in _server(request).models.values())
    return JSONResponse({"status": "ready" if all_ready else "compiling"}, 200 if all_ready else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(prometheus.generate_latest(_server(request).registry), media_type=prometheus.CONTENT_TYPE_LATEST)


def _card(model: ServedModel) -> dict[str, Any]:
    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "gptjax"}
    return card | {"max_model_len": model.max_len}


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The models there are."""
    return JSONResponse({"object": "list", "data": [_card(model) for model in _server(request).models.values()]})


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> Response:
    """One of them."""
    return JSONResponse(_card(_server(request).model(name)))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """A model's special tokens and its chat template."""
    found = _server(request).model(model)
    roles = {f"{role}_token": token for role, token in found.tokenizer.roles.items()}
    info = {"chat_template": found.tokenizer.chat_template, "vocab_size": found.vocab_size}
    return JSONResponse(
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": found.max_len} | roles | info
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """The ids of a text; special tokens in it are text, unless one is all of it, by which lm-eval asks for its id."""
    model = _server(request).model(body.model)
    if (special := model.tokenizer.special_ids.get(body.prompt)) is not None:
        ids = [special]
    else:
        encode = model.encode if body.add_special_tokens and body.prompt else model.tokenizer.encode
        ids = (await asyncio.to_thread(encode, body.prompt)).tolist()
    return JSONResponse({"count": len(ids), "max_model_len": model.max_len, "tokens": ids})


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """The text of ids, with special tokens."""
    model = _server(request).model(body.model)
    _check_vocabulary(model, [body.tokens], "tokens")
    decode = model.tokenizer.decode
    return JSONResponse({"prompt": await asyncio.to_thread(decode, body.tokens, skip_special_tokens=False)})


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingBody, request: Request) -> Response:
    """A vector of length 1 for each text."""
    model = _server(request).model(body.model, generates=False)
    texts = _texts(body.input)
    _check_vocabulary(model, [text for text in texts if not isinstance(text, str)], "input")
    _check_num_texts(request, len(texts))
    vectors, num_tokens = await _until_gone(request, model.embed(texts))
    _server(request).prompt_tokens.labels(model.name).inc(num_tokens)
    as_base64 = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return JSONResponse({"object": "list", "model": model.name, "data": data, "usage": usage})


@router.post("/v1/completions", responses=_STREAMS)
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continues texts."""
    model, texts = _server(request).model(body.model, generates=True), _texts(body.prompt)
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if not max_tokens and not body.echo:
        raise APIError(400, "max_tokens 0 asks for nothing without echo", None, "max_tokens")
    if body.best_of not in (None, body.n):
        raise APIError(400, f"best_of {body.best_of} must be n, which is {body.n}", None, "best_of")
    if model.is_prefix_lm and body.echo and body.logprobs is not None:
        raise APIError(400, "a prefix LM reads its prompt in both directions, which has no logprobs", None, "echo")
    if model.is_encoder_decoder and body.echo:
        raise APIError(400, "an encoder-decoder does not continue its prompt, so it cannot echo it", None, "echo")
    if body.suffix is not None and not all(isinstance(text, str) for text in texts):
        raise APIError(400, "suffix needs a prompt that is text", None, "suffix")
    _check_num_texts(request, len(texts) * body.n)

    def encode() -> list[np.ndarray]:
        if body.suffix is not None:
            return [model.encode_infill(str(text), body.suffix) for text in texts]
        return [model.encode(text) if isinstance(text, str) else np.array(text) for text in texts]

    prompts = await asyncio.to_thread(encode)
    _check_vocabulary(model, prompts, "prompt")
    requests = await _requests(model, body, prompts, max_tokens, body.logprobs is not None)
    echoes = [""] * len(requests)
    scores: list[list[TokenScore]] = [[] for _ in requests]
    if body.echo:
        echoed = [t if isinstance(t, str) else model.tokenizer.decode(t, skip_special_tokens=False) for t in texts]
        echoes = [text for text in echoed for _ in range(body.n)]
        if body.logprobs is not None:
            found = await _until_gone(request, model.score(prompts, _server(request).limits.seconds))
            scores = [list(tokens) for tokens in found for _ in range(body.n)]
    offsets = [0] * len(requests)

    def choice(piece: Piece) -> dict[str, Any]:
        text, tokens = echoes[piece.place] + piece.text, scores[piece.place] + piece.scores
        echoes[piece.place], scores[piece.place] = "", []
        shown: dict[str, Any] | None = None
        if body.logprobs is not None:
            shown = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for token, logprob, top in tokens:
                name = model.spell(token)[0]
                likeliest = {model.spell(i)[0]: _finite(x) for i, x in top[: body.logprobs]}
                shown["tokens"].append(name)
                shown["token_logprobs"].append(_finite(logprob))
                shown["top_logprobs"].append(likeliest | {name: _finite(logprob)} if top else None)
                shown["text_offset"].append(offsets[piece.place])
                offsets[piece.place] += len(model.tokenizer.decode([token]))
        return {"index": piece.place, "text": text, "logprobs": shown, "finish_reason": piece.finish_reason}

    def merge(choices: list[dict[str, Any]]) -> dict[str, Any]:
        merged = choices[-1] | {"text": "".join(c["text"] for c in choices)}
        if merged["logprobs"] is not None:
            merged["logprobs"] = {
                name: [value for c in choices for value in c["logprobs"][name]] for name in merged["logprobs"]
            }
        return merged

    def pieces() -> AsyncIterator[Piece]:
        if max_tokens:
            return model.write(
                requests, stop=_stops(body), spelled_alone=False, seconds=_server(request).limits.seconds
            )
        return _iterate([Piece(place, "", 0, [], "length") for place in range(len(requests))])

    kind = ("cmpl-", "text_completion", "text_completion")
    return await _answer(request, model, body, kind, prompts, pieces(), choice, merge)


@router.post("/v1/chat/completions", responses=_STREAMS)
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answers in a conversation."""
    model = _server(request).model(body.model, generates=True)
    for name in ("tools", "tool_choice", "functions", "function_call"):
        if getattr(body, name) is not None:
            raise APIError(400, f"{name}: this server does not call tools", "unsupported_parameter", name)
    if model.is_encoder_decoder:
        raise APIError(400, f"the model {model.name!r} is an encoder-decoder, which does not chat", None, "model")
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs: true", None, "top_logprobs")
    _check_num_texts(request, body.n)
    messages = []
    for message in body.messages:
        content = message.content if isinstance(message.content, str) else "".join(p.text for p in message.content)
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": content} | ({"name": message.name} if message.name else {}))
    prompt = await asyncio.to_thread(model.encode_chat, messages)
    asked = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
    requests = await _requests(model, body, [prompt], min(asked, default=None), body.logprobs)
    begun: set[int] = set()

    def token_score(token: int, logprob: float | None) -> dict[str, Any]:
        text, written = model.spell(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(written)}

    def choice(piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text or not piece.finish_reason else {}
        if piece.place not in begun:
            begun.add(piece.place)
            delta = {"role": "assistant", "content": piece.text}
        content = [
            token_score(s.token, s.logprob)
            | {"top_logprobs": [token_score(*pair) for pair in s.top[: body.top_logprobs or 0]]}
            for s in piece.scores
        ]
        logprobs = {"content": content, "refusal": None} if body.logprobs else None
        return {"index": piece.place, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def merge(choices: list[dict[str, Any]]) -> dict[str, Any]:
        merged = {name: value for name, value in choices[-1].items() if name != "delta"}
        content = "".join(c["delta"].get("content", "") for c in choices)
        merged["message"] = {"role": "assistant", "content": content, "refusal": None}
        if body.logprobs:
            tokens = [token for c in choices for token in c["logprobs"]["content"]]
            merged["logprobs"] = {"content": tokens, "refusal": None}
        return merged

    pieces = model.write(requests, stop=_stops(body), spelled_alone=True, seconds=_server(request).limits.seconds)
    kind = ("chatcmpl-", "chat.completion", "chat.completion.chunk")
    return await _answer(request, model, body, kind, [prompt], pieces, choice, merge)


async def _answer(
    request: Request,
    model: ServedModel,
    body: GenerationBody,
    kind: tuple[str, str, str],
    prompts: Sequence[np.ndarray],
    pieces: AsyncIterator[Piece],
    choice: Callable[[Piece], dict[str, Any]],
    merge: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> Response:
    """Sends pieces as they come, or merged.

    Args:
      kind: what an id begins with, and the objects' names, whole and in a stream.
      choice: a piece as an item of 'choices'.
      merge: the items of one text.
    """
    server, started, num_prompt = _server(request), time.monotonic(), sum(map(len, prompts))
    prefix, whole, chunk = kind
    head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model.name}
    usage = {"prompt_tokens": num_prompt, "completion_tokens": 0, "total_tokens": num_prompt}
    server.prompt_tokens.labels(model.name).inc(num_prompt)

    def count(piece: Piece) -> None:
        usage["completion_tokens"] += piece.num_tokens
        usage["total_tokens"] += piece.num_tokens
        server.tokens.labels(model.name).inc(piece.num_tokens)

    async def collect() -> Response:
        choices: dict[int, list[dict[str, Any]]] = {}
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            async for piece in pieces:
                count(piece)
                choices.setdefault(piece.place, []).append(choice(piece))
        merged = [merge(choices[place]) for place in sorted(choices)]
        return JSONResponse(head | {"object": whole, "choices": merged, "usage": usage})

    if not body.stream:
        return await _until_gone(request, collect())
    # The first piece comes before the status, so that what is refused is no stream.
    first = await _until_gone(request, anext(pieces))
    server.first_token.labels(model.name).observe(time.monotonic() - started)
    wants_usage = body.stream_options is not None and body.stream_options.include_usage

    async def events() -> AsyncIterator[dict[str, str]]:
        def event(choices: list[dict[str, Any]], final: bool = False) -> dict[str, str]:
            used = {"usage": usage if final else None} if wants_usage else {}
            return {"data": json.dumps(head | {"object": chunk, "choices": choices} | used, ensure_ascii=False)}

        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            count(first)
            yield event([choice(first)])
            try:
                async for piece in pieces:
                    count(piece)
                    if piece.text or piece.finish_reason or piece.scores:
                        yield event([choice(piece)])
            except Exception as error:
                yield {"data": json.dumps(api_error(error).content())}
                return
        if wants_usage:
            yield event([], final=True)
        yield {"data": "[DONE]"}

    return EventSourceResponse(events(), sep="\n", send_timeout=_SEND_SECONDS)


async def _until_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "the client is gone")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _requests(
    model: ServedModel, body: GenerationBody, prompts: Sequence[np.ndarray], max_tokens: int | None, logprobs: bool
) -> list[engine.Request]:
    """The texts to write, n for each prompt."""
    for prompt in prompts:
        wanted = len(prompt) + (0 if model.is_encoder_decoder else max_tokens or 0)
        if wanted > model.max_len or (max_tokens is None and wanted == model.max_len):
            raise APIError(
                400,
                f"this model's context is {model.max_len} tokens, and the request asks for {wanted}: {len(prompt)} in the "
                f"prompt, {max_tokens if max_tokens is not None else 'and more'} to write",
                "context_length_exceeded",
                "messages" if isinstance(body, ChatBody) else "prompt",
            )
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    _check_vocabulary(model, [list(bias)], "logit_bias")
    _check_vocabulary(model, [body.stop_token_ids], "stop_token_ids")
    constraint = await asyncio.to_thread(_constraint, model, body.response_format)
    eos_ids = [*body.stop_token_ids, *(() if body.ignore_eos else model.eos_ids)]
    seed = int.from_bytes(os.urandom(8)) if body.seed is None else body.seed % (1 << 64)
    seeds = np.random.SeedSequence(seed).generate_state(body.n).tolist()
    sampling = Sampling(**{name: getattr(body, name) for name in Sampling._fields})
    return [
        engine.Request(
            prompt,
            max_tokens or model.max_len,
            eos_ids,
            sampling,
            one_seed,
            logit_bias=bias,
            logprobs=logprobs,
            constraint=constraint and constraint.copy(),
        )
        for prompt in prompts
        for one_seed in seeds
    ]


def _constraint(model: ServedModel, form: ResponseFormat | None) -> Any:
    if form is None or form.type == "text":
        return None
    given = {"json_object": True, "json_schema": form.json_schema, "regex": form.regex}[form.type]
    if given is None:
        raise APIError(
            400, f"response_format of type {form.type!r} needs the field {form.type!r}", None, "response_format"
        )
    try:
        if form.type == "regex":
            return model.vocabulary.regex(form.regex or "")
        return model.vocabulary.json_schema(form.json_schema.schema_ if form.json_schema else {"type": "object"})
    except ValueError as error:
        raise APIError(400, str(error), None, "response_format") from error


def _texts(given: Any) -> list[Any]:
    """One text or several, each a text or ids, as a list."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _stops(body: GenerationBody) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def _check_num_texts(request: Request, number: int) -> None:
    if number > (most := _server(request).limits.max_texts):
        raise APIError(400, f"the request asks for {number} texts; this server gives at most {most} at once", None, "n")


def _check_vocabulary(model: ServedModel, rows: Sequence[Any], param: str) -> None:
    for row in rows:
        if len(row) and max(row) >= model.vocab_size:
            raise APIError(400, f"{param} holds token id {max(row)}; ids are 0 to {model.vocab_size - 1}", None, param)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)


async def _iterate(pieces: Sequence[Piece]) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece


def make_app(models: Sequence[ServedModel], *, api_keys: Sequence[str] = (), limits: Limits = Limits()) -> FastAPI:  # noqa: B008
    """An app that serves models, by whose names requests call them; closes them at its end."""
    # Streams that run when the server is told to stop go on to their end, as long as it waits.
    AppStatus.disable_automatic_graceful_drain()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for model in models:
            await asyncio.to_thread(model.close)

    refusal: dict[int | str, dict[str, Any]] = {"default": {"description": "an error in OpenAI's form"}}
    app = FastAPI(title="gptjax", lifespan=lifespan, docs_url=None, redoc_url=None, responses=refusal)
    app.state.server = server = Server(models, limits)
    app.include_router(router)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        if first["type"] == "json_invalid":
            return APIError(400, "the body is not JSON: " + first["ctx"]["error"]).response()
        if first["type"] == "extra_forbidden":
            return APIError(
                400, f"unknown field {'.'.join(where)[:200]!r}", "unknown_parameter", where[0][:200]
            ).response()
        message = f"{'.'.join(where)[:200]}: {first['msg'][:500]}" if where else f"the body: {first['msg'][:500]}"
        return APIError(400, message, None, where[0][:200] if where else None).response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        response = APIError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    for kind in (APIError, Busy, TimeoutError, ValueError, Exception):

        @app.exception_handler(kind)
        async def _(request: Request, error: Exception) -> Response:
            return api_error(error).response()

    app.add_middleware(Guard, limits=limits, requests=server.requests, api_keys=api_keys)
    return app
