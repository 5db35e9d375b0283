"""Connections: how many there may be, how long one may take to be read, and what is answered to bytes that are no HTTP.

    accept ─▶ too many? ─▶ 503, closed
    head, body ─▶ aiohttp's parser ─▶ handlers (`server.app`) ─▶ response ─▶ not read for STALL_TIMEOUT? ─▶ hung up on
                    └─ malformed, or longer than its limits ─▶ 400 or 431 in OpenAI's shape, closed

aiohttp itself bounds a head's lines and fields, and (`keepalive_timeout`) the time until it is whole; `server.app` bounds a body. What one
that streams leaves unread is `server.sse`'s.
"""

import asyncio
import resource
from typing import Any

from aiohttp import http_exceptions, web

from headrace.engine.metrics import Counter
from headrace.server import sse
from headrace.server.openai.errors import Refusal

LONGEST_LINE = 8190
"""Bytes of the request line, and of one header."""

MOST_HEADERS = 128

MOST_CONNECTIONS = 10_000
"""At once; fewer where the system allows fewer open files."""

SPARE_FILES = 128
"""Descriptors that are left for sockets between the processes, and for files."""


def most_connections() -> int:
    """How many connections there may be at once. Beyond the system's limit of open files none could even be refused."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, soft - SPARE_FILES))


class Connection(web.RequestHandler):
    """One client's."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        listener = self._manager
        assert isinstance(listener, Listener)
        if len(listener.connections) > listener.most:
            listener.refused.add()
            self.transport.write(listener.refusal)  # type: ignore[union-attr]
            self.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to what could not be parsed, or to a failure outside all handlers."""
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer has begun: it cannot become an error")
        if isinstance(exc, http_exceptions.LineTooLong):
            text = f"the request line or a header has more than {LONGEST_LINE} bytes: send shorter ones"
            refusal = Refusal(text, status=431, code="head_too_large")
        elif status < 500:
            what = (message or "it cannot be read").strip().partition("\n")[0].rstrip(":")[:200]
            refusal = Refusal(f"this is no HTTP request: {what}", status=status, code="malformed_http")
        else:
            self.log_exception("a request failed outside its handler", exc_info=exc)
            refusal = Refusal("internal error: the server's log has the details", status=status, code="internal_error")
        response = refusal.response()
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write the answer out, as long as somebody reads it."""
        try:
            async with asyncio.timeout(sse.STALL_TIMEOUT):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the client does not read its answer") from None


class Listener(web.Server):
    """Makes the connections of one server. `refused` counts those that were too many."""

    def __init__(self, server: web.Server, refused: Counter, options: dict[str, Any]) -> None:
        super().__init__(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            loop=asyncio.get_running_loop(),
        )
        self.most = most_connections()
        self.refused = refused
        self._options = options
        refusal = Refusal(
            f"the server has {self.most} connections, which is all it takes: try again in a moment", status=503, code="overloaded"
        )
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: "
        )
        body = refusal.body()
        self.refusal = f"{head}{len(body)}\r\n\r\n".encode() + body

    def __call__(self) -> Connection:
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
            max_headers=MOST_HEADERS,
            **self._options,
        )


class Runner(web.AppRunner):
    """aiohttp's runner of an application, with connections as above; `options` are those of `web.RequestHandler`."""

    def __init__(self, app: web.Application, refused: Counter, shutdown_timeout: float, **options: Any) -> None:
        super().__init__(app, handler_cancellation=True, shutdown_timeout=shutdown_timeout)
        self._refused = refused
        self._options = options

    async def _make_server(self) -> web.Server:
        return Listener(await super()._make_server(), self._refused, self._options)
