"""Server-sent events straight to the socket.

A token is written by the callback that brings it: no task, no queue, no coroutine in between. aiohttp sends the headers and ends the
response; the events between are framed here as HTTP chunks (RFC 9112 §7.1), or not at all for a client of HTTP/1.0, to whom the end of
the connection is the end of the answer. A client that reads too slowly is not waited for: while its socket is full nothing is written,
and its events are asked for again, merged, once there is room.

    event ─▶ "data: …\n\n" ─▶ chunk ─▶ transport        full? ─▶ on_room() later
"""

import asyncio
from collections.abc import Callable

from aiohttp import HttpVersion11, web

SOCKET_FULL = 64 * 1024
"""Bytes waiting for a client beyond which nothing more is written to it."""

STALL_TIMEOUT = 300.0
"""Seconds that a client may leave its socket full before it is hung up on: it may still be there, but it does not read."""


class EventStream:
    """One response that streams events."""

    def __init__(self, request: web.Request, on_room: Callable[[], None]) -> None:
        self._request = request
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._chunked = request.version >= HttpVersion11
        self._transport: asyncio.Transport | None = None
        self._on_room = on_room
        self._draining: asyncio.Task | None = None
        self._closing = False

    async def open(self, headers: dict[str, str]) -> None:
        """Send the headers; from now on events can be written."""
        self._response.headers.update(headers)
        if self._chunked:
            self._response.enable_chunked_encoding()
        else:
            self._response.force_close()
        await self._response.prepare(self._request)
        # aiohttp holds the headers back until something is written; a comment is an event that says nothing.
        await self._response.write(b":\n\n")
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        self._transport = transport  # type: ignore[assignment]

    @property
    def full(self) -> bool:
        """Whether the client is behind, or the stream not open yet, or about to end. What would be written now must wait for `on_room`."""
        return self._transport is None or self._draining is not None or self._closing

    def write(self, event: bytes) -> None:
        """Send `event`, a whole `data: …` with its blank line. Never while `full`."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(b"%x\r\n%b\r\n" % (len(event), event) if self._chunked else event)
        if transport.get_write_buffer_size() > SOCKET_FULL and self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def close(self, last: bytes) -> None:
        """End the response with the events `last`, which nothing follows; waits until the client has taken it."""
        self._closing = True
        if self._draining:
            await self._draining
        try:
            async with asyncio.timeout(STALL_TIMEOUT):
                await self._response.write_eof(last)
        except TimeoutError:
            if self._transport:
                self._transport.abort()
            raise ConnectionResetError("the client does not read the end of its answer") from None

    @property
    def response(self) -> web.StreamResponse:
        return self._response

    async def _drain(self) -> None:
        """Wait until the socket has room, then let the writer catch up."""
        try:
            async with asyncio.timeout(STALL_TIMEOUT):
                await self._request.protocol._drain_helper()  # aiohttp's own wait for resume_writing
        except TimeoutError:
            if self._transport:
                self._transport.abort()
            return
        except ConnectionError:
            # The client is gone; whoever handles the request hears of it by itself.
            return
        finally:
            self._draining = None
        self._on_room()
