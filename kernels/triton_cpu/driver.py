"""Triton's driver for the CPU: loads shared objects, packs arguments, and runs the programs of a grid.

A launch returns when all programs have run, so there are no streams. Checked launches end in an error that names the kernel and the line.
"""

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from headrace.kernels.triton_cpu.compiler import checked

_SLOTS = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
}

_OUTSIDE, _RACE, _ASSERTION, _PLACE = 1, 2, 3, 4
_DID = ("reads", "writes", "updates atomically", "watches")


class _Extent(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("first", ctypes.c_int32),
        ("granule", ctypes.c_int32),
        ("places", ctypes.c_void_p),
        ("more", ctypes.c_void_p),
    )


class _Found(ctypes.Structure):
    """What a launch found first, as in checks.hpp."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("line", ctypes.c_int32),
        ("argument", ctypes.c_int32),
        ("program", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("how", ctypes.c_int32),
        ("other_how", ctypes.c_int32),
        ("other_line", ctypes.c_int32),
        ("other_program", ctypes.c_int32),
        ("taken", ctypes.c_int32),
    )


class CpuLauncher:
    """Runs one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._name, self._lines, self._messages = metadata.name, metadata.lines, metadata.messages
        self._passed = [source.signature[name] for name in source.fn.arg_names]
        self._arguments = [tuple(one) for one in metadata.arguments]
        self._checked = metadata.checked

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, about: Any, enter: Any, leave: Any, *arguments: Any
    ) -> None:
        slots = (ctypes.c_int64 * max(1, len(self._arguments)))()
        tensors: list[tuple[str, torch.Tensor | None]] = []
        for slot, ((name, kind), value) in enumerate(zip(self._arguments, _flat(self._passed, arguments), strict=True)):
            if not kind.startswith("*"):
                _SLOTS[kind].from_buffer(slots, 8 * slot).value = value
            elif hasattr(value, "data_ptr"):
                if value.device.type != "cpu":
                    raise ValueError(f"{self._name}: {name} is on {value.device}, this backend computes on the CPU")
                slots[slot] = value.data_ptr()
                tensors.append((name, getattr(value, "base", value)))  # `triton.reinterpret` wraps a tensor
            else:
                slots[slot] = value or 0
                tensors.append((name, None))
        if x * y * z == 0:
            return
        extents = _extents([tensor for _, tensor in tensors]) if self._checked else None
        found = _Found()
        function(slots, x, y, z, torch.get_num_threads(), extents, len(tensors), ctypes.byref(found))
        if found.kind:
            raise self._error(found, [name for name, _ in tensors], (x, y))

    def _error(self, found: _Found, names: list[str], grid: tuple[int, int]) -> Exception:
        def program(number: int) -> tuple[int, int, int]:
            return number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]

        who, where = program(found.program), self._lines[found.line]
        if found.kind == _RACE:
            what = f"{who} {_DID[found.how]} byte {found.offset} of {names[found.argument]}, at {where}"
            other = f"{program(found.other_program)} {_DID[found.other_how]} it in the same launch, at {self._lines[found.other_line]}"
            return MemoryError(f"{self._name}: programs race: {what}, and {other}; nothing orders the two")
        if found.kind == _ASSERTION:
            return AssertionError(f"{self._name}: program {who}: {self._messages[found.argument]}, at {where}")
        if found.kind == _PLACE:
            return IndexError(f"{self._name}: program {who} gathers element {found.offset} of {found.argument}, at {where}")
        which = f"{found.offset} bytes from the begin of {names[found.argument]}" if found.argument >= 0 else "an address of no tensor"
        return IndexError(f"{self._name}: program {who} accesses {which}, which is not within it, at {where}")


def _flat(kinds: Iterable[Any], values: Iterable[Any]) -> Iterator[Any]:
    """What a kernel takes of what it is passed: constants are compiled into it, tuples and descriptors are taken apart."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind.startswith("tensordesc"):
            yield value.base
            yield from (*value.shape, *value.strides, value.padding == "nan", value.round_f32_to_tf32)
            yield from (*value.shape, *value.strides)
        elif kind != "constexpr":
            yield value


def _extents(tensors: list[torch.Tensor | None]) -> ctypes.Array:
    """The memory of each; a pointer that came without a tensor has none."""
    extents = (_Extent * max(1, len(tensors)))()
    firsts: dict[tuple[int, int], int] = {}
    for place, tensor in enumerate(tensors):
        if tensor is not None:
            begin, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            extents[place] = _Extent(begin, begin + size, firsts.setdefault((begin, size), place))
        else:
            extents[place].first = place
    return extents


class CpuUtils:
    """What Triton asks of a device."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module, function, registers, spills, most threads a block."""
        with tempfile.NamedTemporaryFile(suffix=".so", prefix="headrace-triton-", delete=False) as file:
            file.write(binary)
        try:
            library = ctypes.CDLL(file.name)
        finally:
            Path(file.name).unlink()
        function = library.launch
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        function.argtypes, function.restype = (pointer, integer, integer, integer, integer, pointer, integer, pointer), None
        return library, function, 0, 0, 1 << 30

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": 1 << 40, "multiprocessor_count": os.cpu_count() or 1, "warpSize": 1}


class CpuDriver(DriverBase):
    """`triton.backends.driver.DriverBase`, where torch has no GPU."""

    def __init__(self) -> None:
        self.utils = CpuUtils()
        self.launcher_cls = CpuLauncher
        super().__init__()

    @staticmethod
    def is_active() -> bool:
        return not torch.cuda.is_available() and not (hasattr(torch, "xpu") and torch.xpu.is_available())

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("headrace_cpu", "native", 1)

    def get_current_device(self) -> int:
        """Kernels are kept by this: with checks they are others."""
        return int(checked())

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable:
        """Seconds are those of the clock; `triton.autotune` asks."""

        def bench(call: Callable, *, quantiles: Sequence[float] = (0.5,), **_: Any) -> list[float]:
            times = []
            for _turn in range(5):
                begun = time.perf_counter()
                call()
                times.append((time.perf_counter() - begun) * 1e3)
            times.sort()
            return [times[min(len(times) - 1, int(quantile * len(times)))] for quantile in quantiles]

        return bench

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1 << 20, dtype=torch.int8)

    def clear_cache(self, cache: torch.Tensor) -> None:
        cache.zero_()
