"""Which backend serves: the answer to `--kernels`.

A worker asks once, at its start. Whatever cannot be had is refused by name, save under "auto", which falls back to the reference
and says so.
"""

import logging

from headrace.kernels.ops import Backend

KINDS = ("auto", "reference", "cpu", "triton")

log = logging.getLogger("headrace.kernels")


class KernelsUnavailable(Exception):
    """The kernels asked for cannot run here. The text is one line for the user, with the way out."""


def make_backend(kind: str, device: str = "cpu", threads: int | None = None, activations: str = "f32") -> Backend:
    """The backend of `kind` (one of KINDS) on `device` ("cpu", "cuda", "cuda:1", …). `threads` bounds the CPU threads of an op; None lets
    the backend choose. `activations` is "f32" or "int8": what weights of integers are multiplied with.

    Raises KernelsUnavailable.
    """
    if kind not in KINDS:
        raise KernelsUnavailable(f'kernels "{kind}" are not known: choose one of {", ".join(KINDS)}')
    if kind == "triton":
        raise KernelsUnavailable("the Triton kernels are not built yet: choose --kernels auto, reference or cpu")
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


def _reference(device: str, threads: int | None, activations: str) -> Backend:
    from headrace.kernels.reference import ReferenceBackend

    return ReferenceBackend(device, threads, activations)
