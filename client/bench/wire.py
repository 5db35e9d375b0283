"""The load generator's own HTTP/1.1 connection: it measures a stream without understanding more of it than it must.

    request bytes ──▶ Connection ──▶ chunked or plain body ──▶ SSE blocks ──▶ Sample.times

A general HTTP client costs tens of microseconds for each streamed token, which at 20,000 tokens a second would be most of a core
and would show in the figures. So the body is decoded here, chunks that carry text are told from others by a byte pattern, and JSON
is parsed only for the last few events of a stream, where the usage is. Nothing here knows of prompts or schedules.
"""

import asyncio
import re
import ssl
from collections import deque
from time import perf_counter

import msgspec

from headrace.client.calls import Server
from headrace.client.sse import Parser

_HAS_TEXT = re.compile(rb'"(?:text|content|reasoning|reasoning_content)":\s*"[^"]')
_FINISHES = re.compile(rb'"finish_reason":\s*"(\w+)"')
_MAX_HEAD_BYTES = 64 << 10
_CONNECT_TIMEOUT_S = 10.0


def request_bytes(server: Server, method: str, path: str, body: bytes = b"", close: bool = False) -> bytes:
    """One request as it goes over the wire. With `close` the server is to hang up after it."""
    lines = [f"{method} {server.path}{path} HTTP/1.1", f"Host: {server.origin.partition('://')[2]}"]
    lines += [f"{name}: {value}" for name, value in server.headers(bool(body)).items()]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class Sample:
    """What was seen of one request. Times are seconds on the `perf_counter` clock."""

    __slots__ = ("body", "done", "ended", "error", "finish_reason", "sent", "status", "tail", "times", "tokens_wanted")

    def __init__(self, tokens_wanted: int = 0) -> None:
        self.tokens_wanted = tokens_wanted
        self.sent = 0.0
        self.ended = 0.0
        self.times: list[float] = []
        """When each chunk with text came."""
        self.status = 0
        self.done = False
        """The stream said `[DONE]`."""
        self.finish_reason: str | None = None
        self.tail: deque[bytes] = deque(maxlen=4)
        """The last events' data."""
        self.body = bytearray()
        """The body of a response that is no event stream."""
        self.error: str | None = None
        """The kind of failure; None when all went well."""


class Connection(asyncio.Protocol):
    """One kept-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.usable = True
        self.requests = 0
        self._transport: asyncio.Transport | None = None
        self._sample: Sample | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._rest = b""
        self._in_head = True
        self._chunked = False
        self._remaining: int | None = None
        """Bytes of a plain body still to come; None when it goes on until the connection closes."""
        self._events = False
        self._open_block = b""
        self._parser: Parser | None = None
        self._keep = True

    def exchange(self, request: bytes, sample: Sample) -> asyncio.Future[None]:
        """Send a request; the future is done when the response has ended, well or not (see `sample.error`)."""
        self._sample = sample
        self._in_head, self._rest, self._open_block, self._parser = True, b"", b"", None
        self.requests += 1
        self._waiter = asyncio.get_running_loop().create_future()
        if self._transport is None or not self.usable:
            self._finish("disconnected")
        else:
            self._transport.write(request)
        return self._waiter

    def abandon(self, error: str) -> None:
        """Give the response up and close: a timeout, or the end of the run."""
        self.usable = False
        if self._transport:
            self._transport.abort()
        self._finish(error)

    def close(self) -> None:
        self.usable = False
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._sample is None:
            return
        if not self._in_head and not self._chunked and self._remaining is None:
            self._finish(None)
        else:
            self._finish("disconnected")

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if self._sample is None:
            # Bytes that nobody asked for: the server breaks the protocol, or says that it closes.
            self.abandon("protocol")
            return
        try:
            if self._rest:
                data = self._rest + data
                self._rest = b""
            if self._in_head:
                data = self._take_head(data)
                if self._in_head:
                    return
            if self._chunked:
                self._take_chunks(data, now)
            elif self._remaining is None:
                self._take_body(data, now)
            else:
                self._remaining -= len(data)
                if data:
                    self._take_body(data, now)
                if self._remaining <= 0:
                    self._finish(None)
        except ValueError:
            self.abandon("protocol")

    def _take_head(self, data: bytes) -> bytes:
        """Read the status line and the headers; what is left of `data` is body."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > _MAX_HEAD_BYTES:
                raise ValueError("a response head without end")
            self._rest = data
            return b""
        status, *lines = data[:end].split(b"\r\n")
        code = int(status.split(b" ", 2)[1])
        data = data[end + 4 :]
        if code < 200:
            return self._take_head(data)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        assert self._sample is not None
        self._sample.status = code
        self._events = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        length = headers.get(b"content-length")
        self._remaining = None if length is None else int(length)
        self._keep = headers.get(b"connection", b"").lower() != b"close" and status.startswith(b"HTTP/1.1")
        self._in_head = False
        return data

    def _take_chunks(self, data: bytes, now: float) -> None:
        position, length = 0, len(data)
        while position < length:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                break
            size = int(data[position:line_end].partition(b";")[0], 16)
            if size == 0:
                if data[line_end + 2 : line_end + 4] == b"\r\n" or data.find(b"\r\n\r\n", line_end) >= 0:
                    self._finish(None)
                    return
                break
            start = line_end + 2
            stop = start + size
            if length < stop + 2:
                break
            self._take_body(data[start:stop], now)
            position = stop + 2
        self._rest = data[position:]

    def _take_body(self, data: bytes, now: float) -> None:
        sample = self._sample
        assert sample is not None
        if not self._events:
            sample.body += data
        elif self._parser is not None:
            for event in self._parser.feed(data):
                self._take_event(event.data, now)
        elif b"\r" in data:
            # Rare: a server that ends its lines in CRLF. The full parser takes over for this response.
            self._parser = Parser()
            self._take_body(self._open_block + data, now)
        else:
            if self._open_block:
                data = self._open_block + data
            if data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2:
                self._open_block = b""
                self._take_event(data, now)
            else:
                *blocks, self._open_block = data.split(b"\n\n")
                for block in blocks:
                    self._take_event(block, now)

    def _take_event(self, block: bytes, now: float) -> None:
        sample = self._sample
        assert sample is not None
        if _HAS_TEXT.search(block):
            sample.times.append(now)
        elif block.startswith(b":"):
            return
        elif len(block) < 64 and b"[DONE]" in block:
            sample.done = True
            return
        sample.tail.append(block)

    def _finish(self, error: str | None) -> None:
        sample, waiter = self._sample, self._waiter
        if sample is None:
            return
        self._sample = self._waiter = None
        self._rest = b""
        sample.ended = perf_counter()
        if not self._keep:
            self.close()
        sample.error = error or _verdict(sample, self._events)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _verdict(sample: Sample, is_stream: bool) -> str | None:
    """What a response that ended as HTTP ends amounts to."""
    if sample.status != 200:
        return f"http {sample.status}"
    if not is_stream:
        return None
    for block in reversed(sample.tail):
        if b'"error"' in block and not _HAS_TEXT.search(block):
            return "error event"
        if found := _FINISHES.search(block):
            sample.finish_reason = found[1].decode()
            return None
    return None if sample.done else "incomplete stream"


class Pool:
    """Idle connections to one server; a new one is opened when none is idle."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        self.server = server
        self.timeout_s = timeout_s
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._tls = ssl.create_default_context() if server.scheme == "https" else None

    async def open(self, count: int) -> None:
        """Have `count` idle connections. Raises `OSError`."""
        self._idle = [one for one in self._idle if one.usable]
        for _ in range(count - len(self._idle)):
            self._idle.append(await self._connect())

    async def send(self, request: bytes, sample: Sample, started: float | None = None) -> None:
        """One request from first byte to last; failures are recorded in `sample`, never raised.

        `started` is when the request was due, where it was due before now; the latencies count from it.
        """
        sample.sent = perf_counter() if started is None else started
        while True:
            connection = None
            while self._idle and connection is None:
                connection = self._idle.pop()
                if not connection.usable:
                    connection = None
            try:
                connection = connection or await self._connect()
            except (TimeoutError, OSError):
                sample.error = "connect"
                sample.ended = perf_counter()
                return
            self._busy.add(connection)
            reused = connection.requests > 0
            waiter = connection.exchange(request, sample)
            clock = asyncio.get_running_loop().call_later(self.timeout_s, connection.abandon, "timeout")
            try:
                await waiter
            except asyncio.CancelledError:
                connection.abandon("cancelled")
                raise
            finally:
                clock.cancel()
                self._busy.discard(connection)
            if sample.error == "disconnected" and reused and sample.status == 0:
                # The server closed the idle connection as we wrote to it: HTTP asks us to try on a new one.
                sample.error = None
                continue
            if connection.usable:
                self._idle.append(connection)
            return

    def abandon(self) -> None:
        """End every request in flight, as "cancelled"."""
        for connection in list(self._busy):
            connection.abandon("cancelled")

    def close(self) -> None:
        self.abandon()
        for connection in self._idle:
            connection.close()
        self._idle = []

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        making = loop.create_connection(Connection, self.server.host, self.server.port, ssl=self._tls)
        _, connection = await asyncio.wait_for(making, _CONNECT_TIMEOUT_S)
        return connection


async def ask(server: Server, method: str, path: str, body: object = None, timeout_s: float = 60.0) -> tuple[int, bytes]:
    """One plain request on a connection of its own: (status, body). Raises `OSError` when the server cannot be reached or goes away."""
    pool = Pool(server, timeout_s)
    sample = Sample()
    payload = b"" if body is None else msgspec.json.encode(body)
    await pool.send(request_bytes(server, method, path, payload, close=True), sample)
    pool.close()
    if sample.status == 0 or sample.error in ("disconnected", "timeout", "protocol"):
        raise ConnectionError(f"no answer from {server.origin}{server.path}{path}: {sample.error}")
    return sample.status, bytes(sample.body)
