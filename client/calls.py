"""What the two HTTP clients share, without a socket: where a server is, when to try again, how a stream's bytes become chunks.

Server      address and headers
Retries     how long to wait before the next try, or that there is none
Streaming   what to ask next for a stream: to begin, or to go on after a break
Chunks      bytes in, typed chunks out, errors and the end mark understood
"""

import random
import secrets
import time
from collections.abc import Mapping
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import msgspec

from headrace.client.errors import APIError, ClientError, Disconnected, NotFound, RateLimited, Unavailable, Unreachable, error_from_event
from headrace.client.sse import EventTooLong, Parser

Result = TypeVar("Result")
Chunk = TypeVar("Chunk")

Message = Mapping[str, Any]
"""One message of a conversation: {"role": …, "content": …}."""

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_RETRY_WAIT_S = 30.0
"""A server that asks for more patience than this gets none: its error is raised."""
HEALTHY = b'{"status":"ok"}'
"""What an empty answer to a health check means: some servers say no more."""
DRAIN_TIMEOUT_S = 1.0
"""How long the end of a stream's HTTP body is waited for once its end mark has come."""
RESUME_PATIENCE_S = 30.0
"""How long a client tries to go on with a stream whose server is gone."""
_FIRST_WAIT_S = 0.25
_FIRST_RESUME_S = 0.05
_MOST_RESUME_S = 1.0
_JITTER = 0.25
_STREAM_NOT_FOUND = "stream_not_found"


class Server(msgspec.Struct, frozen=True):
    """Where requests go."""

    scheme: str
    host: str
    port: int
    path: str
    """What stands before `/v1/…`."""
    api_key: str | None

    @classmethod
    def parse(cls, url: str, api_key: str | None) -> "Server":
        """From `http://HOST[:PORT]`, with or without a final `/v1`. Raises `ValueError`."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server: give one such as {DEFAULT_URL}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"), api_key)

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def headers(self, has_body: bool) -> dict[str, str]:
        headers = {"Accept": "application/json, text/event-stream"}
        if has_body:
            headers["Content-Type"] = "application/json"
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


class Retries:
    """The tries of one call. A request is only sent again when the server said that it did not take it, or never got it."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._wait_s = _FIRST_WAIT_S

    def wait_after(self, error: ClientError) -> float:
        """Seconds to wait before the next try; raises `error` itself when there is none."""
        if self._left <= 0 or not isinstance(error, (RateLimited, Unavailable, Unreachable)):
            raise error
        asked = error.retry_after if isinstance(error, APIError) else None
        wait = self._wait_s if asked is None else asked
        if wait > MAX_RETRY_WAIT_S:
            raise error
        self._left -= 1
        self._wait_s *= 2
        # Later than asked, never earlier, and not all clients at once.
        return wait * (1 + _JITTER * random.random())


class Streaming:
    """The requests for one stream, over all its breaks.

        POST ─▶ events, each with an id ─▶ break ─▶ GET /v1/streams/NAME, Last-Event-ID: the last one ─▶ events from there on

    The name is the client's choice, so a stream can be found again even if nothing of it had come. `next` is what to ask; after an error
    call `wait_after`, after a break in the middle `broke`.
    """

    def __init__(self, path: str, payload: bytes, retries: int) -> None:
        self.name = f"hr-{secrets.token_hex(16)}"
        self.last_id: str | None = None
        """The id of the last event that came."""
        self.delivered = False
        """Some event has come."""
        self._path = path
        self._payload = payload
        self._retries = Retries(retries)
        self._resumes = retries > 0
        self._break: ClientError | None = None
        self._give_up_at = 0.0
        self._wait_s = _FIRST_RESUME_S

    def next(self) -> tuple[str, str, bytes | None, dict[str, str]]:
        """Method, path, body, headers."""
        if self._break is None:
            return "POST", self._path, self._payload, {"x-request-id": self.name}
        headers = {} if self.last_id is None else {"Last-Event-ID": self.last_id}
        return "GET", f"/v1/streams/{self.name}", None, headers

    def wait_after(self, error: ClientError) -> float:
        """Seconds to wait before `next` is asked; raises what there is to raise when nothing more will help."""
        if self._break is None:
            if not isinstance(error, Disconnected):
                return self._retries.wait_after(error)
            self.broke(error)
        elif isinstance(error, NotFound):
            if error.code != _STREAM_NOT_FOUND or self.delivered:
                raise self._break
            # The request never reached the engine.
            self._break = None
        elif not isinstance(error, Disconnected | Unreachable | Unavailable) or time.monotonic() > self._give_up_at:
            raise self._break
        self._wait_s = min(2 * self._wait_s, _MOST_RESUME_S)
        return self._wait_s * (1 + _JITTER * random.random())

    def broke(self, error: ClientError) -> None:
        """The connection is gone before the end. Raises `error` when the server does not know how to go on."""
        if not self._resumes or not isinstance(error, Disconnected) or (self.delivered and self.last_id is None):
            raise error
        self._break = error
        self._give_up_at = time.monotonic() + RESUME_PATIENCE_S
        self._wait_s = _FIRST_RESUME_S


class Chunks(Generic[Chunk]):
    """One stream's bytes as typed chunks. After each `feed`, hand out its chunks, then look at `done` and `failure`."""

    def __init__(self, kind: type[Chunk], streaming: Streaming) -> None:
        """`streaming` learns how far the stream has come."""
        self._streaming = streaming
        self.done = False
        """The end mark has come."""
        self.failure: ClientError | None = None
        """What the stream broke with: an error event, or bytes that are no chunk."""
        self._decoder = msgspec.json.Decoder(kind)
        self._parser = Parser()

    def feed(self, piece: bytes) -> list[Chunk]:
        """The chunks that `piece` completes, up to the end mark or the failure."""
        chunks: list[Chunk] = []
        try:
            for event in self._parser.feed(piece):
                if event.data == b"[DONE]":
                    self.done = True
                    break
                if error := error_from_event(event.data):
                    raise error
                self._streaming.delivered, self._streaming.last_id = True, event.id
                chunks.append(decode(self._decoder, event.data))
        except EventTooLong as error:
            self.failure = Disconnected(str(error))
        except ClientError as error:
            self.failure = error
        return chunks

    def cut_off(self) -> Disconnected:
        """The error of a connection that ended before the end mark."""
        return Disconnected("the stream ended before its end mark: the answer is not complete")


def decode(decoder: msgspec.json.Decoder[Result], body: bytes) -> Result:
    """A body as its type. Raises `Disconnected` when it is something else, as from a proxy or a server of another kind."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        start = body[:80].decode("utf-8", "replace")
        raise Disconnected(f"the server's answer is not what was expected ({error}): {start!r}") from None
