"""The supervisor: starts the engine's processes, sees them die, starts them again, and ends them all.

It follows Erlang's supervisors. Each child has a `ChildSpec` (how to start it, which group dies with it), is forked by the fork server, and
says `Started` when it is ready. A death is seen at once through the child's pidfd; the siblings are told, the child is started anew. Too
many deaths in too short a time mean that starting again does not help, and the engine stops with a message.

A child can also hang: stopped from outside, or stuck in a call. So each is asked for a sign of life now and then, and the scheduler tells
for how long it has waited for a step. Who owes an answer for too long, or does nothing while it starts, is killed (`engine/pulse.py`), and
what follows is the same as after any death.

    starting ─▶ ready ◀─▶ recovering
                 │ └──▶ draining ─▶ stopped, or drained until told to resume
                 └◀───▶ reloading: servers hold back what is new until all other children serve another model

All of that is one state machine over the same few children, which is why the file is as long as it is. It never touches a request. SIGINT
ends everything at once; SIGTERM drains first; when the supervisor itself dies, the death pipe (see `engine.process`) takes all along.
"""

import asyncio
import contextlib
import itertools
import logging
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
import uvloop
import zmq

from headrace.engine.actor import Mailbox, Post, endpoint
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.children import Census, Child, ChildSpec, engine_children
from headrace.engine.config import Config
from headrace.engine.doors import RESUMING, Doors
from headrace.engine.errors import UserError
from headrace.engine.fork_server import ForkServer
from headrace.engine.messages.lifecycle import (
    Answered,
    Ask,
    Born,
    Drain,
    Drained,
    EngineState,
    Fatal,
    FromChild,
    GetStatus,
    NewModel,
    PeerDied,
    Probe,
    Restart,
    Snapshot,
    Started,
)
from headrace.engine.messages.wire import Message
from headrace.engine.metrics import REJECTED_FRAMES, REJECTED_FRAMES_HELP, Metrics
from headrace.engine.names import SCHEDULER, SUPERVISOR, server_names
from headrace.engine.process import BIRTH_FILE, EXIT_FATAL, EngineSpec
from headrace.engine.pulse import PULSE, Pulse
from headrace.engine.run_dir import make_run_dir

log = logging.getLogger(__name__)

RESTART_WINDOW = 60.0
"""More deaths than `max_restarts` within this many seconds end the engine."""

STOP_GRACE = 1.0
"""Seconds that children get between SIGTERM and SIGKILL."""

FATAL_GRACE = 0.5
"""Seconds to wait for the message of a child that ended with EXIT_FATAL."""

OPENING = 0
"""The call by which a server shows that it has read the engine's state before it."""


class Supervisor:
    """Owns the processes of `children`, which `forks` starts. `on_ready` is called once, with the server's address, when the engine first
    takes requests."""

    def __init__(
        self, config: Config, model: ModelFiles, children: list[ChildSpec], on_ready: Callable[[str], None], forks: ForkServer
    ) -> None:
        self._config = config
        self._forks = forks
        self._run_dir = make_run_dir()
        self._context = zmq.Context()
        self._post = Post(self._context, self._run_dir)
        self._on_ready = on_ready
        self._children = {spec.name: Child(spec) for spec in children}
        self._servers = set(server_names(config))
        self._unopened = self._servers & set(self._children)
        """Servers that do not know yet that the engine is ready for the first time."""
        self._deaths: deque[float] = deque()
        self._incarnations = itertools.count(1)
        self._state = "starting"
        self._metrics = Metrics()
        self._rejected = self._metrics.counter(REJECTED_FRAMES, REJECTED_FRAMES_HELP, (("process", SUPERVISOR),))
        self._census = Census(self._post, self._children, self._metrics, lambda: self._state)
        self._pulse = Pulse(self._post, self._children, config.hang_timeout, self._put_down, forks)
        self._doors = Doors(self._post)
        self._leaving = False
        """Whether the end follows once all is drained."""
        self._reload: asyncio.Task | None = None
        self._changing: asyncio.Future[str] | None = None
        """While the children start with another model: why they cannot, or nothing once all are ready."""
        self._all_dead = asyncio.Event()
        self._done: asyncio.Future[int] | None = None
        """The exit status, once the engine is to end."""
        self._spec = EngineSpec(config, model)
        self._write_spec()

    async def run(self) -> int:
        """Start everything and live until told to stop; the exit status."""
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        mailbox = Mailbox(self._context, endpoint(self._run_dir, SUPERVISOR), FromChild, self._rejected)
        mailbox.open(self)
        loop.add_signal_handler(signal.SIGINT, self._end, 0)
        loop.add_signal_handler(signal.SIGTERM, self._drain)
        self._forks.open(loop, self._born, self._fork_server_died)
        try:
            for child in self._children.values():
                self._start(child)
            pulse = loop.create_task(self._pulse.feel_all())
            try:
                return await self._done
            finally:
                pulse.cancel()
        finally:
            await self._stop()
            mailbox.close()
            self._post.close()
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def receive(self, message: Message) -> None:
        sender = message.reply_to if isinstance(message, GetStatus | Ask) else getattr(message, "child", None)
        if sender is not None and sender not in self._children:
            self._rejected.add()
            return
        match message:
            case Started():
                self._started(message)
            case Fatal():
                if not self._changed(message.message):
                    self._fail(message.message)
            case Snapshot(call=call):
                if call == PULSE:
                    self._pulse.felt(message)
                elif call == OPENING:
                    self._opened(message.child)
                elif call == RESUMING:
                    self._doors.opened()
                else:
                    self._census.collect(message)
            case GetStatus():
                self._census.ask(message)
            case Drained():
                if self._doors.drained(message.child):
                    if self._leaving:
                        self._end(0)
                    elif self._state == "draining":
                        self._turn("drained")
            case Ask():
                self._administer(message)
            case Restart():
                for name in message.names:
                    if child := self._children.get(name):
                        self._put_down(child, message.why)

    def settle(self) -> None:
        """Nothing waits for the end of a burst."""

    # Life and death

    def _start(self, child: Child) -> None:
        child.restarts += 1
        child.incarnation = next(self._incarnations)
        child.state = "starting" if child.restarts == 0 else "restarting"
        child.born = time.monotonic()
        child.owes_since = child.still_since = None
        child.pid = 0
        self._ask_for(child)

    def _ask_for(self, child: Child) -> None:
        self._forks.bear(child.spec.module, self._run_dir, child.spec.name, child.incarnation)

    def _born(self, born: Born) -> None:
        child = next(child for child in self._children.values() if child.incarnation == born.incarnation)
        child.adopt(born.pid)
        asyncio.get_running_loop().add_reader(child.pidfd, self._died, child)

    def _fork_server_died(self, how: str) -> None:
        """Have another one, and ask it for whom the one before has not forked."""
        if self._done is None or self._done.done():
            return
        if self._state == "starting":
            self._fail(f"the fork server ended {how} before all was ready; its own messages stand above")
        elif self._too_many_deaths():
            self._fail(f"{len(self._deaths)} deaths of processes within {RESTART_WINDOW:.0f} s (the last: fork server, {how}): giving up")
        else:
            self._forks.launch_again(asyncio.get_running_loop())
            log.warning("the fork server ended %s: there is another one", how)
            for child in self._children.values():
                if child.pid == 0:
                    self._ask_for(child)

    def _started(self, message: Started) -> None:
        child = self._children[message.child]
        child.state = "ready"
        child.detail = message.detail
        if child.died is not None:
            now = time.monotonic()
            log.warning("%s is back after %.2f s", child.spec.name, now - child.born)
            self._metrics.histogram(
                "headrace_recovery_seconds", "From a process's death until it is back.", labels=(("process", child.spec.name),)
            ).observe(now - child.died)
            child.died = None
        if self._all_ready and self._state in ("starting", "recovering"):
            if self._state == "starting":
                self._keep_port(self._address())
                modules = {child.spec.module for child in self._children.values()}
                self._forks.learn(sorted(modules), self._config.kernels)
            self._turn("ready")
        elif message.child in self._servers:
            self._tell_state(message.child)
        if message.child == SCHEDULER:
            self._doors.opened()
        if self._state in ("draining", "drained") and message.child in (SCHEDULER, *self._servers):
            self._post.send(message.child, Drain())
        if self._all_ready:
            self._changed("")

    @property
    def _all_ready(self) -> bool:
        return all(child.state == "ready" for child in self._children.values())

    def _write_spec(self) -> None:
        """For the children that are started from now on."""
        (self._run_dir / BIRTH_FILE).write_bytes(msgspec.msgpack.encode(self._spec))

    def _keep_port(self, address: str) -> None:
        """A server that could choose its port takes the same one when it is started again."""
        if self._config.port == 0 and (port := urlsplit(address).port):
            self._spec = EngineSpec(msgspec.structs.replace(self._config, port=port), self._spec.model)
            self._write_spec()

    def _died(self, child: Child) -> None:
        """The child's pidfd is readable: it is dead."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(child.pidfd)
        status = child.bury()
        child.state = "stopped"
        if self._changing is None and child.died is None:
            child.died = time.monotonic()
        if not any(other.pid for other in self._children.values()):
            self._all_dead.set()
        if self._done is None or self._done.done():
            return
        name = child.spec.name
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        self._post.forget(name)
        for other in self._children.values():
            # Not to one that is still starting: it would read this late, when it knows the successor already, and take that for dead.
            # It has asked nothing of the dead one, or will ask again: whoever starts announces itself to its peers.
            if other is not child and other.pid and other.state == "ready":
                self._post.send(
                    other.spec.name, PeerDied(name, child.incarnation, by_itself=not child.doomed and status != -signal.SIGKILL)
                )
        if child.doomed:
            child.doomed = False
            self._start(child)
        elif (changing := self._changing) and name not in self._servers:
            # What it said, if anything, is on its way.
            why = f"{name} ended {how} before it was ready; its own messages are in the log"
            loop.call_later(FATAL_GRACE, lambda: changing.done() or changing.set_result(why))
        elif status == EXIT_FATAL:
            loop.call_later(FATAL_GRACE, self._end, 1)
        elif self._state == "starting":
            self._fail(f"{name} ended {how} before it was ready; its own messages stand above")
        elif self._too_many_deaths():
            self._fail(f"{len(self._deaths)} deaths of processes within {RESTART_WINDOW:.0f} s (the last: {name}, {how}): giving up")
        else:
            log.warning("%s ended %s: starting it again", name, how)
            if self._state == "ready":
                self._turn("recovering")
            self._doom_group(child)
            self._start(child)

    def _doom_group(self, child: Child) -> None:
        """Kill the others of a dead child's group; their own deaths start them again."""
        for other in self._children.values():
            if other is not child and other.spec.group == child.spec.group and other.pid is not None and not other.doomed:
                other.doomed = True
                other.signal(signal.SIGKILL)

    def _put_down(self, child: Child, why: str) -> None:
        """Kill a child that cannot be trusted any more; its death starts it again."""
        if child.pid is not None and not child.doomed:
            log.error("restarting %s: %s", child.spec.name, why)
            child.signal(signal.SIGKILL)

    def _too_many_deaths(self) -> bool:
        """Count one more death."""
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW:
            self._deaths.popleft()
        return len(self._deaths) > self._config.max_restarts

    def _fail(self, message: str) -> None:
        print(f"headrace: {message}", file=sys.stderr, flush=True)
        self._end(1)

    def _address(self) -> str:
        return next((child.detail for child in self._children.values() if child.spec.name in self._servers), "")

    def _turn(self, state: str) -> None:
        self._state = state
        for name in self._servers:
            self._tell_state(name)

    def _tell_state(self, server: str) -> None:
        self._post.send(server, EngineState(self._state))
        if self._state == "ready" and server in self._unopened:
            self._post.send(server, Probe(OPENING))

    def _opened(self, server: str) -> None:
        """A server takes requests; with the last one the engine does."""
        if server in self._unopened:
            self._unopened.discard(server)
            if not self._unopened:
                self._on_ready(self._address())

    def _drain(self) -> None:
        """SIGTERM: finish what runs, up to a limit. A second one ends at once."""
        if self._leaving or self._changing or self._state in ("starting", "drained"):
            self._end(0)
            return
        self._leaving = True
        self._close_doors()
        asyncio.get_running_loop().call_later(self._config.drain_timeout, self._end, 0)

    def _close_doors(self) -> None:
        self._doors.close({SCHEDULER, *self._servers})
        self._turn("draining")

    # What operators ask for

    def _administer(self, ask: Ask) -> None:
        """Do what an operator asks for, or say why not."""
        if self._reload or self._leaving or self._state == "starting":
            self._answer_operator(ask, 409, f"the engine is {self._state}: ask again when it is ready")
        elif ask.what == "drain":
            if self._state not in ("draining", "drained") or self._doors.opening:
                self._close_doors()
            self._answer_operator(ask, 202)
        elif ask.what == "resume":
            if self._state in ("draining", "drained"):
                self._doors.open(lambda: self._resumed(ask))
            else:
                self._answer_operator(ask, 200)
        elif self._state != "ready":
            self._answer_operator(ask, 409, f"the engine is {self._state}: it can load another model when it is ready")
        else:
            self._reload = asyncio.get_running_loop().create_task(self._load(ask))

    def _resumed(self, ask: Ask) -> None:
        self._turn("ready" if self._all_ready else "recovering")
        self._answer_operator(ask, 200)

    def _answer_operator(self, ask: Ask, status: int, message: str = "") -> None:
        self._post.send(ask.reply_to, Answered(ask.call, status, self._state, message, self._spec.model.name))

    async def _load(self, ask: Ask) -> None:
        """Serve another model, or the same from files that have changed. If that fails the present one goes on."""
        config = self._spec.config
        if ask.model is not None:
            config = msgspec.structs.replace(config, model=ask.model, revision=ask.revision)
        try:
            status, message = await self._exchange(config)
        except Exception as error:
            log.exception("loading another model failed")
            status, message = 500, f"{type(error).__name__}: {error}"
        self._reload = None
        labels = (("outcome", "done" if status == 200 else "refused" if status < 422 else "failed"),)
        self._metrics.counter("headrace_reloads_total", "Exchanges of the model that were asked for, by outcome.", labels=labels).add()
        if self._state == "reloading":
            self._turn("ready" if self._all_ready else "recovering")
        self._answer_operator(ask, status, message)

    async def _exchange(self, config: Config) -> tuple[int, str]:
        """An HTTP status, and why it was not done."""
        try:
            model = await asyncio.to_thread(resolve, config)
        except UserError as error:
            return 400, str(error)
        if self._state != "ready":
            return 409, f"the engine is {self._state}: it can load another model when it is ready"
        # Servers first, which hold back what is new; then the scheduler, which has other clients too.
        self._doors.expect(self._servers)
        self._turn("reloading")
        limit = asyncio.get_running_loop().time() + self._config.drain_timeout
        try:
            async with asyncio.timeout_at(limit):
                await self._doors.emptied()
                self._doors.close({SCHEDULER})
                await self._doors.emptied()
        except TimeoutError:
            opened = asyncio.Event()
            self._doors.open(opened.set)
            await opened.wait()
            return 504, f"requests were still running after {self._config.drain_timeout:g} s (--drain-timeout): the model stays"
        if self._state != "reloading":
            return 409, f"the engine is {self._state}: the model stays"
        before = self._spec
        if not (failure := await self._start_with(EngineSpec(config, model))):
            log.info("serving %s now", model.name)
            return 200, ""
        log.error("%s cannot be served (%s): going back to %s", model.name, failure, before.model.name)
        if worse := await self._start_with(before):
            self._fail(worse)
        return 422, failure

    async def _start_with(self, spec: EngineSpec) -> str:
        """Start all children but the servers anew with `spec`: why that fails, or nothing."""
        self._spec = spec
        self._write_spec()
        changing = self._changing = asyncio.get_running_loop().create_future()
        for child in self._children.values():
            if child.spec.name in self._servers:
                continue
            child.restarts -= 1  # This is none.
            if child.pid is not None:
                child.doomed, child.state = True, "restarting"
                child.signal(signal.SIGKILL)
            else:
                self._start(child)
        failure = await changing
        self._changing = None
        if not failure:
            for name in self._servers:
                self._post.send(name, NewModel())
        return failure

    def _changed(self, failure: str) -> bool:
        """The children have started with another model, or one cannot. False where no such change is under way."""
        if self._changing is None:
            return False
        if not self._changing.done():
            self._changing.set_result(failure)
        return True

    def _end(self, status: int) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(status)

    async def _stop(self) -> None:
        """End every child: politely, then not."""
        self._all_dead.clear()
        # Nobody is born any more, but for those that were on their way.
        self._forks.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in self._children.values():
                child.signal(number)
            with contextlib.suppress(TimeoutError):
                if any(child.pid for child in self._children.values()):
                    await asyncio.wait_for(self._all_dead.wait(), STOP_GRACE)
                return


def run(config: Config, model: ModelFiles, forks: ForkServer, worker_module: str = "headrace.workers.runner") -> int:
    """Serve `model` until SIGINT or SIGTERM; the exit status. Prints one line to stderr when the engine is ready. It is the end of
    `forks` too."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s supervisor: %(message)s", stream=sys.stderr)
    begun = time.monotonic()

    def announce(address: str) -> None:
        print(f"headrace: {model.name} is ready on {address} after {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)

    async def live() -> int:
        return await Supervisor(config, model, engine_children(config, worker_module), announce, forks).run()

    return uvloop.run(live())
