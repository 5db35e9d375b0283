"""`headrace doctor`: what it reads of a machine, and what it concludes from that."""

import sys
from pathlib import Path

import msgspec
import pytest

from headrace.engine.config import Config
from headrace.engine.doctor import Model, Probe, Report, ask_kernels, diagnose, find_model, table
from headrace.engine.machine import Machine, Pressure, read_machine, read_pressure

MACHINE = Machine(
    system="Linux",
    architecture="x86_64",
    cpu="A processor",
    logical_cores=8,
    physical_cores=4,
    features=("avx2", "fma"),
    memory=16 << 30,
    available=8 << 30,
    memory_limit=None,
    cpu_limit=None,
    load=0.1,
    nvidia=False,
    amd=False,
)
HEALTHY = Report(
    version="1.0.0",
    python="3.11.0",
    machine=MACHINE,
    pressure=Pressure(0.0, 0.0),
    packages={"torch": "2.0", "triton": None},
    settings=Config(),
    settings_error=None,
    model=Model("tiny", "/tiny.gguf", 100 << 20, 2048),
    model_error=None,
    probe=Probe(kernels="cpu", torch="2.0", threads=4),
    findings=[],
)


def findings(**changes: object) -> list[tuple[str, str]]:
    machine = msgspec.structs.replace(MACHINE, **{name: changes.pop(name) for name in list(changes) if name in Machine.__struct_fields__})
    report = msgspec.structs.replace(HEALTHY, machine=machine, **changes)
    return [(finding.kind, finding.text) for finding in diagnose(report)]


def test_a_healthy_machine_has_no_findings():
    assert findings() == []


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"packages": {"zmq": None}}, "problem", "the package zmq is missing: pip install zmq"),
        ({"settings_error": "HEADRACE_PORT=x: expected an integer"}, "problem", "HEADRACE_PORT=x"),
        ({"model_error": "no model at '/x'", "model": None}, "problem", "no model at '/x'"),
        ({"probe": Probe(error="torch is broken")}, "problem", "no kernels can be loaded: torch is broken"),
        ({"probe": Probe(kernels="reference", warnings=("no compiler",))}, "slow", "no compiler"),
        ({"probe": Probe(kernels="reference")}, "slow", "they were asked for"),
        ({"features": ("fma",)}, "slow", "no AVX2"),
        ({"architecture": "riscv64", "features": ()}, "slow", "no vector kernels for riscv64"),
        ({"nvidia": True}, "slow", "there is a GPU, but the engine would run on the CPU"),
        ({"settings": Config(threads=8)}, "slow", "threads=8, but there are 4 physical cores"),
        ({"cpu_limit": 1.5}, "slow", "allows 1.5 cores' worth of time for 4 threads: give --threads 1"),
        ({"pressure": Pressure(1.5, 0.0)}, "slow", "other processes use 1.5 of 8 cores"),
        ({"pressure": Pressure(0.0, 0.9)}, "slow", "the hypervisor takes 0.9"),
        ({"available": 50 << 20}, "problem", "tiny has 100.0 MiB of weights, and 50.0 MiB of memory are free"),
        ({"available": 150 << 20}, "slow", "few KV pages will fit"),
    ],
)
def test_a_finding_says_what_is_wrong_and_why(changes, kind, says):
    ((found, text),) = findings(**changes)
    assert found == kind
    assert says in text


def test_what_is_unknown_is_no_finding():
    assert findings(available=None, memory=None, load=None, pressure=None, model=None, settings=None) == []


@pytest.mark.parametrize("changes", [{}, {"model": None, "settings": Config(model="a/b")}, {"pressure": None, "probe": Probe(error="x")}])
def test_the_table_has_a_line_for_everything(changes):
    text = "\n".join(table(msgspec.structs.replace(HEALTHY, **changes)))
    assert all(name in text for name in ("processor", "cores", "memory", "GPU", "kernels", "model", "packages"))


# The kernels, asked in a process of their own


def test_kernels_that_crash_are_reported_with_their_last_words():
    crash = (sys.executable, "-c", "import sys; sys.exit('Illegal instruction')")
    assert ask_kernels("auto", crash) == Probe(error="Illegal instruction")
    assert ask_kernels("auto", (sys.executable, "-c", "import os; os.abort()")).error == "exit status -6"


def test_kernels_that_are_refused_say_why():
    assert 'kernels "fast" are not known' in (ask_kernels("fast").error or "")


def test_a_hub_model_is_not_fetched():
    assert find_model(Config(model="somebody/a-model")) is None


# The machine


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def core(physical: int, number: int) -> str:
    return f"model name\t: Some CPU @ 3 GHz\nphysical id\t: {physical}\ncore id\t\t: {number}\nflags\t\t: sse avx2 fma amx_int8\n"


def test_a_machine_is_read_from_its_files(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "\n".join([core(0, 0), core(0, 1), core(0, 0), core(0, 1)]),
            "proc/meminfo": "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    600 kB\n",
            "proc/loadavg": "1.50 1.00 0.50 1/100 1",
        },
    )
    machine = read_machine(root, cores=4)
    assert (machine.cpu, machine.physical_cores, machine.logical_cores) == ("Some CPU @ 3 GHz", 2, 4)
    assert machine.features == ("avx2", "fma", "amx_int8")
    assert (machine.memory, machine.available, machine.load) == (1_024_000, 614_400, 1.5)
    assert (machine.cpu_limit, machine.memory_limit, machine.nvidia, machine.amd) == (None, None, False, False)
    assert read_machine(root, cores=1).physical_cores == 1


def test_the_tightest_limit_of_nested_control_groups_counts(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
            "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
            "sys/fs/cgroup/outer/memory.max": "2000000\n",
            "sys/fs/cgroup/outer/memory.current": "500000\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        },
    )
    machine = read_machine(root)
    assert (machine.cpu_limit, machine.memory_limit, machine.available) == (1.5, 2_000_000, 1_500_000)


def test_old_control_groups_are_read_too(tmp_path):
    root = write(
        tmp_path,
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    machine = read_machine(root)
    assert (machine.cpu_limit, machine.memory_limit) == (0.5, None)


def test_a_machine_without_such_files_is_unknown_and_no_error(tmp_path):
    machine = read_machine(tmp_path)
    assert (machine.memory, machine.available, machine.load, machine.features) == (None, None, None, ())
    assert machine.physical_cores == machine.logical_cores >= 1
    assert read_pressure(0, tmp_path) is None
