"""A child process for the supervisor's tests. Its name says how it behaves."""

import asyncio
import os
import select
import signal

from headrace.engine.errors import UserError
from headrace.engine.messages.lifecycle import Drain, Drained, EngineState, GetStatus, PeerDied, Progress, Status
from headrace.engine.messages.wire import Message
from headrace.engine.names import SUPERVISOR
from headrace.engine.process import Process, Role


def say(*words: object) -> None:
    # One write a line: several processes share the stream.
    os.write(2, (" ".join(map(str, words)) + "\n").encode())


class Plain:
    def __init__(self, process: Process) -> None:
        self._process = process

    def receive(self, message: Message) -> None:
        name = self._process.name
        match message:
            case Drain():
                self._process.send(SUPERVISOR, Drained(name))
            case PeerDied():
                say(name, "heard that", message.name, "died")
            case EngineState():
                say(name, "state", message.state)
                if message.state == "ready":
                    (self._process.run_dir / "ready").touch()
                    self._process.send(SUPERVISOR, GetStatus(1, name))
            case Status():
                say(name, "status", message.state, *(f"{child.name}={child.state}/{child.restarts}" for child in message.children))

    def settle(self) -> None:
        pass


def first_life(process: Process) -> bool:
    """Whether this is the first process of its name."""
    mark = process.run_dir / f"{process.name}.lived"
    if mark.exists():
        return False
    mark.touch()
    return True


async def build(process: Process) -> Plain:
    say(process.name, "pid", os.getpid())
    if process.name == "stubborn":
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if process.name == "fatal":
        raise UserError("the thing 42 is wrong: make it 43")
    if process.name == "crashing":
        os._exit(7)
    if process.name.startswith("once-"):
        # Dies soon after each time it became ready, the others having had time to become so too.
        asyncio.get_running_loop().call_later(0.3, os._exit, 9)
    if process.name == "stuck" and first_life(process):
        asyncio.get_running_loop().call_later(0.05, select.select, [], [], [])
    if process.name == "halting":
        if first_life(process):
            asyncio.get_running_loop().call_later(0.3, os._exit, 9)
        elif not (halted := process.run_dir / "halted").exists():
            halted.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
    if process.name.startswith("rank") and not first_life(process):
        (process.run_dir / "again").touch()
    if process.name == "scheduler-of-a-lost-step":
        # Steps are computed once all are ready.
        lost = lambda: (process.run_dir / "ready").exists() and not (process.run_dir / "again").exists()  # noqa: E731
        process.progress = lambda: Progress(1, 0, True, 9.0, 3, 9.0 if lost() else None)
    process.detail = "http://here"
    return Plain(process)


ROLE = Role(EngineState | Status, build)
