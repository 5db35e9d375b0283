"""The engine's state as its server knows it: may requests come in, is work moving, and what do all processes measure?"""

import asyncio
import itertools

from headrace.engine.messages.lifecycle import GetStatus, Status
from headrace.engine.messages.openai.responses import Health, ProcessHealth
from headrace.engine.names import SUPERVISOR
from headrace.engine.process import Process
from headrace.server.openai.errors import Refusal

STATUS_TIMEOUT = 2.0
"""Seconds to wait for the supervisor's word."""

STALLED = 60.0
"""Seconds without a step, while requests run, after which the engine counts as stalled."""


class EngineView:
    """What the supervisor tells."""

    def __init__(self, process: Process) -> None:
        self.state = "starting"
        self._process = process
        self._calls = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Status]] = {}

    def check_open(self) -> None:
        """Raise `Refusal` when no new request may come in. While a process recovers, requests wait in its queue."""
        if self.state == "starting":
            raise Refusal("the engine is starting: try again in a moment", status=503, code="starting", retry_after=1)
        if self.state == "draining":
            raise Refusal("the server is shutting down and takes no new requests", status=503, code="draining", retry_after=5)

    async def status(self) -> Status | None:
        """The supervisor's status, or None when it does not answer."""
        call = next(self._calls)
        future = self._waiting[call] = asyncio.get_running_loop().create_future()
        try:
            self._process.send(SUPERVISOR, GetStatus(call, self._process.name))
            return await asyncio.wait_for(future, STATUS_TIMEOUT)
        except TimeoutError:
            return None
        finally:
            del self._waiting[call]

    def answered(self, status: Status) -> None:
        future = self._waiting.get(status.call)
        if future and not future.done():
            future.set_result(status)


def health_of(status: Status | None) -> Health:
    """Health is progress: with work pending, steps must end."""
    if status is None:
        return Health("stalled")
    processes = [ProcessHealth(child.name, child.state, child.pid, child.restarts, child.uptime_s) for child in status.children]
    health = Health("ok" if status.state == "ready" else status.state, processes=processes)
    progress = status.progress
    if progress is not None:
        health.running, health.waiting, health.step = progress.running, progress.waiting, progress.step
        health.last_step_age_s = progress.last_step_age_s
        if health.status == "ok" and progress.running and (progress.last_step_age_s or 0.0) > STALLED:
            health.status = "stalled"
    return health
