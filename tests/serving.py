"""A whole engine for tests: real processes, started and ended with the test, on a free port of loopback.

`Served` starts one with a worker of the test's choice, `Command` starts it as a user does. Both read its stderr as it comes.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import msgspec

from headrace.engine.config import Config

_SERVE = """
import sys, msgspec
from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.fork_server import ForkServer
from headrace.engine.supervisor import run
config = msgspec.json.decode(sys.argv[1], type=Config)
with ForkServer() as forks:
    sys.exit(run(config, resolve(config), forks, worker_module=sys.argv[2]))
"""

FAKE = "headrace.workers.fake"
REAL = "headrace.workers.runner"
ROOT = Path(__file__).parent.parent


class Engine:
    """A supervisor's process and what it says. Nothing of it outlives the `with` block."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)
        self.lines: list[str] = []
        """What it wrote to stderr so far."""
        self.url = ""
        self.model = ""
        self._seen = 0
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        try:
            ready = self.until(r"headrace: (\S+) is ready on (\S+)")
        except BaseException:
            self.__exit__()
            raise
        self.model, self.url = ready[1], ready[2]
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        assert self.process.stderr
        self.process.stderr.close()

    def until(self, pattern: str, timeout: float = 60) -> re.Match:
        """The next line of stderr that matches; every line is looked at once."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                while self._seen < len(self.lines):
                    self._seen += 1
                    if found := re.search(pattern, self.lines[self._seen - 1]):
                        return found
                left = deadline - time.monotonic()
                said = "\n".join(self.lines)
                assert not self._ended, f"the engine ended without {pattern!r}:\n{said}"
                assert left > 0, f"no {pattern!r} within {timeout} s:\n{said}"
                self._news.wait(left)

    def until_line(self, pattern: str, since: int, timeout: float = 60) -> None:
        """Wait for a line that matches among those after the first `since`."""
        deadline = time.monotonic() + timeout
        with self._news:
            while not any(re.search(pattern, line) for line in self.lines[since:]):
                left = deadline - time.monotonic()
                assert not self._ended, f"the engine ended without {pattern!r}:\n" + "\n".join(self.lines[since:])
                assert left > 0, f"no {pattern!r} within {timeout} s:\n" + "\n".join(self.lines[since:])
                self._news.wait(left)

    def finish(self, timeout: float = 20) -> int:
        """Wait for the engine's end; its exit status."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def _read(self) -> None:
        assert self.process.stderr
        # A line at a time, until the last process that holds the pipe has ended.
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None) -> tuple[int, Any]:
        """One plain HTTP request: (status, JSON or text). `body` is JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} | (headers or {}), method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, _parsed(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read())

    def pids(self) -> dict[str, int]:
        """Process ids of the children by name."""
        return {child["name"]: child["pid"] for child in self.ask("/health")[1]["processes"]}

    def run_dir(self) -> Path:
        """Where the processes' sockets are."""
        title = Path(f"/proc/{self.pids()['scheduler']}/cmdline").read_bytes().rstrip(b"\0").decode()
        return Path(title.removeprefix("headrace scheduler "))

    def kill(self, name: str) -> None:
        os.kill(self.pids()[name], signal.SIGKILL)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series of /metrics."""
        wanted = "".join(f'{key}="{value}"' for key, value in labels.items())
        for line in self.ask("/metrics")[1].splitlines():
            if line.startswith((f"{name} ", f"{name}{{")) and wanted in line:
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no series {name} {labels}")

    def has_metric(self, name: str, **labels: str) -> bool:
        try:
            self.metric(name, **labels)
        except AssertionError:
            return False
        return True

    def until_running(self, count: int, timeout: float = 10) -> None:
        """Ask for the health until `count` requests run."""
        deadline = time.monotonic() + timeout
        while self.ask("/health")[1]["running"] < count:
            assert time.monotonic() < deadline, f"not {count} requests are running"

    def until_idle(self, timeout: float = 10) -> dict:
        """Ask for the health until no request runs or waits."""
        deadline = time.monotonic() + timeout
        while True:
            health = self.ask("/health")[1]
            if health["running"] == health["waiting"] == 0:
                return health
            assert time.monotonic() < deadline, f"requests are still running: {health}"

    def until_empty(self, timeout: float = 10) -> dict:
        """Idle, and nothing is left of any request: no page in use, no entry in a tokenizer's table."""
        health = self.until_idle(timeout)
        deadline = time.monotonic() + timeout
        while not self.has_metric("headrace_tokenizer_live_requests"):
            assert time.monotonic() < deadline, "no tokenizer tells what it holds"
        # Processes tell their metrics from time to time, and the last step may still be on its way.
        while left := self._left():
            assert time.monotonic() < deadline, f"something is left of requests that are over: {left}"
        return health

    def _left(self) -> dict[str, float]:
        """What requests hold, by metric."""
        names = ("headrace_tokenizer_live_requests", "headrace_requests_running", "headrace_requests_waiting")
        held = {"headrace_kv_pages": self.metric("headrace_kv_pages", state="used")} | {name: self.metric(name) for name in names}
        return {name: value for name, value in held.items() if value}

    def until_state(self, state: str, timeout: float = 15) -> None:
        """Ask until the engine's state is `state`, whether its server answers meanwhile or not."""
        deadline = time.monotonic() + timeout
        found = None
        while found != state:
            assert time.monotonic() < deadline, f"the engine is {found}, not {state}:\n" + "\n".join(self.lines)
            with contextlib.suppress(OSError):
                found = self.ask("/health/ready")[1]["status"]


class Served(Engine):
    """An engine with the worker module `worker`, ready at `url`."""

    def __init__(self, worker: str = FAKE, **settings: Any) -> None:
        config = msgspec.json.encode(Config(**{"port": 0} | settings)).decode()
        super().__init__([sys.executable, "-c", _SERVE, config, worker])


class Command(Engine):
    """The command line `headrace …`, as a user runs it."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        super().__init__([sys.executable, "-m", "headrace.engine.cli", *arguments], **options)


class Watch:
    """Sees processes end, however they do and whoever their parent is: a pidfd each."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._open = {os.pidfd_open(pid): name for name, pid in pids.items()}

    def all_gone(self, timeout: float) -> None:
        """Wait for the end of all of them."""
        deadline = time.monotonic() + timeout
        while self._open:
            ended, _, _ = select.select(list(self._open), [], [], max(0.0, deadline - time.monotonic()))
            assert ended, f"still running after {timeout} s: {sorted(self._open.values())}"
            for descriptor in ended:
                os.close(descriptor)
                del self._open[descriptor]


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()
