"""The processes of an engine as their supervisor sees them: how each is started, its present life, and what all of them say of themselves.

GetStatus ─▶ ask ─▶ Probe to every child that is ready ─▶ Snapshot ─▶ collect ─▶ Status, with the series of all
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace.engine.actor import Post
from headrace.engine.config import Config
from headrace.engine.fork_server import stat_of
from headrace.engine.messages.lifecycle import ChildStatus, GetStatus, Probe, Progress, Series, Snapshot, Status
from headrace.engine.metrics import Metrics
from headrace.engine.names import SCHEDULER, server_names, tokenizer_names, worker_names

WORKERS = "workers"
"""The group of the worker ranks."""

PROBE_GRACE = 1.0
"""Seconds after which a status is answered without the children that did not."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    name: str
    module: str
    group: str
    """Children of one group are started again together: ranks that lost one of theirs wait in a collective for ever."""


def engine_children(config: Config, worker_module: str) -> list[ChildSpec]:
    """The processes of one engine. The workers come first, as they take longest to be ready."""
    children = [ChildSpec(name, worker_module, WORKERS) for name in worker_names(config)]
    children += [ChildSpec(name, "headrace.tokenizer_proc.tokenizer", name) for name in tokenizer_names(config)]
    children += [ChildSpec(name, "headrace.server.server", name) for name in server_names(config)]
    return [*children, ChildSpec(SCHEDULER, "headrace.engine.scheduler.scheduler", SCHEDULER)]


class Child:
    """One child process: its spec and its present life."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.pid: int | None = None
        """0 while it is asked for and not yet born; None while there is none."""
        self.pidfd = -1
        self.state = "starting"
        self.restarts = -1
        self.incarnation = 0
        self.hangs = 0
        """How often it was killed because it hung."""
        self.born = 0.0
        self.detail = ""
        self.doomed = False
        """It is being killed because one of its group died."""
        self.owes_since: float | None = None
        """When the first sign of life was asked for that has not come, monotonic seconds."""
        self.died: float | None = None
        """When it died that was not meant to, until it is back; monotonic seconds."""
        self.still_since: float | None = None
        """Since when it does nothing although it is still starting, monotonic seconds."""
        self._fate: signal.Signals | None = None
        """What it is to get as soon as it is born."""
        self._cpu_ticks = -1

    def adopt(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        fate, self._fate = self._fate, None
        if fate is not None:
            os.kill(pid, fate)

    def bury(self) -> int:
        """Its exit status, or minus the signal that ended it, once its pidfd is readable."""
        assert self.pid
        os.close(self.pidfd)
        pid, self.pid = self.pid, None
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens when there is no process."""
        if self.pid:
            os.kill(self.pid, number)
        elif self.pid == 0:
            self._fate = number

    def moves(self) -> bool:
        """Whether it has used CPU time since this was last asked, or would if it had a core or its disk's answer."""
        if not self.pid:
            return True
        fields = stat_of(self.pid)
        before, self._cpu_ticks = self._cpu_ticks, sum(map(int, fields[11:13]))
        return fields[0] in "RD" or self._cpu_ticks != before


class _Probing:
    """A status question that waits for the children's snapshots."""

    def __init__(self, question: GetStatus, asked: set[str], timer: asyncio.TimerHandle) -> None:
        self.question = question
        self.asked = asked
        self.timer = timer
        self.series: list[Series] = []
        self.progress: Progress | None = None


class Census:
    """Answers questions about the state of all children; `metrics` are the supervisor's own."""

    def __init__(self, post: Post, children: Mapping[str, Child], metrics: Metrics, state: Callable[[], str]) -> None:
        self._post = post
        self._children = children
        self._metrics = metrics
        self._state = state
        self._probing: dict[int, _Probing] = {}
        self._calls = 0

    def ask(self, question: GetStatus) -> None:
        """Begin to answer."""
        ready = {child.spec.name for child in self._children.values() if child.state == "ready"}
        self._calls += 1
        call = self._calls
        timer = asyncio.get_running_loop().call_later(PROBE_GRACE, self._answer, call)
        self._probing[call] = _Probing(question, ready, timer)
        for name in ready:
            self._post.send(name, Probe(call))
        if not ready:
            self._answer(call)

    def collect(self, snapshot: Snapshot) -> None:
        """A child answered, perhaps too late."""
        probing = self._probing.get(snapshot.call)
        if probing is None:
            return
        probing.asked.discard(snapshot.child)
        probing.series.extend(snapshot.series)
        probing.progress = snapshot.progress or probing.progress
        if not probing.asked:
            self._answer(snapshot.call)

    def _answer(self, call: int) -> None:
        probing = self._probing.pop(call, None)
        if probing is None:
            return
        probing.timer.cancel()
        now = time.monotonic()
        children = [
            ChildStatus(child.spec.name, child.state, child.pid or 0, child.restarts, now - child.born) for child in self._children.values()
        ]
        restarts = [
            Series("headrace_restarts_total", "counter", "Restarts by process.", (("process", child.name),), float(child.restarts))
            for child in children
        ]
        hangs = [
            Series("headrace_hangs_total", "counter", "Processes killed because they hung.", (("process", name),), float(child.hangs))
            for name, child in self._children.items()
        ]
        question = probing.question
        series = restarts + hangs + self._metrics.snapshot() + probing.series
        self._post.send(question.reply_to, Status(question.call, self._state(), children, series, probing.progress))
