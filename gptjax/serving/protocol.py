"""What requests in OpenAI's protocol may say, and the form that errors have."""

import json
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptjax.generation.decoding import NUM_TOP
from gptjax.serving.worker import Busy


class Limits(NamedTuple):
    """What a request may cost.

    Attributes:
      max_body_bytes: of a request; bodies of all requests together may have 16 times as many.
      max_texts: that a request may ask for, prompts times n.
      read_seconds: in which its body must arrive.
      seconds: in which it must be answered.
    """

    max_body_bytes: int = 4 << 20
    max_texts: int = 128
    read_seconds: float = 30.0
    seconds: float = 600.0


class APIError(Exception):
    """What a client gets in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.content(), self.status, headers)


def api_error(error: Exception) -> APIError:
    """What a client is told of an error."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, Busy):
        return APIError(429, "the server is busy: too many texts wait; try again later", "rate_limit_exceeded")
    if isinstance(error, TimeoutError):
        return APIError(504, "the request took longer than the server allows", "timeout")
    if isinstance(error, ValueError):
        return APIError(400, str(error))
    return APIError(500, "the server failed; its log says why", "internal_error")


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _TopBody(_Body):
    @model_validator(mode="before")
    @classmethod
    def _check_unicode(cls, given: Any) -> Any:
        """JSON can spell halves of UTF-16 pairs, which are no text; nothing later expects them."""
        try:
            if isinstance(given, dict):
                json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object[error.start]!r} is no character") from error
        return given


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
Texts = (
    str
    | Ids
    | Annotated[list[str], Field(min_length=1, max_length=1 << 12, fail_fast=True)]
    | Annotated[list[Ids], Field(min_length=1, max_length=1 << 12, fail_fast=True)]
)
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


class StreamOptions(_Body):
    """Of `stream_options`."""

    include_usage: bool = False


class JSONSchema(_Body):
    """Of `response_format`."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """What the text must be; 'regex' is not OpenAI's."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JSONSchema | None = None
    regex: Annotated[str, Field(max_length=1 << 12)] | None = None


class GenerationBody(_TopBody):
    """What completions and chat have in common; top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos as in vLLM."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[TokenName, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None = (
        None
    )
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=4)] = []
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionBody(GenerationBody):
    """Of /v1/completions."""

    prompt: Texts
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=NUM_TOP)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None


class TextPart(_Body):
    """A part of a message; there are no others than text."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1 << 10, fail_fast=True)]
    name: str | None = None


class ChatBody(GenerationBody):
    """Of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1 << 12, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=NUM_TOP)] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None


class EmbeddingBody(_TopBody):
    """Of /v1/embeddings."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class TokenizeBody(_TopBody):
    """Of /tokenize, as in vLLM; the first model if none is named."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(_TopBody):
    """Of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=1 << 20, fail_fast=True)]
