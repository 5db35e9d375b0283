"""The supervisor with real child processes: readiness, death, restart, and an end that leaves nobody behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

RUN = """
import asyncio, logging, sys
from headrace.engine.config import Config
from headrace.engine.children import ChildSpec
from headrace.engine.fork_server import ForkServer
from headrace.engine.supervisor import Supervisor
from tests.engine.scheduler.stage import MODEL
logging.basicConfig(level="INFO", stream=sys.stderr, format="%(message)s")
async def live():
    children = [ChildSpec(name, "tests.engine.child", group) for name, group in (pair.split(":") for pair in sys.argv[1:])]
    def ready(address):
        print("READY", address, file=sys.stderr, flush=True)
    return await Supervisor(Config(hang_timeout=0.4), MODEL, children, ready, forks).run()
with ForkServer() as forks:
    sys.exit(asyncio.run(live()))
"""


class Engine:
    """A supervisor in a process of its own, read line by line."""

    def __init__(self, folder: Path, *children: str) -> None:
        pairs = [child if ":" in child else f"{child}:{child}" for child in children]
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, *pairs], stderr=subprocess.PIPE, text=True, env=os.environ | {"XDG_RUNTIME_DIR": str(folder)}
        )
        self.lines: list[str] = []

    def until(self, pattern: str) -> re.Match:
        """Read on until a line matches."""
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line matches {pattern!r} in\n" + "\n".join(self.lines))

    def pids(self) -> dict[str, int]:
        """The last pid that each child told."""
        return {name: int(pid) for name, pid in re.findall(r"^(\S+) pid (\d+)$", "\n".join(self.lines), re.M)}

    def finish(self, timeout: float = 10) -> int:
        self.lines += self.process.communicate(timeout=timeout)[1].splitlines()
        return self.process.returncode


@pytest.fixture
def folder():
    """For run directories: a path that is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="hr-") as path:
        yield Path(path)


@pytest.fixture
def engine(folder):
    engines = []

    def start(*children: str) -> Engine:
        engines.append(Engine(folder, *children))
        return engines[-1]

    yield start
    for one in engines:
        one.process.kill()
        one.process.communicate()


def gone(pid: int, timeout: float = 5.0) -> bool:
    """Whether a process ends within `timeout`; it need not be our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    import select

    ended = bool(select.select([descriptor], [], [], timeout)[0])
    os.close(descriptor)
    return ended


def test_the_engine_is_ready_when_every_child_is(engine):
    one = engine("server-0", "other")
    assert one.until("READY (.*)")[1] == "http://here"
    one.until("server-0 status ready server-0=ready/0 other=ready/0")


def test_a_dead_child_is_started_again_and_its_siblings_hear_of_it(engine):
    one = engine("server-0", "other")
    one.until("server-0 status ready")
    os.kill(one.pids()["other"], signal.SIGKILL)
    one.until("server-0 heard that other died")
    one.until("state recovering")
    one.until("server-0 status ready server-0=ready/0 other=ready/1")


def test_a_group_is_started_again_together(engine):
    one = engine("server-0", "rank0:workers", "rank1:workers")
    one.until("server-0 status ready")
    os.kill(one.pids()["rank0"], signal.SIGKILL)
    one.until("server-0 status ready .*rank0=ready/1 rank1=ready/1")


def test_a_child_that_was_stopped_is_started_again(engine):
    one = engine("server-0", "other")
    one.until("server-0 status ready")
    os.kill(one.pids()["other"], signal.SIGSTOP)
    assert float(one.until(r"restarting other: it gave no sign of life for (\S+) s")[1]) >= 0.4
    one.until("server-0 status ready server-0=ready/0 other=ready/1")


def test_a_child_stuck_in_a_call_is_started_again(engine):
    one = engine("server-0", "stuck")
    one.until("restarting stuck: it gave no sign of life")
    one.until("server-0 status ready server-0=ready/0 stuck=ready/1")


def test_a_child_that_was_stopped_while_it_started_is_started_again(engine):
    one = engine("server-0", "halting")
    assert float(one.until(r"restarting halting: it has done nothing for (\S+) s, and is not ready yet")[1]) >= 0.4
    one.until("server-0 status ready server-0=ready/0 halting=ready/2")


def test_workers_that_owe_a_step_for_too_long_are_started_again(engine):
    one = engine("server-0", "scheduler-of-a-lost-step", "rank0:workers", "rank1:workers")
    one.until("restarting rank[01]: a step has not ended for 9.0 s")
    one.until("server-0 status ready .*rank0=ready/1 rank1=ready/1")


def test_deaths_without_end_stop_the_engine_with_a_message(engine):
    one = engine("server-0", "once-more")
    one.until("giving up")
    assert one.finish() == 1
    assert all(gone(pid) for pid in one.pids().values())


def test_a_child_that_dies_before_it_is_ready_ends_the_start(engine):
    one = engine("server-0", "crashing")
    one.until("crashing ended with status 7 before it was ready")
    assert one.finish() == 1


def test_a_fault_that_the_user_can_mend_is_one_line_and_exit_1(engine):
    one = engine("server-0", "fatal")
    one.until("^headrace: the thing 42 is wrong: make it 43$")
    assert one.finish() == 1
    assert "Traceback" not in "\n".join(one.lines)


def test_ctrl_c_ends_everything_within_two_seconds(engine):
    one = engine("server-0", "stubborn")
    one.until("READY")
    begun = time.monotonic()
    one.process.send_signal(signal.SIGINT)
    assert one.finish() == 0
    assert time.monotonic() - begun < 2
    assert all(gone(pid, 0) for pid in one.pids().values())


def test_no_child_outlives_a_supervisor_that_is_killed(engine):
    one = engine("server-0", "stubborn")
    one.until("READY")
    one.process.kill()
    assert all(gone(pid) for pid in one.pids().values())


def test_sigterm_drains_before_it_ends(engine):
    one = engine("server-0", "scheduler")
    one.until("READY")
    one.process.send_signal(signal.SIGTERM)
    one.until("state draining")
    assert one.finish() == 0


def test_the_run_directory_is_private_and_goes_with_the_engine(engine, folder):
    one = engine("server-0")
    one.until("READY")
    (run_dir,) = folder.glob("headrace-*")
    assert run_dir.stat().st_mode & 0o777 == 0o700
    one.process.send_signal(signal.SIGINT)
    one.finish()
    assert not run_dir.exists()
