"""The machine a measurement ran on, and what else kept it busy meanwhile (from /proc, where there is one)."""

import os
import platform
from pathlib import Path

import msgspec


class Machine(msgspec.Struct):
    """Facts that belong to every figure."""

    system: str
    python: str
    cpu: str
    cores: int
    """Logical cores this process may use."""
    memory_gib: float | None
    load_1m: float | None


class CpuTimes(msgspec.Struct):
    """CPU seconds of the whole machine since it started."""

    busy_s: float
    stolen_s: float
    """Time that the hypervisor gave to others while we were ready to run."""


def facts() -> Machine:
    """This machine's."""
    memory = None
    if pages := _first_match("/proc/meminfo", "MemTotal:"):
        memory = round(int(pages.split()[0]) / (1 << 20), 1)
    cpu = _first_match("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        load = round(os.getloadavg()[0], 2)
    except OSError:
        load = None
    return Machine(platform.platform(), platform.python_version(), cpu.lstrip(": \t"), cores, memory, load)


def cpu_times() -> CpuTimes:
    """Since the machine started; zeros where /proc/stat is not to be had."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return CpuTimes(0.0, 0.0)
    user, nice, system, _, _, irq, soft, stolen = (int(field) for field in fields[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return CpuTimes((user + nice + system + irq + soft) / tick, stolen / tick)


def _first_match(path: str, key: str) -> str | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.removeprefix(key).strip()
    except OSError:
        pass
    return None
