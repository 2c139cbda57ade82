"""What is wrong is refused in OpenAI's form, and the server goes on."""

import asyncio
import json
import resource
import socket
import time

import httpx
import pytest

from tests.serving.conftest import CONTEXT, KEY

COMPLETION = {"model": "tiny", "prompt": "x", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
EMBEDDING = {"model": "folder/encoder", "input": "x"}
HUGE = 10**400


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def deep(value, levels):
    for _ in range(levels):
        value = {"properties": {"a": value}}
    return value


# What is changed in a good request, and what the refusal is about.
COMPLETIONS = [
    ({"model": "nothing"}, "model_not_found"),
    ({"model": "../../../etc/passwd"}, "model_not_found"),
    ({"model": "/etc/passwd\x00"}, "model_not_found"),
    ({"model": ""}, "model_not_found"),
    ({"model": "x" * 10_000}, "model_not_found"),
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"model": "folder/encoder"}, "does not generate text"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [["x"]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "ids are 0 to"),
    ({"prompt": [HUGE]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": ["x", None]}, "prompt"),
    ({"prompt": "x" * (CONTEXT + 1)}, "context_length_exceeded"),
    ({"prompt": "x" * 100_000}, "context_length_exceeded"),
    ({"prompt": ["x"] * 13}, "at most 12"),
    ({"prompt": "x\ud800"}, "is no character"),
    ({"stop": ["\udfff"]}, "is no character"),
    ({"\ud800": 1}, "is no character"),
    ({"max_tokens": 0}, "max_tokens 0"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9}, "context_length_exceeded"),
    ({"max_tokens": HUGE}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "1"}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": float("nan")}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 13}, "at most 12"),
    ({"n": 10**9}, "n"),
    ({"n": -(10**30)}, "n"),
    ({"best_of": 3}, "best_of 3 must be n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"seed": 1.5}, "seed"),
    ({"seed": HUGE}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": [3]}, "stop"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include": 1}}, "unknown_parameter"),
    ({"suffix": "x", "prompt": [1]}, "suffix"),
    ({"suffix": 1}, "suffix"),
    ({"echo": True, "model": "tiny-t5"}, "echo"),
    ({"temprature": 1}, "unknown_parameter"),
    ({"__class__": "x"}, "unknown_parameter"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "regex", "regex": "(("}}, "regular expression"),
    (schema({"type": "nothing"}), "JSON schema"),
    (schema({"$ref": "file:///etc/passwd"}), "JSON schema"),
    (schema({"$ref": "http://127.0.0.1:1/x"}), "JSON schema"),
    (schema(deep({}, 300)), "JSON schema"),
    (schema([]), "schema"),
]
CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [{}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "root", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "<|im_end|>", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
        "messages",
    ),
    ({"messages": [{"role": "user", "content": "x" * 1000}]}, "context_length_exceeded"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    ({"tools": []}, "does not call tools"),
    ({"tools": [{"type": "function"}]}, "does not call tools"),
    ({"tool_choice": "auto"}, "does not call tools"),
    ({"functions": [1]}, "does not call tools"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"model": "tiny-t5"}, "does not chat"),
    ({"n": 13}, "at most 12"),
]
EMBEDDINGS = [
    ({"input": []}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": "x" * 10_000}, "context"),
    ({"input": ""}, "context"),
    ({"input": [10**6]}, "ids are 0 to"),
    ({"input": ["x"] * 13}, "at most 12"),
    ({"model": "tiny"}, "does not make embeddings"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"dimensions": 3}, "unknown_parameter"),
]
OTHERS = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": 3}, "prompt"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [10**6]}, "ids are 0 to"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
]
BAD = [("/v1/completions", COMPLETION | change, about) for change, about in COMPLETIONS]
BAD += [("/v1/chat/completions", CHAT | change, about) for change, about in CHATS]
BAD += [("/v1/embeddings", EMBEDDING | change, about) for change, about in EMBEDDINGS]
BAD += OTHERS
NO_JSON = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b"[" * 100_000,
    b'{"n": 1' + b"1" * 5000 + b"}",
]


def check(response, about=""):
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 2000
    assert about in response.text


@pytest.fixture(scope="module")
def http(server):
    with server.client() as client:
        yield client
        # Still there, with every slot free.
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200
        deadline = time.monotonic() + 5
        while server.model().worker.num_texts:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(("path", "body", "about"), BAD, ids=range(len(BAD)))
def test_bad_requests(http, path, body, about):
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    check(http.post(path, content=content, headers=headers), about)
    if "stream" not in body and path.endswith("completions"):  # refused before the stream begins, too
        check(http.post(path, content=json.dumps(body | {"stream": True}).encode(), headers=headers), about)


@pytest.mark.parametrize("content", NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json(http, content):
    check(http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}))


def test_other_ways_to_be_wrong(http, server):
    check(http.post("/v1/completions", content=b"x=1", headers={"Content-Type": "application/x-www-form-urlencoded"}))
    for path in (
        "/",
        "/v1",
        "/v2/completions",
        "/v1/models/nothing",
        "/v1/models/../../etc/passwd",
        "/docs",
        "/ui/upload",
    ):
        response = http.get(path)
        assert response.status_code == 404
        check(response)
    response = http.get("/v1/completions")
    assert response.status_code == 405 and response.headers["Allow"] == "POST"
    check(response)
    check(http.get("/tokenizer_info", params={"model": "nothing"}), "model_not_found")
    too_large = http.post("/v1/completions", content=b" " * ((1 << 18) + 1))
    assert too_large.status_code == 413
    check(too_large, "request_too_large")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", KEY, f"Bearer {KEY[:-1]}"]
)
def test_keys(server, header, capfd):
    headers = {} if header is None else {"Authorization": header}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            response = client.get(path)
            assert response.status_code == 401
            check(response, "invalid_api_key")
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert KEY not in "".join(capfd.readouterr())


def raw(server, *parts):
    """Opens a connection and sends bytes."""
    address = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((address[0], int(address[1])), timeout=10)
    for part in parts:
        connection.sendall(part)
    return connection


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HEAD += f"Authorization: Bearer {KEY}\r\n".encode()


def test_half_sent_and_broken_connections(http, server):
    half = raw(server, HEAD + b"Content-Length: 1000\r\n\r\n{")
    abandoned = [raw(server, HEAD + b"Content-Length: 1000\r\n\r\n{") for _ in range(20)]
    for connection in abandoned:
        connection.close()
    with raw(server, b"\x16\x03\x01 this is no HTTP\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    with raw(server, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000) as connection:
        assert connection.recv(100).startswith((b"HTTP/1.1 4", b""))
    with raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n") as connection:
        assert connection.recv(100).startswith((b"HTTP/1.1 4", b""))
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
    assert half.recv(100).startswith(b"HTTP/1.1 408")  # after the 2 seconds that its body may take
    half.close()


def test_idle_connections_and_slow_readers(http, server):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is two files of this process
    idle = [raw(server) for _ in range(1000)]
    body = json.dumps(COMPLETION | {"max_tokens": 200, "stream": True, "ignore_eos": True, "n": 2}).encode()
    slow = [raw(server, HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body) for _ in range(4)]
    assert http.post("/v1/completions", json=COMPLETION, timeout=20).status_code == 200
    for connection in [*idle, *slow]:
        connection.close()


def test_a_client_that_goes_away_frees_its_slots(server, http):
    """Slots and queue full of long texts; once the clients are gone, others are served at once."""
    body = COMPLETION | {"max_tokens": 250, "n": 6, "ignore_eos": True, "logit_bias": {"120": 100}}
    # Each token costs a dispatch, so that they take long.
    body |= {"response_format": {"type": "regex", "regex": "x*"}}
    worker = server.model().worker

    async def scenario():
        async with httpx.AsyncClient(
            base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
        ) as client:
            streamed = asyncio.create_task(client.post("/v1/completions", json=body | {"stream": True}))
            whole = asyncio.create_task(client.post("/v1/completions", json=body))
            while worker.num_texts < 12:
                await asyncio.sleep(0.005)
            busy = await client.post("/v1/completions", json=COMPLETION)
            streamed.cancel()
            whole.cancel()
            await asyncio.gather(streamed, whole, return_exceptions=True)
            started = time.monotonic()
            while worker.num_texts:
                assert time.monotonic() - started < 2
                await asyncio.sleep(0.005)
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
            return busy

    busy = asyncio.run(scenario())
    assert busy.status_code == 429 and busy.headers["Retry-After"]
    assert busy.json()["error"]["code"] == "rate_limit_exceeded"
