"""The synchronous client: the standard library's HTTP, kept-alive connections, typed answers.

    Client ── chat, complete, … ──▶ one connection from the idle ones ──▶ server
      └── chat_stream, complete_stream ──▶ Stream, which owns its connection until it ends or is closed

May be used from several threads: a connection belongs to one call at a time. Nothing here knows of event loops.
"""

import contextlib
import http.client
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Unpack

import msgspec

from headrace.client.calls import DEFAULT_URL, DRAIN_TIMEOUT_S, HEALTHY, Chunk, Chunks, Message, Result, Retries, Server, Streaming, decode
from headrace.client.errors import ClientError, Disconnected, Timeout, Unreachable, error_from
from headrace.client.parameters import ChatParameters, CompletionParameters
from headrace.engine.messages.openai.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Detokenized,
    Health,
    Model,
    ModelList,
    Tokenized,
)

Exchange = tuple[http.client.HTTPConnection, http.client.HTTPResponse]
"""A connection and the response that is being read from it."""

_READ_BYTES = 64 << 10


class Client:
    """A client of one OpenAI-compatible server.

    `timeout` is the longest silence of the server that is waited for, in seconds (None: for ever); a stream that goes on never times out.
    `retries` is how often a request is sent again after 429 or 503 (honouring Retry-After), or when the connection was refused.

    Every method raises `ClientError`: `Unreachable`, `Timeout`, `Disconnected`, or an `APIError` by status. Use it as a context manager
    or call `close`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float | None = 600.0,
        connect_timeout: float = 5.0,
        retries: int = 2,
    ) -> None:
        self._server = Server.parse(base_url, api_key)
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._retries = retries
        self._idle: list[http.client.HTTPConnection] = []
        self._model: str | None = None

    def chat(self, messages: Sequence[Message], **parameters: Unpack[ChatParameters]) -> ChatCompletion:
        """The whole answer to a conversation."""
        return self._ask("POST", "/v1/chat/completions", ChatCompletion, {"messages": messages, **self._complete(parameters)})

    def chat_stream(self, messages: Sequence[Message], **parameters: Unpack[ChatParameters]) -> "Stream[ChatCompletionChunk]":
        """The answer as it is made. Returns once the server has accepted; close the stream to stop the answer."""
        body = {"messages": messages, "stream": True, **self._complete(parameters)}
        return self._stream("/v1/chat/completions", ChatCompletionChunk, body)

    def complete(self, prompt: str | list[str] | list[int] | list[list[int]], **parameters: Unpack[CompletionParameters]) -> Completion:
        """The continuation of a raw prompt, or of several."""
        return self._ask("POST", "/v1/completions", Completion, {"prompt": prompt, **self._complete(parameters)})

    def complete_stream(
        self, prompt: str | list[str] | list[int] | list[list[int]], **parameters: Unpack[CompletionParameters]
    ) -> "Stream[Completion]":
        """The continuation as it is made; each chunk is a `Completion` with the new text."""
        body = {"prompt": prompt, "stream": True, **self._complete(parameters)}
        return self._stream("/v1/completions", Completion, body)

    def models(self) -> list[Model]:
        """What the server serves."""
        return self._ask("GET", "/v1/models", ModelList).data

    def tokenize(self, prompt: str | Sequence[Message], *, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text, or of a conversation as the chat template renders it. Needs `/tokenize`, which not every server has."""
        body: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        if add_special_tokens is not None:
            body["add_special_tokens"] = add_special_tokens
        body["model"] = self.default_model()
        return self._ask("POST", "/tokenize", Tokenized, body).tokens

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._ask("POST", "/detokenize", Detokenized, {"tokens": list(ids), "model": self.default_model()}).prompt

    def health(self) -> Health:
        """The server's state, asked once, without retries. Raises `Unavailable` while it is not ready or does not move."""
        return self._ask("GET", "/health", Health, retries=0, empty=HEALTHY)

    def default_model(self) -> str:
        """The model that is asked for when none is named: the first that the server lists, looked up once."""
        if self._model is None:
            models = self.models()
            if not models:
                raise Disconnected("the server lists no model: name one")
            self._model = models[0].id
        return self._model

    def close(self) -> None:
        """Close the idle connections. Streams that are open stay so."""
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complete(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": parameters.get("model") or self.default_model(), **parameters}

    def _ask(
        self,
        method: str,
        path: str,
        kind: type[Result],
        body: Mapping[str, Any] | None = None,
        *,
        retries: int | None = None,
        empty: bytes = b"",
    ) -> Result:
        connection, response = self._send(method, path, body, retries)
        try:
            answer = _guarded(response.read, self._timeout)
        except ClientError:
            connection.close()
            raise
        self._release(connection, response)
        return decode(msgspec.json.Decoder(kind), answer or empty)

    def _stream(self, path: str, kind: type[Chunk], body: Mapping[str, Any]) -> "Stream[Chunk]":
        streaming = Streaming(path, msgspec.json.encode(body), self._retries)
        return Stream(self._begin(streaming), kind, self._timeout, streaming, self._begin, self._release)

    def _begin(self, streaming: Streaming) -> Exchange:
        """The stream's response, from its beginning or from where it broke. Tries again as it may."""
        while True:
            try:
                return self._send_once(*streaming.next())
            except ClientError as error:
                time.sleep(streaming.wait_after(error))

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, retries: int | None = None) -> Exchange:
        """A response of status 200, its body still unread. Tries again as `retries` allows."""
        payload = None if body is None else msgspec.json.encode(body)
        tries = Retries(self._retries if retries is None else retries)
        while True:
            try:
                return self._send_once(method, path, payload, {})
            except ClientError as error:
                time.sleep(tries.wait_after(error))

    def _send_once(self, method: str, path: str, payload: bytes | None, headers: dict[str, str]) -> Exchange:
        connection = self._connection()
        headers = self._server.headers(payload is not None) | headers

        def exchange() -> http.client.HTTPResponse:
            connection.request(method, self._server.path + path, payload, headers)
            return connection.getresponse()

        try:
            response = _guarded(exchange, self._timeout)
            if response.status == 200:
                return connection, response
            answer = _guarded(response.read, self._timeout)
        except BaseException:
            connection.close()
            raise
        self._release(connection, response)
        raise error_from(response.status, answer, response.headers.get("Retry-After"))

    def _connection(self) -> http.client.HTTPConnection:
        """An idle connection that the server has not closed meanwhile, or a new one."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._connect()
            if connection.sock is not None and not _is_readable(connection.sock):
                return connection
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        server = self._server
        if server.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(server.host, server.port, timeout=self._connect_timeout, context=context)
        else:
            connection = http.client.HTTPConnection(server.host, server.port, timeout=self._connect_timeout)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise Unreachable(f"no connection to {server.origin}: {error}") from None
        connection.sock.settimeout(self._timeout)
        return connection

    def _release(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        if response.isclosed() and connection.sock is not None:
            self._idle.append(connection)
        else:
            connection.close()


class Stream(Generic[Chunk]):
    """An iterator of chunks. Closing it early closes its connection, by which the server knows to stop.

    A stream whose server dies goes on by itself once that is back. Raises what `Client` raises; an iterator that ends without an error
    has given the whole answer.
    """

    def __init__(
        self,
        exchange: Exchange,
        kind: type[Chunk],
        timeout: float | None,
        streaming: Streaming,
        begin: Callable[[Streaming], Exchange],
        release: Callable[[http.client.HTTPConnection, http.client.HTTPResponse], None],
    ) -> None:
        self._connection, self._response = exchange
        self._kind = kind
        self._timeout = timeout
        self._streaming = streaming
        self._begin = begin
        self._release = release
        self._chunks = Chunks(kind, streaming)
        self._ready: deque[Chunk] = deque()
        self._open = True

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while not self._ready:
            if not self._open:
                raise StopIteration
            if self._chunks.failure is not None:
                self.close()
                raise self._chunks.failure
            if self._chunks.done:
                self._finish()
                continue
            try:
                piece = _guarded(lambda: self._response.read1(_READ_BYTES), self._timeout)
                if not piece:
                    raise self._chunks.cut_off()
            except ClientError as error:
                self._go_on_after(error)
                continue
            self._ready.extend(self._chunks.feed(piece))
        return self._ready.popleft()

    def _go_on_after(self, error: ClientError) -> None:
        """Ask for the rest after a break. Raises when there is none to be had."""
        self._connection.close()
        try:
            self._streaming.broke(error)
            self._connection, self._response = self._begin(self._streaming)
        except BaseException:
            self.close()
            raise
        self._chunks = Chunks(self._kind, self._streaming)

    def close(self) -> None:
        """Stop: the connection is closed, and the iterator is at its end. Does nothing to a stream that has ended."""
        if self._open:
            self._open = False
            self._ready.clear()
            self._connection.close()
            self._response.close()

    def __enter__(self) -> "Stream[Chunk]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()

    def _finish(self) -> None:
        """After the end mark only the end of the HTTP body is left; with that read, the connection serves again."""
        sock = self._connection.sock  # None when the server ends the connection with this answer
        if sock is not None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                sock.settimeout(DRAIN_TIMEOUT_S)
                if not self._response.read1(_READ_BYTES) and self._response.isclosed():
                    sock.settimeout(self._timeout)
                    self._open = False
                    self._release(self._connection, self._response)
        self.close()


def _guarded(act: Callable[[], Result], timeout: float | None) -> Result:
    """Do one thing with a connection, and turn what it raises into this library's errors."""
    try:
        return act()
    except TimeoutError:
        raise Timeout(f"the server sent nothing for {timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Disconnected(f"the connection to the server broke: {error or type(error).__name__}") from None


def _is_readable(sock: socket.socket) -> bool:
    """Of an idle connection: the server has closed it, or sent what nobody asked for."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
