"""How a child process of the engine lives: role, birth certificate, death pipe, event loop, readiness.

The supervisor has its fork server (`engine.fork_server`) fork a process, which runs the `ROLE` of its module. `build` gets a `Process` and
returns the actor. Everything slow (loading a model) happens in `build`, before the supervisor is told `Started`.

The death pipe is a pipe whose write end only the supervisor holds. When that process ends, however it ends, the read end
reports it, and a thread that does nothing else takes this process down, even if its event loop is stuck in native code.
"""

import asyncio
import atexit
import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import uvloop
import zmq

from headrace.engine.actor import CRASH, Actor, Mailbox, Post, endpoint
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.errors import UserError
from headrace.engine.messages.lifecycle import Fatal, Probe, Progress, Snapshot, Started, ToChild
from headrace.engine.messages.wire import Message
from headrace.engine.metrics import REJECTED_FRAMES, REJECTED_FRAMES_HELP, Metrics
from headrace.engine.names import SUPERVISOR

BIRTH_FILE = "engine.msgpack"
EXIT_FATAL = 3
"""Exit status of a child that told the supervisor `Fatal`: restarting it is useless."""


class EngineSpec(msgspec.Struct, frozen=True):
    """What every process of one engine knows: the settings and the model they were resolved to."""

    config: Config
    model: ModelFiles


class Process:
    """A child's surroundings, handed to the function that builds its actor."""

    def __init__(self, run_dir: Path, name: str, incarnation: int, spec: EngineSpec) -> None:
        self.run_dir = run_dir
        self.name = name
        self.incarnation = incarnation
        """Greater than that of every process that this engine started before."""
        self.config = spec.config
        self.model = spec.model
        self.metrics = Metrics()
        self.rejected_frames = self.metrics.counter(REJECTED_FRAMES, REJECTED_FRAMES_HELP, (("process", name),))
        self.context = zmq.Context()
        self.post = Post(self.context, run_dir)
        self.progress: Callable[[], Progress] | None = None
        """Set by the actor that can tell the engine's pulse."""
        self.detail = ""
        """A few words for `Started`."""

    def send(self, to: str, message: Message) -> bool:
        return self.post.send(to, message)

    def later(self, seconds: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        """Do something for the actor after a while. If that fails, the actor has failed."""
        loop = asyncio.get_running_loop()

        def do() -> None:
            try:
                act()
            except Exception as error:
                loop.call_exception_handler({"message": "the actor failed", "exception": error, CRASH: True})

        return loop.call_later(seconds, do)

    def address(self, name: str) -> str:
        return endpoint(self.run_dir, name)


class _WithLifecycle:
    """An actor that answers the supervisor's probes and hands everything else on."""

    def __init__(self, process: Process, actor: Actor) -> None:
        self._process = process
        self._actor = actor
        self.settle = actor.settle

    def receive(self, message: Message) -> None:
        if isinstance(message, Probe):
            process = self._process
            progress = process.progress() if process.progress else None
            process.send(SUPERVISOR, Snapshot(process.name, message.call, process.metrics.snapshot(), progress))
        else:
            self._actor.receive(message)


def read_spec(run_dir: Path) -> EngineSpec:
    """The birth file as it is now."""
    return msgspec.msgpack.decode((run_dir / BIRTH_FILE).read_bytes(), type=EngineSpec)


def die_with_parent(death_fd: int, run_dir: Path) -> None:
    """End this process at once when the other end of the pipe is closed, and take `run_dir` along, which is nobody's then."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(death_fd, 1)
        shutil.rmtree(run_dir, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, name="death-pipe", daemon=True).start()


class Role(NamedTuple):
    """What the module of a child process offers."""

    union: object
    """What its mailbox accepts beside `ToChild`; `Probe` is answered here, the actor gets the rest."""
    build: Callable[[Process], Awaitable[Actor]]
    preload: Callable[[str], None] | None = None
    """Imports what `build` will import with such kernels (the setting), so that it need not; must do nothing else."""

    def run(self, run_dir: Path, name: str, incarnation: int, death_fd: int) -> int:
        """Be this child until told to stop; the exit status."""
        die_with_parent(death_fd, run_dir)
        spec = read_spec(run_dir)
        logging.basicConfig(level=spec.config.log_level.upper(), format=f"%(asctime)s %(levelname)s {name}: %(message)s", stream=sys.stderr)
        process = Process(run_dir, name, incarnation, spec)
        try:
            uvloop.run(_live(process, self.union, self.build))
        except UserError as error:
            fatal = process.context.socket(zmq.PUSH)
            fatal.connect(process.address(SUPERVISOR))
            fatal.send(msgspec.msgpack.encode(Fatal(name, str(error))))
            # Closes the mailbox too, which the error's traceback keeps alive.
            process.context.destroy(linger=1000)
            return EXIT_FATAL
        return 0


def collect_seldom() -> None:
    """Let the collector of reference cycles pause this process less often.

    Rows and messages by the thousand live for a step each. At Python's own thresholds they set off collections of everything there is,
    a prefix tree of many thousand nodes and its queue among it, for tens of milliseconds; yet next to nothing here lies in cycles.
    """
    gc.collect()
    gc.freeze()
    # What is frozen is not taken apart at the end either, which extensions count as leaks and say so.
    atexit.register(gc.unfreeze)
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


async def _live(process: Process, union: object, build: Callable[[Process], Awaitable[Actor]]) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    failure: list[BaseException] = []

    def on_exception(_: asyncio.AbstractEventLoop, context: dict) -> None:
        error = context.get("exception")
        logging.getLogger().error("%s", context["message"], exc_info=error)
        # A library's stray task is a line in the log; a failed actor is the end of its process.
        if error is not None and CRASH in context:
            failure.append(error)
            stopped.set()

    loop.set_exception_handler(on_exception)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    mailbox = Mailbox(process.context, process.address(process.name), union | ToChild, process.rejected_frames)
    actor = await build(process)
    collect_seldom()
    mailbox.open(_WithLifecycle(process, actor))
    process.send(SUPERVISOR, Started(process.name, process.incarnation, process.detail))
    await stopped.wait()
    closing = getattr(actor, "close", None)
    if closing and not failure:
        await closing()
    mailbox.close()
    process.post.close()
    if failure:
        logging.shutdown()
        os._exit(1)
