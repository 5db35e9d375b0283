"""A whole engine for tests: real processes, started and ended with the test, on a free port of loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import msgspec

from headrace.engine.config import Config

_SERVE = """
import sys, msgspec
from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.supervisor import run
config = msgspec.json.decode(sys.argv[1], type=Config)
sys.exit(run(config, resolve(config), worker_module=sys.argv[2]))
"""

FAKE = "headrace.workers.fake"
REAL = "headrace.workers.runner"


class Served:
    """An engine that is ready at `url`. Use as a context manager; nothing of it outlives the block."""

    def __init__(self, worker: str = FAKE, **settings: Any) -> None:
        config = Config(**{"port": 0} | settings)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, msgspec.json.encode(config).decode(), worker], stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.url = ""
        self.model = ""

    def __enter__(self) -> "Served":
        ready = self.until(r"headrace: (\S+) is ready on (\S+)")
        self.model, self.url = ready[1], ready[2]
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()
        else:
            self.process.communicate()

    def until(self, pattern: str) -> re.Match:
        """Read the engine's stderr until a line matches."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"the engine ended without {pattern!r}:\n" + "\n".join(self.lines))

    def finish(self, timeout: float = 20) -> int:
        """Wait for the engine's end; its exit status."""
        self.lines += self.process.communicate(timeout=timeout)[1].splitlines()
        return self.process.returncode

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


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()
