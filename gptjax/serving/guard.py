"""What stands before the protocol: keys, the size of bodies, and the time that they may take."""

import asyncio
import hmac
from collections.abc import Sequence

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.serving.protocol import APIError, Limits, api_error
from gptjax.serving.worker import Busy

_WITHOUT_KEY = ("/health", "/ready", "/ui")  # the page asks for a key itself


class Guard:
    """Checks keys, bounds bodies and the time they take, and counts, before anything else sees a request.

    Args:
      app: what it guards.
      limits: of bodies.
      requests: counts by 'path' and 'status'.
      api_keys: of which a request must bring one; none are asked for if there are none.
    """

    def __init__(self, app: ASGIApp, limits: Limits, requests: Counter, api_keys: Sequence[str]) -> None:
        self._app, self._limits, self._requests, self._keys = app, limits, requests, api_keys
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a connection."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._requests.labels(path, message["status"]).inc()
            await send(message)

        limits, body = self._limits, bytearray()
        try:
            if not scope["path"].startswith(_WITHOUT_KEY):
                self._check_key(dict(scope["headers"]).get(b"authorization", b""))
            if scope["path"].endswith("/upload"):
                raise APIError(404, "this server takes no files")
            async with asyncio.timeout(limits.read_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._held += len(message.get("body", b""))
                    more = message.get("more_body", False)
                    if len(body) > limits.max_body_bytes:
                        raise APIError(
                            413, f"the body is larger than {limits.max_body_bytes} bytes", "request_too_large"
                        )
                    if self._held > 16 * limits.max_body_bytes:
                        raise Busy
            messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

            async def replay() -> Message:
                return next(messages, None) or await receive()

            return await self._app(scope, replay, counted)
        except TimeoutError:
            error = APIError(408, f"the body did not arrive within {limits.read_seconds:g} seconds", "timeout")
            return await error.response()(scope, receive, counted)
        except (APIError, Busy) as error:
            return await api_error(error).response()(scope, receive, counted)
        finally:
            self._held -= len(body)

    def _check_key(self, header: bytes) -> None:
        scheme, _, key = header.partition(b" ")
        if self._keys and not (scheme.lower() == b"bearer" and is_known(key.strip(), self._keys)):
            raise APIError(401, "no valid API key: send 'Authorization: Bearer KEY'", "invalid_api_key")


def is_known(key: bytes, api_keys: Sequence[str]) -> bool:
    """Whether a key is one of `api_keys`; the time it takes tells nothing of how much of it is right."""
    return sum(hmac.compare_digest(key, known.encode()) for known in api_keys) > 0
