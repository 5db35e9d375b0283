"""The fork server: who it forks, what they have from it, and an engine that loses it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.engine.fork_server import ForkServer
from headrace.engine.messages.lifecycle import Bear, Born
from headrace.engine.messages.wire import encode
from tests.engine.test_supervisor import Engine, engine, folder, gone  # noqa: F401

NEWBORN = "tests.engine.newborn"


class Nursery:
    """A fork server on this event loop, and what it told."""

    def __init__(self, forks: ForkServer, run_dir: Path) -> None:
        self.forks = forks
        self.run_dir = run_dir
        self.born: asyncio.Queue[Born] = asyncio.Queue()
        self.deaths: asyncio.Queue[str] = asyncio.Queue()
        forks.open(asyncio.get_running_loop(), self.born.put_nowait, self.deaths.put_nowait)

    async def bear(self, name: str, incarnation: int) -> tuple[int, dict]:
        """Have one born that ends by itself: its exit status, and what it wrote down."""
        self.forks.bear(NEWBORN, self.run_dir, name, incarnation)
        born = await self.born.get()
        assert born.incarnation == incarnation
        _, status = await asyncio.to_thread(os.waitpid, born.pid, 0)
        said = json.loads((self.run_dir / f"{name}.{incarnation}").read_text())
        assert said["pid"] == born.pid
        return os.waitstatus_to_exitcode(status), said


@pytest.fixture
async def nursery(tmp_path):
    with ForkServer() as forks:
        yield Nursery(forks, tmp_path)
        forks.close()


async def test_a_child_is_an_orphan_that_its_supervisor_waits_for(nursery):
    status, said = await nursery.bear("some-role", 7)
    assert status == 7
    assert said["session"] == said["pid"], "a signal from the terminal is not for it"
    assert said["title"] == f"headrace some-role {nursery.run_dir}"


async def test_what_was_learnt_is_not_imported_again(nursery):
    assert (await nursery.bear("some-role", 1))[1]["imported"]
    nursery.forks.learn([NEWBORN], "reference")
    # What is asked for goes before what is to be learnt, so it may take some children until it is.
    for incarnation in range(2, 500):
        if not (await nursery.bear("some-role", incarnation))[1]["imported"]:
            return
    raise AssertionError("it was never learnt")


async def test_a_module_that_cannot_be_imported_is_its_childrens_trouble(nursery):
    nursery.forks.learn(["tests.engine.there_is_none", NEWBORN], "auto")
    assert (await nursery.bear("some-role", 3))[0] == 3
    nursery.forks.bear("tests.engine.there_is_none", nursery.run_dir, "some-role", 4)
    born = await nursery.born.get()
    assert os.waitstatus_to_exitcode(os.waitpid(born.pid, 0)[1]) == 1


async def test_a_role_that_fails_ends_alone(nursery):
    assert (await nursery.bear("raises", 1))[0] == 1
    assert (await nursery.bear("some-role", 2))[0] == 2, "nobody else is affected"


def test_a_child_born_after_the_engines_end_goes_in_silence(tmp_path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    death, engine_lives = os.pipe()
    with theirs:
        # Nobody will hear that it is born.
        with ours:
            ours.send(encode(Bear(NEWBORN, str(tmp_path), "some-role", 1)))
        os.close(engine_lives)
        command = [sys.executable, "-m", "headrace.engine.fork_server", str(theirs.fileno()), str(death)]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno(), death], stderr=subprocess.PIPE)
    os.close(death)
    # The end of stderr is the child's as well.
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == [], "it never began"


async def test_after_its_death_another_one_forks(nursery):
    await nursery.bear("some-role", 1)
    nursery.forks.kill()
    assert await nursery.deaths.get() == "by signal 9"
    nursery.forks.launch_again(asyncio.get_running_loop())
    assert (await nursery.bear("some-role", 2))[0] == 2


async def test_children_outlive_it(nursery):
    nursery.forks.bear(NEWBORN, nursery.run_dir, "waits", 1)
    born = await nursery.born.get()
    nursery.forks.kill()
    await nursery.deaths.get()
    os.kill(born.pid, 0)
    assert not nursery.born.qsize()
    os.kill(born.pid, signal.SIGKILL)
    os.waitpid(born.pid, 0)


def fork_server_of(one: Engine) -> int:
    """The pid of its fork server: the supervisor's child that is none of the engine's processes."""
    pid = one.process.pid
    children = set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    (forks,) = children - set(one.pids().values())
    return forks


def test_an_engine_loses_its_fork_server_and_goes_on(engine):  # noqa: F811
    one = engine("server-0", "other")
    one.until("server-0 status ready")
    before = one.pids()
    os.kill(fork_server_of(one), signal.SIGKILL)
    one.until("the fork server ended by signal 9: there is another one")
    assert one.pids() == before
    os.kill(one.pids()["other"], signal.SIGKILL)
    one.until("server-0 status ready server-0=ready/0 other=ready/1")


def test_a_child_that_dies_with_the_fork_server_is_started_by_the_next(engine):  # noqa: F811
    one = engine("server-0", "other")
    one.until("server-0 status ready")
    forks = fork_server_of(one)
    os.kill(forks, signal.SIGSTOP)
    os.kill(one.pids()["other"], signal.SIGKILL)
    one.until("the fork server ended by signal 9: there is another one")
    one.until("server-0 status ready server-0=ready/0 other=ready/1")


def test_an_engine_that_ends_takes_its_fork_server_along(engine):  # noqa: F811
    for number in (signal.SIGINT, signal.SIGKILL):
        one = engine("server-0", "other")
        one.until("server-0 status ready")
        pids = [fork_server_of(one), *one.pids().values()]
        one.process.send_signal(number)
        one.finish()
        assert all(map(gone, pids))


def test_a_fork_server_that_dies_again_and_again_ends_the_engine(engine):  # noqa: F811
    one = engine("server-0")
    one.until("server-0 status ready")
    for _ in range(5):
        os.kill(fork_server_of(one), signal.SIGKILL)
        one.until("there is another one")
    os.kill(fork_server_of(one), signal.SIGKILL)
    one.until(r"deaths of processes within 60 s \(the last: fork server, by signal 9\): giving up")
    assert one.finish() == 1
