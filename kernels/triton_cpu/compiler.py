"""Triton's stages for the CPU: its own simplifications of the tile IR, C++, and a shared object."""

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton._C.libtriton import ir, passes
from triton.backends.compiler import BaseBackend, GPUTarget

from headrace.kernels.triton_cpu.lower import lower

RUNTIME = Path(__file__).with_name("runtime.hpp")
COMPILER = os.environ.get("CXX", "g++")
# Nothing is fused, reordered or flushed that the kernel does not say.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fwrapv", "-fopenmp", "-w")


def checked() -> bool:
    """Whether accesses are checked: HEADRACE_TRITON_CHECK=1."""
    return os.environ.get("HEADRACE_TRITON_CHECK") == "1"


@dataclass(frozen=True)
class CpuOptions:
    """What Triton's front end asks its options; a CPU has no use for most of it."""

    num_warps: int = 4
    num_ctas: int = 1
    num_stages: int = 1
    maxnreg: int | None = None
    debug: bool = False
    sanitize_overflow: bool = False
    checked: bool = False
    backend_name: str = "headrace_cpu"
    arch: str = "native"
    cluster_dims: tuple = (1, 1, 1)
    extern_libs: tuple = ()
    supported_fp8_dtypes: tuple = ("fp8e4nv", "fp8e5")
    deprecated_fp8_dot_operand_dtypes: tuple = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple = ("ieee", "tf32", "tf32x3")
    max_num_imprecise_acc_default: int = 0
    enable_fp_fusion: bool = False
    launch_cooperative_grid: bool = False
    instrumentation_mode: str = ""
    ir_override: str | None = None

    def hash(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


class CpuBackend(BaseBackend):
    """`triton.backends.compiler.BaseBackend`, for the target "headrace_cpu"."""

    binary_ext = "so"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "headrace_cpu"

    def parse_options(self, options: dict) -> CpuOptions:
        # What only a GPU has a use for makes no other kernel here.
        known = CpuOptions.__dataclass_fields__.keys() - {"checked", "num_warps", "num_stages", "maxnreg"}
        chosen = {name: value for name, value in options.items() if name in known}
        if checked():  # assertions are checks too
            chosen["debug"] = True
        return CpuOptions(**chosen, checked=checked())

    def add_stages(self, stages: dict, options: CpuOptions, language: Any = None) -> None:
        stages["ttir"] = _simplified
        stages["cpp"] = lambda module, metadata: _cpp(str(module), metadata)
        stages["so"] = lambda source, metadata: _shared_object(source, options.checked)

    def load_dialects(self, context: Any) -> None:
        """The tile IR needs none beside Triton's own."""

    def get_codegen_implementation(self, options: CpuOptions) -> dict:
        return {"min_dot_size": lambda left, right: (1, 1, 1)}

    def get_module_map(self) -> dict:
        from headrace.kernels.triton_cpu import libdevice  # Triton's language is not there yet when it looks for backends

        return {"triton.language.extra.libdevice": libdevice}

    def pack_metadata(self, metadata: Any) -> tuple:
        return ()

    def hash(self) -> str:
        return _made_by()


@functools.cache
def _made_by() -> str:
    """Changes with everything that a shared object is made by."""
    files = b"".join(path.read_bytes() for path in sorted((*RUNTIME.parent.glob("*.hpp"), *RUNTIME.parent.glob("*.py"))))
    machine = re.search(r"^flags.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return hashlib.sha256(files + (machine[0] if machine else "").encode() + " ".join((COMPILER, *FLAGS)).encode()).hexdigest()


def _simplified(module: Any, metadata: dict) -> Any:
    manager = ir.pass_manager(module.context)
    passes.common.add_inliner(manager)
    # Block pointers and tensor descriptors become pointers and masks, descriptors that are passed become their numbers.
    passes.ttir.add_rewrite_tensor_pointer(manager)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
    passes.ttir.add_combine(manager)
    passes.common.add_canonicalizer(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    manager.run(module, "ttir")
    return module


def _cpp(text: str, metadata: dict) -> str:
    kernel = lower(text)
    metadata |= {"shared": 0, "name": kernel.name, "arguments": kernel.arguments, "lines": kernel.lines, "messages": kernel.messages}
    return kernel.source


def _shared_object(source: str, with_checks: bool) -> bytes:
    flags = (*FLAGS, "-fPIC", *(["-DHEADRACE_TRITON_CHECKED"] if with_checks else []))
    with tempfile.TemporaryDirectory(prefix="headrace-triton-") as folder:
        path, made = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        path.write_text(source)
        _compile(*flags, f"-I{_precompiled(flags)}", f"-I{RUNTIME.parent}", "-shared", str(path), "-o", str(made))
        return made.read_bytes()


@functools.cache
def _precompiled(flags: tuple[str, ...]) -> Path:
    """A folder with what kernels include, compiled: reading it anew would take as long as a small kernel does. It lies beside what Triton
    keeps."""
    name = hashlib.sha256("\n".join((_made_by(), *flags)).encode()).hexdigest()[:16]
    folder = Path(knobs.cache.dir) / f"headrace-{name}"
    header = folder / "runtime.hpp.gch"
    if not header.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may be at it too.
        with tempfile.TemporaryDirectory(dir=folder) as apart:
            made = Path(apart) / header.name
            _compile(*flags, "-x", "c++-header", str(RUNTIME), "-o", str(made))
            made.replace(header)
    return folder


def _compile(*arguments: str) -> None:
    ended = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{COMPILER} refused a lowered kernel:\n{ended.stderr[:2000]}")
