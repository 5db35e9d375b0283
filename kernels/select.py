"""Which implementation of the op table serves: the answer to `--kernels`.

A worker asks once, at its start. Whatever cannot be had is refused by name, save under "auto", which falls back to the reference
and says so.
"""

import logging

import torch

from headrace.kernels.ops import Ops

KINDS = ("auto", "reference", "cpu", "triton")

log = logging.getLogger("headrace.kernels")


class KernelsUnavailable(Exception):
    """The kernels asked for cannot run here. The text is one line for the user, with the way out."""


def make_ops(kind: str, device: str | torch.device = "cpu", threads: int | None = None) -> Ops:
    """The ops of `kind` (one of KINDS) on `device`. `threads` bounds the CPU threads of an op; None lets the implementation choose.

    Raises KernelsUnavailable.
    """
    if kind not in KINDS:
        raise KernelsUnavailable(f'kernels "{kind}" are not known: choose one of {", ".join(KINDS)}')
    if kind == "triton":
        raise KernelsUnavailable("the Triton kernels are not built yet: choose --kernels auto, reference or cpu")
    device = torch.device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if kind == "cpu" and device.type != "cpu":
        raise KernelsUnavailable(f"the native CPU kernels cannot run on {device}: choose --kernels auto or reference")
    if kind == "reference" or device.type != "cpu":
        return _reference(device)
    try:
        from headrace.kernels.cpu import CpuOps
    except ImportError as reason:
        if kind == "cpu":
            raise KernelsUnavailable(
                f"the native CPU kernels cannot be loaded ({reason}): reinstall Headrace where a C++ compiler is present, "
                "or choose --kernels reference"
            ) from None
        log.warning("the native CPU kernels cannot be loaded (%s): serving with the slower reference kernels", reason)
        return _reference(device)
    try:
        return CpuOps(threads)
    except ValueError as reason:
        raise KernelsUnavailable(f"the native CPU kernels cannot run: {reason}") from None


def _reference(device: torch.device) -> Ops:
    from headrace.kernels.reference import ReferenceOps

    return ReferenceOps(device)
