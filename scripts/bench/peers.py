"""The engines of a comparison: how each is started and ended, and how one workload is put to it.

    peers.toml ─▶ Peer ─▶ running(…) ─┬─▶ Server    `headrace bench` over HTTP
                                      └─▶ Adapter   the same prompts, as token ids, over standard input and output

Both give the same `Report`. An adapter saves its engine the work of HTTP and tokenization; whoever compares should know that.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Protocol, TextIO

import msgspec
from processes import tree, usage_of

from headrace.client.bench.dialect import Dialect, discover
from headrace.client.bench.load import Run, measure
from headrace.client.bench.machine import CpuTimes, cpu_times
from headrace.client.bench.options import Options
from headrace.client.bench.progress import Progress
from headrace.client.bench.prompts import prepare
from headrace.client.bench.report import Report, summarize
from headrace.client.bench.wire import Sample, ask
from headrace.client.calls import Server as Address
from headrace.engine.errors import UserError

ADAPTERS = Path(__file__).resolve().parent / "adapters"
START_LIMIT_S = 600.0
POLL_S = 0.05
"""Between two looks whether a server is ready: other people's servers do not tell."""


class Peer(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of peers.toml. Words may hold {program}, {model}, {threads}, {cores}, {port} and {adapters}."""

    one: list[str]
    many: list[str] | None = None
    environment: dict[str, str] = {}
    ready: str = "/health"
    """A path that answers 200 once requests are served."""
    version: list[str] | None = None
    """A command that prints it; adapters say it by themselves."""

    def command(self, streams: int) -> list[str]:
        return self.many if self.many and streams > 1 else self.one


class Chosen(msgspec.Struct):
    """An engine that takes part."""

    name: str
    peer: Peer
    program: str
    model: str
    options: list[str] = []
    """Words added to its command."""


class Started(msgspec.Struct):
    """One start of an engine."""

    name: str
    command: list[str]
    version: str
    start_s: float
    """From its start to the first moment a request would be served."""
    peak_rss_mib: float = 0.0
    """Sum over its processes of the most each ever held."""


class Measured(msgspec.Struct):
    """One report, and who used the machine meanwhile, in cores."""

    report: Report
    own_cores: float
    foreign_cores: float
    """Neither the engine nor the load generator."""


class Engine(Protocol):
    started: Started

    def measure(self, options: Options, words: list[str], label: str) -> Measured:
        """Put one workload to it. Raises `UserError`."""
        ...


def read_peers(files: list[Path]) -> dict[str, Peer]:
    """The entries of all files, later ones first. Raises `UserError`."""
    found: dict[str, Peer] = {}
    for file in files:
        try:
            found |= msgspec.convert(tomllib.loads(file.read_text("utf-8")), dict[str, Peer])
        except (OSError, ValueError) as error:  # Of TOML's grammar, or of the shape of an entry.
            raise UserError(f"{file}: {error}") from None
    return found


@contextmanager
def running(chosen: Chosen, threads: int, streams: int, tokenizer: Address | None) -> Iterator["Engine"]:
    """Start an engine, end it with the block. `tokenizer` is the server that makes an adapter's prompts. Raises `UserError`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "program": chosen.program,
        "model": chosen.model,
        "threads": str(threads),
        "cores": f"0-{threads - 1}",
        "port": str(port),
        "adapters": str(ADAPTERS),
    }
    pattern = chosen.peer.command(streams)
    is_server = any("{port}" in word for word in pattern)
    command = [word.format_map(places) for word in pattern] + chosen.options
    environment = {**os.environ, **{name: value.format_map(places) for name, value in chosen.peer.environment.items()}}
    # In a folder of its own: what lies in ours could be taken for an engine's own packages, and some leave logs behind.
    with tempfile.TemporaryDirectory(prefix="compare-") as folder, (Path(folder) / "log").open("w+") as log:
        version = _output([word.format_map(places) for word in chosen.peer.version], folder) if chosen.peer.version else ""
        pipe = None if is_server else subprocess.PIPE
        began = perf_counter()
        try:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe or log, stderr=log, text=True, env=environment, cwd=folder, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"{chosen.name}: cannot start {command[0]}: {error.strerror}") from None
        # Where programs and models lie says nothing to another reader.
        started = Started(chosen.name, [Path(word).name if word.startswith("/") else word for word in command], version, 0.0)
        try:
            if is_server:
                address = Address.parse(f"http://127.0.0.1:{port}", None)
                asyncio.run(_until_ready(process, address, chosen, log))
                started.start_s = perf_counter() - began
                yield Server(started, process.pid, address)
            else:
                if tokenizer is None:
                    raise UserError(f"{chosen.name} has no server: it is compared with one that has, which makes its prompts")
                adapter = Adapter(started, chosen, process, tokenizer, log)
                started.start_s = perf_counter() - began
                yield adapter
            started.peak_rss_mib = peak_rss_mib(process.pid)
        finally:
            _end(process)


async def _until_ready(process: subprocess.Popen[str], address: Address, chosen: Chosen, log: TextIO) -> None:
    deadline = perf_counter() + START_LIMIT_S
    while perf_counter() < deadline:
        if process.poll() is not None:
            raise UserError(f"{chosen.name} ended with status {process.returncode} before it was ready:\n{_tail(log)}")
        try:
            status, _ = await ask(address, "GET", chosen.peer.ready)
        except OSError:
            status = 0
        if status == 200:
            return
        await asyncio.sleep(POLL_S)
    raise UserError(f"{chosen.name} was not ready after {START_LIMIT_S:g} s:\n{_tail(log)}")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def _tail(log: TextIO) -> str:
    log.flush()
    log.seek(0)
    return "".join(log.readlines()[-15:]).rstrip()


def _output(command: list[str], folder: str) -> str:
    """What a command says of its version: on one line, whichever stream it says it on."""
    try:
        said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return (
        " · ".join(line.strip() for line in said.stdout.splitlines() if "version" in line or "built" in line) or said.stdout.strip()[-200:]
    )


def peak_rss_mib(pid: int) -> float:
    """Of a process and its descendants."""
    total = 0
    for one in tree(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return round(total / 1024, 1)


class Meter(Progress):
    """Reads an engine's CPU time exactly while the clock runs."""

    def __init__(self, label: str, pid: int) -> None:
        super().__init__(label)
        self._pid = pid
        self.cpu_s = 0.0

    def start(self, total: int | None, duration: float | None, samples: list[Sample]) -> None:
        self.cpu_s = -_cpu_s(self._pid)
        super().start(total, duration, samples)

    def stop(self) -> None:
        self.cpu_s += _cpu_s(self._pid)
        super().stop()


def _cpu_s(pid: int) -> float:
    return sum(usage_of(one).cpu_s for one in tree(pid))


def _measured(run: Run, cpu_s: float) -> Measured:
    report = summarize(run)
    own = cpu_s / report.wall_s
    return Measured(report, own, max(0.0, report.machine_busy_cores - own - report.generator.cpu_share))


class Server:
    """An engine that speaks HTTP."""

    def __init__(self, started: Started, pid: int, address: Address) -> None:
        self.started = started
        self.address = address
        self._pid = pid

    def measure(self, options: Options, words: list[str], label: str) -> Measured:
        meter = Meter(label, self._pid)
        here = msgspec.structs.replace(options, url=self.address.origin)
        run = asyncio.run(measure(here, words, meter))
        return _measured(run, meter.cpu_s)


class Adapter:
    """An engine in a process of its own that reads prompts from a pipe. The prompts are those that the servers get in the same round."""

    def __init__(self, started: Started, chosen: Chosen, process: subprocess.Popen[str], tokenizer: Address, log: TextIO) -> None:
        self.started = started
        self._model = chosen.model
        self._process = process
        self._tokenizer = tokenizer
        self._log = log
        started.version = self._read()["version"]

    def measure(self, options: Options, words: list[str], label: str) -> Measured:
        warm_up, prompts = asyncio.run(self._prompts(options, words))
        print(f"{label}{len(prompts)} prompts", file=sys.stderr, flush=True)
        for prompt in warm_up:
            self._ask([prompt], 0, options)
        before, cpu_s = cpu_times(), -_cpu_s(self._process.pid)
        samples = self._ask(prompts, options.shared_prefix, options)
        cpu_s += _cpu_s(self._process.pid)
        return _measured(self._run(options, samples, before), cpu_s)

    async def _prompts(self, options: Options, words: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """What `headrace bench` would send: before the clock starts, and after."""
        here = msgspec.structs.replace(options, url=self._tokenizer.origin)
        dialect = await discover(self._tokenizer, here, " ".join(words[:12]))
        source = await prepare(self._tokenizer, dialect, here, words)
        if not dialect.token_ids:
            raise UserError(f"{here.url} does not take token ids, so {self.started.name} cannot get the prompts that it gets")
        warm_up = [source.apart() for _ in range(options.warmup)]
        return warm_up, [source.next() for _ in range(options.requests or 1)]  # type: ignore[return-value]

    def _ask(self, prompts: list[list[int]], shared: int, options: Options) -> list[Sample]:
        work = {"prompts": prompts, "shared": shared, "concurrency": options.concurrency, "output_tokens": options.output_tokens}
        assert self._process.stdin
        with suppress(BrokenPipeError):  # It has ended: reading says why.
            print(msgspec.json.encode(work).decode(), file=self._process.stdin, flush=True)
        answer = self._read()
        return [_sample(prompt, sent, times) for prompt, sent, times in zip(prompts, answer["sent"], answer["times"], strict=True)]

    def _read(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise UserError(f"{self.started.name} ended with status {self._process.returncode}:\n{_tail(self._log)}")
        return msgspec.json.decode(line)

    def _run(self, options: Options, samples: list[Sample], before: CpuTimes) -> Run:
        dialect = Dialect(Path(self._model).name, "in process", None, token_ids=True, ignore_eos=True, include_usage=True)
        here = msgspec.structs.replace(options, url=self.started.name)
        wall = max(sample.ended for sample in samples) - min(sample.sent for sample in samples)
        return Run(here, dialect, samples, wall, 0.0, before, cpu_times(), "token ids, exact", False)


def _sample(prompt: list[int], sent: float, times: list[float]) -> Sample:
    """A request as the load generator would have seen it over HTTP, one chunk a token."""
    sample = Sample(len(times))
    sample.sent, sample.times, sample.ended = sent, times, times[-1]
    sample.status, sample.done, sample.finish_reason = 200, True, "length"
    usage = {"usage": {"prompt_tokens": len(prompt), "completion_tokens": len(times)}}
    sample.tail.append(b"data: " + msgspec.json.encode(usage))
    return sample
