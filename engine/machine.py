"""What the kernel of the system says of this machine: processor, memory, limits, and who else keeps it busy.

Read from /proc and /sys alone. `root` stands for another root folder, such as a copy of another machine's files. What cannot be
read is None.
"""

import os
import platform
import time
from pathlib import Path

import msgspec

ROOT = Path("/")
FEATURES = {
    "x86_64": ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    "aarch64": ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}
"""Instruction sets that kernels can make use of, as /proc/cpuinfo names them."""
UNLIMITED = 1 << 60
"""cgroup v1 writes a huge number for "no limit"."""


class Machine(msgspec.Struct, frozen=True):
    """Sizes in bytes."""

    system: str
    architecture: str
    cpu: str
    logical_cores: int
    """Those that this process may run on."""
    physical_cores: int
    """Of the whole machine, but no more than the logical ones above."""
    features: tuple[str, ...]
    memory: int | None
    available: int | None
    """Memory that can be had without swapping, within the limit below."""
    memory_limit: int | None
    """Of the control group; None is no limit."""
    cpu_limit: float | None
    """Cores' worth of time that the control group allows; None is no limit."""
    load: float | None
    """Processes that wanted to run, averaged over the last minute."""
    nvidia: bool
    amd: bool
    """Is a driver for such a GPU loaded?"""


class Pressure(msgspec.Struct, frozen=True):
    """What others took of the machine during a short look, in cores."""

    busy: float
    stolen: float
    """Taken by the hypervisor for other guests."""


def read_machine(root: Path = ROOT, cores: int | None = None) -> Machine:
    """The machine below `root`; `cores` are the logical cores that may be used, None asks the system."""
    cores = cores or _usable_cores()
    blocks = [_fields(block) for block in (_text(root / "proc/cpuinfo") or "").split("\n\n")]
    first = next((block for block in blocks if block), {})
    physical = {(block["physical id"], block["core id"]) for block in blocks if "physical id" in block and "core id" in block}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    architecture = platform.machine()
    meminfo = {key: int(value.split()[0]) * 1024 for key, value in _fields(_text(root / "proc/meminfo") or "").items()}
    memory_limit, headroom = _memory_limit(root)
    available = meminfo.get("MemAvailable")
    load = (_text(root / "proc/loadavg") or "").split()
    return Machine(
        system=platform.platform(),
        architecture=architecture,
        cpu=first.get("model name") or platform.processor() or architecture,
        logical_cores=cores,
        physical_cores=min(len(physical) or cores, cores),
        features=tuple(name for names in FEATURES.values() for name in names if name in flags),
        memory=meminfo.get("MemTotal"),
        available=min((size for size in (available, headroom) if size is not None), default=None),
        memory_limit=memory_limit,
        cpu_limit=_cpu_limit(root),
        load=float(load[0]) if load else None,
        nvidia=(root / "proc/driver/nvidia/version").exists(),
        amd=(root / "sys/class/kfd").exists() and (root / "dev/kfd").exists(),
    )


def read_pressure(seconds: float, root: Path = ROOT) -> Pressure | None:
    """Look twice at the machine's CPU times. This process sleeps in between, so that what is busy are others."""
    before, begun = _cpu_times(root), time.monotonic()
    time.sleep(seconds)
    after, passed = _cpu_times(root), time.monotonic() - begun
    if before is None or after is None:
        return None
    busy, stolen = ((late - early) / os.sysconf("SC_CLK_TCK") / passed for early, late in zip(before, after, strict=True))
    return Pressure(round(busy, 2), round(stolen, 2))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _fields(text: str) -> dict[str, str]:
    """Lines of the form `key : value`."""
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_times(root: Path) -> tuple[int, int] | None:
    """Ticks that all cores together were busy, and that were stolen, since the machine started (proc(5))."""
    text = _text(root / "proc/stat")
    if text is None:
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in text.split("\n", 1)[0].split()[1:9])
    return user + nice + system + irq + softirq, steal


def _groups(root: Path) -> list[Path]:
    """The folders of this process's control group and of those around it (cgroup v2), innermost first."""
    top = root / "sys/fs/cgroup"
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        if line.startswith("0::"):
            inner = top / line.removeprefix("0::").strip("/")
            return [folder for folder in (inner, *inner.parents) if folder == top or top in folder.parents]
    return []


def _cpu_limit(root: Path) -> float | None:
    limits = []
    for folder in _groups(root):
        quota, _, period = (_text(folder / "cpu.max") or "max").strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
    old = root / "sys/fs/cgroup/cpu"
    quota, period = (_text(old / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    if quota.strip().isdigit() and period.strip().isdigit():
        limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _memory_limit(root: Path) -> tuple[int | None, int | None]:
    """The tightest limit on memory, and the least that is left below any limit."""
    folders = [(folder, "memory.max", "memory.current") for folder in _groups(root)]
    folders.append((root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
    limits, left = [], []
    for folder, limit, usage in folders:
        most, used = (_text(folder / limit) or "").strip(), (_text(folder / usage) or "").strip()
        if most.isdigit() and int(most) < UNLIMITED:
            limits.append(int(most))
            left.append(max(0, int(most) - int(used or 0)))
    return min(limits, default=None), min(left, default=None)
