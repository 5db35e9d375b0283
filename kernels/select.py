"""Which backend serves: the answer to `--kernels`.

A worker asks once, at its start. Whatever cannot be had is refused by name, save under "auto", which takes the GPU if there is one, else
the CPU's own kernels, and falls back to the reference and says so.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
from pathlib import Path

from headrace.kernels.ops import Backend

KINDS = ("auto", "reference", "cpu", "triton")

log = logging.getLogger("headrace.kernels")


class KernelsUnavailable(Exception):
    """The kernels asked for cannot run here. The text is one line for the user, with the way out."""


GPU_NODES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Where the drivers of NVIDIA's and AMD's GPUs are found: without either nobody waits for torch to look."""


def load(kind: str) -> None:
    """Import what `make_backend` will for this kind, as far as it is there, and do nothing else: processes that are forked later share it,
    and no GPU may be in use by then."""
    with contextlib.suppress(ImportError):
        if kind == "reference":
            importlib.import_module("headrace.kernels.reference")
        elif kind == "triton" or (kind == "auto" and _has_gpu()):
            importlib.import_module("headrace.kernels.triton")
        else:
            importlib.import_module("headrace.kernels.cpu")


def make_backend(kind: str, device: str = "cpu", threads: int | None = None, activations: str = "f32") -> Backend:
    """The backend of `kind` (one of KINDS) on `device` ("cpu", "cuda", "cuda:1", …). `threads` bounds the CPU threads of an op; None lets
    the backend choose. `activations` is "f32", "int8", "bf16" or "auto": what weights are multiplied with; on a GPU, "f32" makes
    everything float32, others bfloat16, save that with "auto" and "int8" inputs are rounded to 8 bits where the checkpoint asks for it.
    Triton's kernels run on the GPU, and without one on the CPU.

    Raises KernelsUnavailable.
    """
    if kind not in KINDS:
        raise KernelsUnavailable(f'kernels "{kind}" are not known: choose one of {", ".join(KINDS)}')
    if kind == "triton" or (kind == "auto" and device == "cpu" and _has_gpu()):
        try:
            return _triton(device, activations, only_on_a_gpu=kind == "auto")
        except KernelsUnavailable as reason:
            if kind == "triton":
                raise
            log.warning("%s: serving from the CPU", reason)
    if kind == "cpu" and device != "cpu":
        raise KernelsUnavailable(f"the native CPU kernels cannot run on {device}: choose --kernels auto or reference")
    if kind == "reference" or device != "cpu":
        return _reference(device, threads, activations)
    try:
        from headrace.kernels.cpu import CpuBackend
    except ImportError as reason:
        if kind == "cpu":
            raise KernelsUnavailable(
                f"the native CPU kernels cannot be loaded ({reason}): reinstall Headrace where a C++ compiler is present, "
                "or choose --kernels reference"
            ) from None
        log.warning("the native CPU kernels cannot be loaded (%s): serving with the slower reference kernels", reason)
        return _reference(device, threads, activations)
    try:
        return CpuBackend(threads, activations=activations)
    except ValueError as reason:
        raise KernelsUnavailable(f"the native CPU kernels cannot run: {reason}") from None


def _has_gpu() -> bool:
    return any(node.exists() for node in GPU_NODES)


def _reference(device: str, threads: int | None, activations: str) -> Backend:
    from headrace.kernels.reference import ReferenceBackend

    return ReferenceBackend(device, threads, activations)


def _triton(device: str, activations: str, only_on_a_gpu: bool) -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise KernelsUnavailable('the Triton kernels need the package triton, which comes with torch for GPUs: install "headrace[triton]"')
    import torch

    from headrace.kernels.triton import TritonBackend

    dtype, rounds_inputs = torch.float32 if activations == "f32" else torch.bfloat16, activations in ("auto", "int8")
    if torch.cuda.is_available():
        return TritonBackend(device if device != "cpu" else "cuda", dtype, rounds_inputs)
    if only_on_a_gpu:
        raise KernelsUnavailable("there is a GPU, and torch cannot use it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        log.warning("Triton interprets the kernels on the CPU: thousands of times slower than a GPU, and right in float32 alone")
        return TritonBackend("cpu", torch.float32)
    log.warning("no GPU: the Triton kernels run on the CPU, which proves them and is slow; --kernels auto is faster")
    return TritonBackend("cpu", dtype, rounds_inputs)
