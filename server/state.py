"""The engine's state as its server knows it: may requests come in, is work moving, and what do all processes measure?"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from headrace.engine.messages.lifecycle import Answered, Ask, Drained, GetStatus, Status
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
        self._turned = asyncio.Event()
        """Set, and another one, with every change of the state."""
        self._inside = self._held = 0
        """Requests in the engine, and before its door."""
        self._full: Refusal | None = None
        self._full_until = 0.0
        """Until when, in monotonic seconds, the last one that a full queue refused speaks for the next."""
        self._process = process
        self._calls = itertools.count(1)
        self._waiting: dict[int, asyncio.Future] = {}

    def turn(self, state: str) -> None:
        """The engine's state is another."""
        self.state = state
        self._turned.set()
        self._turned = asyncio.Event()
        self._say_if_empty()

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """For the time of a request in the engine. While another model is loaded, requests wait here; while a process recovers, in its
        queue. Raises `Refusal` when no new request may come in."""
        while self.state == "reloading":
            if self._held >= self._process.config.max_waiting:
                message = f"another model is being loaded, and {self._held} requests wait for it already: try again in a moment"
                raise Refusal(message, status=429, code="overloaded")
            self._held += 1
            try:
                await self._turned.wait()
            finally:
                self._held -= 1
        if self.state == "starting":
            raise Refusal("the engine is starting: try again in a moment", status=503, code="starting", retry_after=1)
        if self.state in ("draining", "drained"):
            raise Refusal("the engine is draining and takes no new requests", status=503, code="draining", retry_after=5)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._say_if_empty()

    def hold(self, refusal: Refusal) -> None:
        """The queue is full, and will be for a moment: others need not come as far as to hear of it. Reading, tokenizing and refusing what
        comes anyway would take from those who are served what they need."""
        self._full = Refusal(refusal.message, refusal.param, refusal.status, refusal.code, refusal.retry_after)
        self._full_until = time.monotonic() + refusal.hold_s

    def held(self) -> Refusal | None:
        """What a new request would be told a little later, if that is known. What resumes, or asks for something else, is not meant."""
        if self._full is not None and time.monotonic() >= self._full_until:
            self._full = None
        return self._full

    def _say_if_empty(self) -> None:
        """The model can be exchanged once nothing of it is in use."""
        if self.state == "reloading" and not self._inside:
            self._process.send(SUPERVISOR, Drained(self._process.name))

    async def administer(self, what: str, model: str | None = None, revision: str | None = None) -> Answered:
        """Have the supervisor do what an operator asks for; it takes as long as it takes."""
        call = next(self._calls)
        future = self._waiting[call] = asyncio.get_running_loop().create_future()
        try:
            self._process.send(SUPERVISOR, Ask(call, self._process.name, what, model, revision))
            return await future
        finally:
            del self._waiting[call]

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

    def answered(self, answer: Status | Answered) -> None:
        future = self._waiting.get(answer.call)
        if future and not future.done():
            future.set_result(answer)


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
