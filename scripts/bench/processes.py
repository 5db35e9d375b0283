"""The processes of a running engine as the kernel sees them: who they are, what CPU time they used, what memory they hold."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SERVE = "import sys; from headrace.engine.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
"""Code for `engine`: `headrace serve`, as the command line runs it."""


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; `serve` has the options of `headrace serve`, which follow after --. From here on SIGTERM ends a script as Ctrl-C
    does, so that what it has started ends with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + " [-- OPTIONS OF headrace serve]"
    own, serve = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, serve = own[:at], own[at + 1 :]
    arguments = parser.parse_args(own)
    arguments.serve = serve
    return arguments


@dataclass
class Usage:
    """Of one process."""

    cpu_s: float
    rss_mib: float


@dataclass
class Engine:
    """A running engine: its supervisor, and where its sockets lie."""

    supervisor: subprocess.Popen
    runtime_dir: Path
    address: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return next(self.runtime_dir.glob("headrace-*"))

    def wait_until_ready(self) -> None:
        """Until the line that says so. Raises `SystemExit` when the engine ends before."""
        assert self.supervisor.stderr
        for line in self.supervisor.stderr:
            self.lines.append(line)
            if " is ready on " in line:
                self.address = line.split(" is ready on ")[1].split()[0]
                return
        raise SystemExit("the engine ended before it was ready:\n" + "".join(self.lines))

    def usage(self) -> dict[str, Usage]:
        """By process name."""
        return {name_of(pid): usage_of(pid) for pid in tree(self.supervisor.pid)}

    def metrics(self) -> dict[str, float]:
        """All series at one moment, by name and labels."""
        with urlopen(f"{self.address}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {series: float(value) for series, _, value in pairs if series}

    def metric(self, name: str) -> float:
        """The sum of all series of that name."""
        return sum(value for series, value in self.metrics().items() if series.partition("{")[0] == name)


@contextmanager
def engine(code: str, *words: str) -> Iterator[Engine]:
    """Run `code` in a Python of its own, as the engine's supervisor; end it with the block."""
    with tempfile.TemporaryDirectory(prefix="hr-") as runtime:
        environment = {**os.environ, "XDG_RUNTIME_DIR": runtime, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-c", code, *words]
        supervisor = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            yield Engine(supervisor, Path(runtime))
        finally:
            supervisor.terminate()
            try:
                supervisor.wait(15)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                supervisor.wait()


def tree(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from tree(int(child))


def name_of(pid: int) -> str:
    """The engine's name for a process: the second word of the title that children have, the module of what they start themselves; the one
    without either is the supervisor."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").split()
    except OSError:
        return f"gone-{pid}"
    if words[:1] == ["headrace"]:
        return words[1]
    return words[words.index("-m") + 1].rpartition(".")[2] if "-m" in words else "supervisor"


def usage_of(pid: int) -> Usage:
    try:
        # The command's name, in parentheses, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return Usage(0.0, 0.0)
    user, system, rss_pages = int(fields[11]), int(fields[12]), int(fields[21])
    return Usage((user + system) * TICK_S, rss_pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20))


def shares(before: dict[str, Usage], after: dict[str, Usage], seconds: float) -> dict[str, float]:
    """CPU time between two readings, as shares of one core."""
    return {name: round((after[name].cpu_s - before[name].cpu_s) / seconds, 4) for name in after if name in before}
