"""The fork server: a process that has imported what the engine's processes need, and forks them.

Imports are nearly all of the time in which such a process starts. The fork server has done those that all need before the first is asked
for, and learns the others once all are ready, so that one that has to be started again is there after some milliseconds. What is imported
lies in memory once for all.

    ForkServer ── Bear(module, name, …) ─▶ the process ── fork ─▶ (ends at once) ── fork ─▶ child: `module.ROLE.run(…)`
               ◀─ Born(incarnation, pid) ─────────────────────────────────────────────────────┘

A child says itself that it is born, over the socket that it has from its parent: whoever is not heard of when the fork server has died,
was not forked. It is an orphan, which the supervisor adopts as the next subreaper (prctl(2)), waits for, and keeps without a fork server.

The process has one thread and opens neither an event loop nor a ZeroMQ context, of which a child would have broken copies.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import select
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from setproctitle import setproctitle

from headrace.engine.messages.lifecycle import Bear, Born, Learn
from headrace.engine.messages.wire import Codec, encode

if TYPE_CHECKING:
    # The command line imports this module first of all, to have the process at work while it goes on.
    from asyncio import AbstractEventLoop, TimerHandle

LONGEST = 64 << 10
"""Bytes of a message."""

LAST_WORDS_S = 1.0
"""For how long after its death a child that it has forked may say so."""

_SET_CHILD_SUBREAPER = 36


class ForkServer:
    """The supervisor's end. Its process starts at once, and ends with the block or with the supervisor."""

    def __init__(self) -> None:
        _adopt_orphans(True)
        self._death_read, self._death_write = os.pipe()
        """Every child has the first end and no other process the second: see `engine.process`."""
        self._lesson: Learn | None = None
        self._codec = Codec(Born)
        self._on_born: Callable[[Born], None] = lambda _: None
        self._on_death: Callable[[str], None] = lambda _: None
        self._loop: AbstractEventLoop | None = None
        """Which watches the process while it lives, and the channel while anybody may say something."""
        self._status: int | None = None
        """Of the process, once it has died."""
        self._patience: TimerHandle | None = None
        self._launch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def open(self, loop: "AbstractEventLoop", on_born: Callable[[Born], None], on_death: Callable[[str], None]) -> None:
        """From now on tell on the event loop who is born, and how the process died; it can be launched again then."""
        self._on_born, self._on_death = on_born, on_death
        self._watch(loop)

    def bear(self, module: str, run_dir: Path, name: str, incarnation: int) -> None:
        """Have a child started. What is asked of a process that has died is forgotten with it."""
        self._tell(Bear(module, str(run_dir), name, incarnation))

    def learn(self, modules: list[str], kernels: str) -> None:
        """Have everything imported that children of these modules will want."""
        self._lesson = Learn(modules, kernels)
        self._tell(self._lesson)

    def launch_again(self, loop: "AbstractEventLoop") -> None:
        """After its death: a process that knows as much as the one before."""
        self._launch()
        self._watch(loop)
        if self._lesson is not None:
            self._tell(self._lesson)

    def stands_still(self) -> bool:
        """Whether its process has been stopped (SIGSTOP)."""
        return self._status is None and stat_of(self._process.pid)[0] == "T"

    def bury_strangers(self, known: Callable[[], set[int]]) -> None:
        """Wait for the dead that are none of the `known` pids: what a child started itself falls to this process when the child dies."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        pids: set[int] = set()
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it may end while one looks
                pids.update(map(int, (thread / "children").read_text().split()))
        dead = {pid for pid in pids - {self._process.pid} if os.waitid(os.P_PID, pid, flags)}
        if dead:
            # A child says that it is born before it dies.
            self._read()
            for pid in dead - known():
                os.waitpid(pid, 0)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End the process. Children that it has forked live on."""
        self._process.kill()
        self._process.wait()
        if self._loop:
            self._read()
        self._forget()
        _adopt_orphans(False)

    def _launch(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        passed = [theirs.fileno(), self._death_read]
        command = [sys.executable, "-m", "headrace.engine.fork_server", *map(str, passed)]
        # Threads must not spin for cores that other processes of the engine need: OpenMP's. NumPy's must not be there when it forks.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        # A session of its own: Ctrl-C in the terminal is for the supervisor, which tells the children.
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=passed, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)

    def _watch(self, loop: "AbstractEventLoop") -> None:
        self._loop = loop
        self._status = None
        self._pidfd = os.pidfd_open(self._process.pid)
        loop.add_reader(self._pidfd, self._died)
        loop.add_reader(self._channel, self._read)

    def _forget(self) -> None:
        if self._patience:
            self._patience.cancel()
            self._patience = None
        if self._loop:
            self._loop.remove_reader(self._pidfd)
            self._loop.remove_reader(self._channel)
            self._loop = None
            os.close(self._pidfd)
        self._channel.close()

    def _tell(self, message: Bear | Learn) -> None:
        # Where it has died, its pidfd will tell.
        with contextlib.suppress(OSError):
            self._channel.send(encode(message))

    def _read(self) -> None:
        """Tell of everybody who has said that he is born."""
        while True:
            try:
                frame = self._channel.recv(LONGEST)
            except OSError:
                return
            if not frame:
                # The process is dead, and nobody is left who was forked and has not said so.
                self._end()
                return
            born = self._codec.decode(frame)
            assert isinstance(born, Born)
            self._on_born(born)

    def _died(self) -> None:
        assert self._loop
        self._loop.remove_reader(self._pidfd)
        self._status = self._process.wait()
        self._patience = self._loop.call_later(LAST_WORDS_S, self._end)

    def _end(self) -> None:
        """Let go of a dead process, and tell; once."""
        if self._loop:
            status = self._process.wait() if self._status is None else self._status
            self._forget()
            self._on_death(f"by signal {-status}" if status < 0 else f"with status {status}")


def _adopt_orphans(adopt: bool) -> None:
    """Whether this process becomes the parent of its children's orphans."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def stat_of(pid: int) -> list[str]:
    """The state of a process that was not waited for yet, and what follows it; see proc(5)."""
    # The command's name, in parentheses, may hold spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def serve(channel: socket.socket, death_fd: int) -> None:
    """Fork and learn as told, until the supervisor's end of the channel is closed."""
    codec = Codec(Bear | Learn)
    kernels, to_learn = "", deque()
    while True:
        # Who is to be born goes before what is to be learnt.
        if to_learn and not select.select([channel], [], [], 0)[0]:
            _learn(to_learn.popleft(), kernels)
            continue
        frame = channel.recv(LONGEST)
        if not frame:
            return
        match codec.decode(frame):
            case Bear() as wanted:
                _bear(wanted, channel, death_fd)
            case Learn(modules=modules, kernels=kernels):
                to_learn = deque(modules)


def _learn(module: str, kernels: str) -> None:
    """Import a module and what it says it will want. Whatever is wrong with it, its child will say in better words."""
    try:
        if preload := importlib.import_module(module).ROLE.preload:
            preload(kernels)
    except Exception:
        return
    # What lies here for ever is not looked at again by children's collectors, so that its memory stays shared.
    gc.collect()
    gc.freeze()


def _bear(wanted: Bear, channel: socket.socket, death_fd: int) -> None:
    """Fork a child that is nobody's: it begins once its parent has ended, and ends where nobody tells it so."""
    gate, opener = os.pipe()
    if parent := os.fork():
        os.waitpid(parent, 0)
        os.write(opener, b".")
        os.close(gate)
        os.close(opener)
    elif os.fork():
        os._exit(0)
    else:
        os.close(opener)
        if not os.read(gate, 1):
            os._exit(1)
        os.close(gate)
        _live(wanted, channel, death_fd)


def _live(wanted: Bear, channel: socket.socket, death_fd: int) -> NoReturn:
    """Be the child."""
    status = 1
    try:
        setproctitle(f"headrace {wanted.name} {wanted.run_dir}")
        os.setsid()
        with channel:
            try:
                channel.send(encode(Born(wanted.incarnation, os.getpid())))
            except BrokenPipeError:
                # The engine has ended meanwhile, or has given up on its fork server's last words.
                os._exit(0)
        entry = importlib.import_module(wanted.module).ROLE
        status = entry.run(Path(wanted.run_dir), wanted.name, wanted.incarnation, death_fd)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    setproctitle("headrace fork-server")
    # Nothing of what is imported lies in cycles to be found. Children collect once they are ready.
    gc.disable()
    # What every child needs.
    importlib.import_module("headrace.engine.process")
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as its_end:
        serve(its_end, int(sys.argv[2]))
