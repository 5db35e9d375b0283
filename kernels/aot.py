"""Compiling the Triton kernels for GPUs that are not here, and reading what came out.

    with compiling_for("sm_90") as kernels:       launches as in production, on tensors of the device "meta"
        ops.linear(x, weight)
    kernels[0].registers, .spills, .shared, .tensor_core, .loads, .wide_loads

Triton's own launcher specializes every kernel, by the very arguments of the launch, under a stand-in for the GPU's driver; nothing runs.
Machine code of NVIDIA's GPUs is read with the disassembler that Triton brings along, that of AMD's from the assembly it prints.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from headrace.kernels.aot_loads import Load, loads_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

MOST_SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one block may take, by target (CUDA C++ programming guide, table of compute capabilities; CDNA 3 ISA)."""

_TENSOR_CORE = re.compile(r"^(?:HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|DMMA|UTC\w*MMA|v_mfma|v_smfmac)")
_NVIDIA_OPCODE = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")
_AMD_OPCODE = re.compile(r"^\s+([a-z]\w*_\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One launch, compiled."""

    name: str
    target: str
    error: str | None = None
    """Why it could not be compiled: then nothing below is known."""
    registers: int = 0
    """A thread's."""
    spills: int = 0
    """Bytes of a thread's registers that are kept in memory."""
    shared: int = 0
    """Bytes a block."""
    warps: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    loads: dict[str, Load] = field(default_factory=dict)
    """By argument, as they were passed when this was launched first."""

    @property
    def tensor_core(self) -> Counter[str]:
        """Instructions of tensor cores, by their first name."""
        found: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            if _TENSOR_CORE.match(opcode):
                found[opcode.split(".")[0]] += count
        return found

    @property
    def wide_loads(self) -> float:
        """Share of the bytes of the tensors that are loaded from, each counted once, which come 16 at a time a thread."""
        every = sum(load.bytes for load in self.loads.values())
        return sum(load.bytes * load.wide for load in self.loads.values()) / every if every else 1.0


class StandIn:
    """What Triton asks its driver when it compiles, answered for a GPU that is not here."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        """Triton keeps what it has compiled by this."""
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Launches inside are compiled for `target` (a key of TARGETS) and noted, equal ones once."""
    found: list[Compiled] = []
    known: set[int] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        try:
            kernel: Any = run(self, *arguments, grid=grid, warmup=True, **options)
        except Exception as error:
            found.append(Compiled(self.fn.__name__, target, str(error.__cause__ or error)))
            return None
        if id(kernel) not in known:
            known.add(id(kernel))
            found.append(_read(self.fn.__name__, target, kernel, dict(zip(self.arg_names, arguments, strict=False))))
        return kernel

    before = driver._active
    driver.set_active(StandIn(target))  # type: ignore[arg-type]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        yield found
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active = before


def _read(name: str, target: str, kernel: Any, arguments: dict[str, Any]) -> Compiled:
    metadata = kernel.metadata
    passed = [argument for argument, kind in kernel.src.signature.items() if kind != "constexpr"]
    found = loads_of(kernel.asm["llir"], passed, arguments)
    if "cubin" not in kernel.asm:
        assembly = kernel.asm["amdgcn"]
        return Compiled(
            name,
            target,
            None,
            _number(assembly, r"\.vgpr_count:\s+(\d+)"),
            4 * _number(assembly, r"\.vgpr_spill_count:\s+(\d+)"),
            metadata.shared,
            metadata.num_warps,
            Counter(_AMD_OPCODE.findall(assembly)),
            found,
        )
    return Compiled(name, target, None, *_nvidia(kernel.asm["cubin"], metadata.shared, metadata.num_warps), found)


@functools.cache
def _nvidia(cubin: bytes, shared: int, warps: int) -> tuple[int, int, int, int, Counter[str]]:
    """Registers, spills, shared memory, warps, instructions: once, as models have kernels in common and this takes as long as compiling."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        # The instructions alone: what jumps where is not asked, and would take as long again.
        code = _output(tools / "nvdisasm", "-c", "-ndf", file.name)
    # Without a spill a thread has no stack: nothing here is indexed at run time.
    spills = _number(usage, r"STACK:(\d+)") + _number(usage, r"LOCAL:(\d+)")
    return _number(usage, r"REG:(\d+)"), spills, shared, warps, Counter(_NVIDIA_OPCODE.findall(code))


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _output(program: Path, *arguments: str) -> str:
    return subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True).stdout
