"""`headrace doctor`: what this machine has, which kernels would run here, and what would be slow or fail, and why.

    machine, packages, settings, model ─┐
    kernels (asked in a process of     ─┼─▶ Report ─▶ findings ─▶ a table, or JSON
    their own, since torch is theirs)  ─┘

It starts no engine, downloads nothing and changes nothing. Exit status 1 when `headrace serve` could not work.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.errors import UserError
from headrace.engine.machine import Machine, Pressure, read_machine, read_pressure
from headrace.engine.settings import SECRETS, load
from headrace.engine.sizes import show_size

LOOK_S = 0.3
PROBE_LIMIT_S = 120.0
PROBE = """
import json, logging, sys
warnings = []
class Keep(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())
logging.getLogger().addHandler(Keep())
import torch
from headrace.kernels.select import make_backend
answer = {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpus": []}
if torch.cuda.is_available():
    answer["gpus"] = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
try:
    answer["kernels"] = make_backend(sys.argv[1]).name
except Exception as error:
    answer["error"] = str(error) or type(error).__name__
print(json.dumps(answer | {"warnings": warnings}))
"""


class Probe(msgspec.Struct, frozen=True):
    """What the kernels say of themselves."""

    kernels: str | None = None
    """The implementation that would serve; None where none can."""
    error: str | None = None
    warnings: tuple[str, ...] = ()
    torch: str | None = None
    threads: int | None = None
    """Those that torch takes when it is not told."""
    gpus: tuple[str, ...] = ()
    """Those that torch can use."""


class Model(msgspec.Struct, frozen=True):
    name: str
    path: str
    weight_bytes: int
    context: int


class Finding(msgspec.Struct, frozen=True):
    kind: Literal["problem", "slow", "note"]
    """"problem" keeps the engine from serving."""
    text: str


class Report(msgspec.Struct, frozen=True):
    version: str
    python: str
    machine: Machine
    pressure: Pressure | None
    packages: dict[str, str | None]
    """Version of each package that Headrace needs; None where it is missing."""
    settings: Config | None
    """From the environment and the file it names, without the key; None where they are wrong."""
    settings_error: str | None
    model: Model | None
    model_error: str | None
    probe: Probe
    findings: list[Finding]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `headrace doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """`headrace doctor`. Exit status 0, 1 when something would keep the engine from serving."""
    report = examine(os.environ)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())
    else:
        print("\n".join(table(report)))
    return int(any(finding.kind == "problem" for finding in report.findings))


def examine(environ: Mapping[str, str]) -> Report:
    """Look at everything. `environ` is where settings come from."""
    machine, pressure = read_machine(), read_pressure(LOOK_S)
    config, settings_error, model, model_error = None, None, None, None
    try:
        config = load({}, environ)
    except UserError as error:
        settings_error = str(error)
    try:
        model = find_model(config or Config())
    except UserError as error:
        model_error = str(error)
    shown = config and msgspec.structs.replace(config, **{name: "(set)" for name in SECRETS if getattr(config, name)})
    report = Report(
        version=metadata.version("headrace"),
        python=platform.python_version(),
        machine=machine,
        pressure=pressure,
        packages=packages(),
        settings=shown,
        settings_error=settings_error,
        model=model,
        model_error=model_error,
        probe=ask_kernels((config or Config()).kernels),
        findings=[],
    )
    return msgspec.structs.replace(report, findings=list(diagnose(report)))


def packages() -> dict[str, str | None]:
    """The packages that Headrace says it needs, and triton, which it can use."""
    wanted = [line for line in metadata.requires("headrace") or () if "extra ==" not in line]
    names = sorted(found[0] for line in wanted if (found := re.match(r"[\w.-]+", line)))
    return {name: _version(name) for name in [*names, "triton"]}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_model(config: Config) -> Model | None:
    """The model that `serve` would take; None for a hub name, since nothing is downloaded here. Raises UserError."""
    if config.model is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", config.model) and not Path(config.model).exists():
        return None
    files = resolve(config)
    return Model(files.name, files.path, files.weight_bytes, files.context)


def ask_kernels(kind: str, command: tuple[str, ...] = (sys.executable, "-c", PROBE)) -> Probe:
    """Make the kernels of `kind` in a process of their own, where torch may be imported, and may crash."""
    try:
        done = subprocess.run([*command, kind], capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Probe(error=f"they did not load within {PROBE_LIMIT_S:.0f} s")
    try:
        return msgspec.json.decode(done.stdout, type=Probe)
    except msgspec.DecodeError:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return Probe(error=said[0])


def diagnose(report: Report) -> Iterator[Finding]:
    """What follows from the facts: a pure function of them."""
    yield from _diagnose_software(report)
    yield from _diagnose_cores(report)
    yield from _diagnose_memory(report)


def _diagnose_software(report: Report) -> Iterator[Finding]:
    machine, probe = report.machine, report.probe
    for name, version in report.packages.items():
        if version is None and name != "triton":
            yield Finding("problem", f"the package {name} is missing: pip install {name}")
    if report.settings_error:
        yield Finding("problem", report.settings_error)
    if report.model_error:
        yield Finding("problem", report.model_error)
    if probe.kernels is None:
        yield Finding("problem", f"no kernels can be loaded: {probe.error}")
    elif probe.kernels == "reference":
        why = "; ".join(probe.warnings) or "they were asked for"
        yield Finding("slow", f"the reference kernels would serve, which are made to be right and not fast: {why}")
    if machine.architecture == "x86_64" and not {"avx2", "fma"} <= set(machine.features):
        yield Finding("slow", "the processor has no AVX2 and FMA: every matrix product runs on narrow vectors")
    if machine.architecture not in ("x86_64", "aarch64"):
        yield Finding("slow", f"there are no vector kernels for {machine.architecture}")
    if (probe.gpus or machine.nvidia or machine.amd) and probe.kernels != "triton":
        why = "; ".join(probe.warnings) or f"{probe.kernels} kernels were asked for"
        yield Finding("slow", f"there is a GPU, but the engine would run on the CPU: {why}")


def _diagnose_cores(report: Report) -> Iterator[Finding]:
    machine, pressure = report.machine, report.pressure
    threads = report.settings.threads if report.settings else None
    if threads and threads > machine.physical_cores:
        yield Finding("slow", f"threads={threads}, but there are {machine.physical_cores} physical cores: ask for at most that many")
    wanted = threads or machine.physical_cores
    if machine.cpu_limit is not None and machine.cpu_limit < wanted:
        yield Finding(
            "slow",
            f"the control group allows {machine.cpu_limit:g} cores' worth of time for {wanted} threads: "
            f"give --threads {max(1, int(machine.cpu_limit))}, or raise the limit",
        )
    if pressure is not None and pressure.busy > 0.25:
        yield Finding(
            "slow", f"other processes use {pressure.busy:.1f} of {machine.logical_cores} cores now: every step waits for its slowest thread"
        )
    if pressure is not None and pressure.stolen > 0.05 * machine.logical_cores:
        yield Finding("slow", f"the hypervisor takes {pressure.stolen:.1f} cores' worth of time for other guests")


def _diagnose_memory(report: Report) -> Iterator[Finding]:
    available, model = report.machine.available, report.model
    if available is None or model is None:
        return
    sizes = f"{model.name} has {show_size(model.weight_bytes)} of weights, and {show_size(available)} of memory are free"
    if available < model.weight_bytes:
        yield Finding("problem", f"{sizes}: take a smaller model, or free memory")
    elif available < 2 * model.weight_bytes:
        yield Finding("slow", f"{sizes}: few KV pages will fit, and weights may have to be read from disk again")


def table(report: Report) -> Iterator[str]:
    """The report for people, line by line."""
    machine, probe, pressure = report.machine, report.probe, report.pressure
    yield f"Headrace {report.version}, Python {report.python}, {machine.system}"
    yield ""
    limit = f", limited to {machine.cpu_limit:g} cores' worth of time" if machine.cpu_limit is not None else ""
    rows = [
        ("processor", f"{machine.cpu} ({machine.architecture})"),
        ("cores", f"{machine.physical_cores} physical, {machine.logical_cores} logical{limit}"),
        ("instructions", " ".join(machine.features) or "nothing beyond the baseline"),
        ("memory", _memory(machine)),
        (
            "load",
            f"{machine.load if machine.load is not None else 'unknown'}"
            + (f"; others use {pressure.busy:.2f} cores, {pressure.stolen:.2f} stolen" if pressure else ""),
        ),
        ("GPU", ", ".join(probe.gpus) or ("a driver is loaded, but torch can use no GPU" if machine.nvidia or machine.amd else "none")),
        ("kernels", probe.kernels or f"none: {probe.error}"),
        (
            "model",
            f"{report.model.name}, {show_size(report.model.weight_bytes)}, context {report.model.context}"
            if report.model
            else _no_model(report),
        ),
        ("packages", ", ".join(f"{name} {version}" for name, version in report.packages.items() if version)),
    ]
    for name, value in rows:
        yield f"  {name:<13} {value}"
    yield ""
    for finding in report.findings:
        yield f"{finding.kind}: {finding.text}"
    if not any(finding.kind == "problem" for finding in report.findings):
        yield "`headrace serve` can work here."


def _memory(machine: Machine) -> str:
    if machine.memory is None or machine.available is None:
        return "unknown"
    limit = f", limited to {show_size(machine.memory_limit)}" if machine.memory_limit is not None else ""
    return f"{show_size(machine.memory)}, {show_size(machine.available)} available{limit}"


def _no_model(report: Report) -> str:
    if report.model_error or report.settings is None:
        return "not found"
    return f"{report.settings.model} from the hub; it is not looked at here"
