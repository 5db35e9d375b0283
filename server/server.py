"""The server process: an actor for the supervisor's messages, and the web application beside it on the same loop."""

import asyncio
import errno

from aiohttp import web

from headrace.client.direct import DirectClient
from headrace.engine.errors import UserError
from headrace.engine.messages.lifecycle import Answered, Drain, Drained, EngineState, NewModel, PeerDied, Status, ToServer
from headrace.engine.messages.wire import Message
from headrace.engine.names import SUPERVISOR, tokenizer_names
from headrace.engine.process import Process, Role, read_spec
from headrace.server.app import make_app
from headrace.server.connections import Runner
from headrace.server.meters import RequestMeters
from headrace.server.openai.routes import OpenAIRoutes
from headrace.server.state import EngineView

IDLE_TIMEOUT = 75.0
"""Seconds that a connection may go without a whole request head."""

LINGER_TIMEOUT = 5.0
"""Seconds in which the rest of a refused body is read away, so that whoever still sends it gets to read the answer."""


class Server:
    """The actor. `open` starts to listen."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._view = EngineView(process)
        self._client = DirectClient(process.run_dir, tokenizer_names(process.config))
        meters = RequestMeters(process.metrics)
        self._openai = OpenAIRoutes(self._client, process.config, process.model, meters)
        app = make_app(self._openai, self._view, meters, process.config)
        app.middlewares.insert(0, self._count)
        refused = process.metrics.counter("headrace_connections_refused_total", "HTTP connections beyond the most that are taken.")
        self._runner = Runner(
            app,
            refused,
            shutdown_timeout=0.5,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=IDLE_TIMEOUT,
            lingering_time=LINGER_TIMEOUT,
        )
        self._open_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> str:
        """Listen; the address. `UserError` when the port cannot be had."""
        config = self._process.config
        await self._runner.setup()
        site = web.TCPSite(self._runner, config.host, config.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port {config.port} on {config.host} is in use: choose another with --port") from None
            raise UserError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from None
        host, port = self._runner.addresses[0][:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def receive(self, message: Message) -> None:
        match message:
            case EngineState():
                self._view.turn(message.state)
            case NewModel():
                self._openai.serve(read_spec(self._process.run_dir).model)
            case PeerDied():
                self._process.post.forget(message.name)
                if message.name in tokenizer_names(self._process.config):
                    self._client.tokenizer_died(message.name)
            case Drain():
                self._view.turn("draining")
                asyncio.get_running_loop().create_task(self._drain())
            case Status() | Answered():
                self._view.answered(message)

    def settle(self) -> None:
        """Nothing waits for the end of a burst."""

    async def close(self) -> None:
        await self._runner.cleanup()
        self._client.close()

    async def _drain(self) -> None:
        await self._idle.wait()
        self._process.send(SUPERVISOR, Drained(self._process.name))

    @web.middleware
    async def _count(self, request: web.Request, handler) -> web.StreamResponse:
        """Know when the last answer is out."""
        self._open_requests += 1
        self._idle.clear()
        try:
            return await handler(request)
        finally:
            self._open_requests -= 1
            if not self._open_requests:
                self._idle.set()


async def build(process: Process) -> Server:
    """A server that listens."""
    server = Server(process)
    process.detail = await server.open()
    return server


ROLE = Role(ToServer, build)
