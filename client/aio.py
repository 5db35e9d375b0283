"""The asynchronous client: the same calls as `Client`, on an aiohttp session that is opened by the first of them.

    AsyncClient ── await chat(…) ──▶ answer
      └── await chat_stream(…) ──▶ AsyncStream, which owns its connection until it ends or is closed

aiohttp is imported when a client is first used, and only its client half. A client belongs to one event loop.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Unpack

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

if TYPE_CHECKING:
    import aiohttp


class AsyncClient:
    """A client of one OpenAI-compatible server, for asyncio. Parameters, results and errors are those of `Client`."""

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
        self._session: aiohttp.ClientSession | None = None
        self._model: str | None = None

    async def chat(self, messages: Sequence[Message], **parameters: Unpack[ChatParameters]) -> ChatCompletion:
        """The whole answer to a conversation."""
        body = {"messages": messages, **await self._complete(parameters)}
        return await self._ask("POST", "/v1/chat/completions", ChatCompletion, body)

    async def chat_stream(self, messages: Sequence[Message], **parameters: Unpack[ChatParameters]) -> "AsyncStream[ChatCompletionChunk]":
        """The answer as it is made. Returns once the server has accepted; close the stream to stop the answer."""
        body = {"messages": messages, "stream": True, **await self._complete(parameters)}
        return await self._stream("/v1/chat/completions", ChatCompletionChunk, body)

    async def complete(
        self, prompt: str | list[str] | list[int] | list[list[int]], **parameters: Unpack[CompletionParameters]
    ) -> Completion:
        """The continuation of a raw prompt, or of several."""
        return await self._ask("POST", "/v1/completions", Completion, {"prompt": prompt, **await self._complete(parameters)})

    async def complete_stream(
        self, prompt: str | list[str] | list[int] | list[list[int]], **parameters: Unpack[CompletionParameters]
    ) -> "AsyncStream[Completion]":
        """The continuation as it is made; each chunk is a `Completion` with the new text."""
        body = {"prompt": prompt, "stream": True, **await self._complete(parameters)}
        return await self._stream("/v1/completions", Completion, body)

    async def models(self) -> list[Model]:
        """What the server serves."""
        return (await self._ask("GET", "/v1/models", ModelList)).data

    async def tokenize(self, prompt: str | Sequence[Message], *, add_special_tokens: bool | None = None) -> list[int]:
        """The token ids of a text, or of a conversation as the chat template renders it. Needs `/tokenize`, which not every server has."""
        body: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        if add_special_tokens is not None:
            body["add_special_tokens"] = add_special_tokens
        body["model"] = await self.default_model()
        return (await self._ask("POST", "/tokenize", Tokenized, body)).tokens

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        body = {"tokens": list(ids), "model": await self.default_model()}
        return (await self._ask("POST", "/detokenize", Detokenized, body)).prompt

    async def health(self) -> Health:
        """The server's state, asked once, without retries. Raises `Unavailable` while it is not ready or does not move."""
        return await self._ask("GET", "/health", Health, retries=0, empty=HEALTHY)

    async def default_model(self) -> str:
        """The model that is asked for when none is named: the first that the server lists, looked up once."""
        if self._model is None:
            models = await self.models()
            if not models:
                raise Disconnected("the server lists no model: name one")
            self._model = models[0].id
        return self._model

    async def close(self) -> None:
        """Close all connections, those of open streams too."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _complete(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": parameters.get("model") or await self.default_model(), **parameters}

    async def _ask(
        self,
        method: str,
        path: str,
        kind: type[Result],
        body: Mapping[str, Any] | None = None,
        *,
        retries: int | None = None,
        empty: bytes = b"",
    ) -> Result:
        response = await self._send(method, path, body, retries)
        return decode(msgspec.json.Decoder(kind), await _guarded(response.read(), self._timeout) or empty)

    async def _stream(self, path: str, kind: type[Chunk], body: Mapping[str, Any]) -> "AsyncStream[Chunk]":
        streaming = Streaming(path, msgspec.json.encode(body), self._retries)
        return AsyncStream(await self._begin(streaming), kind, self._timeout, streaming, self._begin)

    async def _begin(self, streaming: Streaming) -> "aiohttp.ClientResponse":
        """The stream's response, from its beginning or from where it broke. Tries again as it may."""
        while True:
            try:
                return await self._send_once(*streaming.next())
            except ClientError as error:
                await asyncio.sleep(streaming.wait_after(error))

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, retries: int | None = None) -> "aiohttp.ClientResponse":
        """A response of status 200, its body still unread. Tries again as `retries` allows."""
        payload = None if body is None else msgspec.json.encode(body)
        tries = Retries(self._retries if retries is None else retries)
        while True:
            try:
                return await self._send_once(method, path, payload, {})
            except ClientError as error:
                await asyncio.sleep(tries.wait_after(error))

    async def _send_once(self, method: str, path: str, payload: bytes | None, headers: dict[str, str]) -> "aiohttp.ClientResponse":
        server = self._server
        url, headers = server.origin + server.path + path, server.headers(payload is not None) | headers
        response = await _guarded(self._open().request(method, url, data=payload, headers=headers, allow_redirects=False), self._timeout)
        if response.status == 200:
            return response
        answer = await _guarded(response.read(), self._timeout)
        raise error_from(response.status, answer, response.headers.get("Retry-After"))

    def _open(self) -> "aiohttp.ClientSession":
        if self._session is None:
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout, sock_read=self._timeout)
            # No limit on connections: how many calls run at once is the caller's choice.
            self._session = aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0))
        return self._session


class AsyncStream(Generic[Chunk]):
    """An asynchronous iterator of chunks. Closing it early closes its connection, by which the server knows to stop.

    A stream whose server dies goes on by itself once that is back. Raises what `AsyncClient` raises; an iterator that ends without an
    error has given the whole answer. Leave a loop over it early only
    within `async with`, or call `close`.
    """

    def __init__(
        self,
        response: "aiohttp.ClientResponse",
        kind: type[Chunk],
        timeout: float | None,
        streaming: Streaming,
        begin: Callable[[Streaming], Awaitable["aiohttp.ClientResponse"]],
    ) -> None:
        self._response = response
        self._kind = kind
        self._timeout = timeout
        self._streaming = streaming
        self._begin = begin
        self._chunks = Chunks(kind, streaming)
        self._ready: deque[Chunk] = deque()
        self._open = True

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._ready:
            if not self._open:
                raise StopAsyncIteration
            if self._chunks.failure is not None:
                self.close()
                raise self._chunks.failure
            if self._chunks.done:
                await self._finish()
                continue
            try:
                piece = await _guarded(self._response.content.readany(), self._timeout)
                if not piece:
                    raise self._chunks.cut_off()
            except ClientError as error:
                await self._go_on_after(error)
                continue
            self._ready.extend(self._chunks.feed(piece))
        return self._ready.popleft()

    async def _go_on_after(self, error: ClientError) -> None:
        """Ask for the rest after a break. Raises when there is none to be had."""
        self._response.close()
        try:
            self._streaming.broke(error)
            self._response = await self._begin(self._streaming)
        except BaseException:
            self.close()
            raise
        self._chunks = Chunks(self._kind, self._streaming)

    def close(self) -> None:
        """Stop: the connection is closed, and the iterator is at its end. Does nothing to a stream that has ended."""
        if self._open:
            self._open = False
            self._ready.clear()
            self._response.close()

    async def __aenter__(self) -> "AsyncStream[Chunk]":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _finish(self) -> None:
        """After the end mark only the end of the HTTP body is left; with that read, aiohttp takes the connection back by itself."""
        import aiohttp

        with contextlib.suppress(TimeoutError, OSError, aiohttp.ClientError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                self._open = bool(await self._response.content.readany())
        self.close()


async def _guarded(act: Awaitable[Result], timeout: float | None) -> Result:
    """Do one thing with a connection, and turn what it raises into this library's errors."""
    import aiohttp

    try:
        return await act
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise Unreachable(f"no connection to the server: {error}") from None
    except TimeoutError:
        raise Timeout(f"the server sent nothing for {timeout:g} s") from None
    except (OSError, aiohttp.ClientError) as error:
        raise Disconnected(f"the connection to the server broke: {error or type(error).__name__}") from None
