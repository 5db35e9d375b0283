"""Inputs of a linear layer, rounded to what weights are multiplied with.

    InputRounding   as `headrace.kernels.weights` defines it, step by step: what a format asks for
    EIGHT_BITS      the same, in groups of 32: what the native kernels do for weights of integers, whatever their format asks for
    "bf16"          bfloat16

Used by `linear.py` alone. Each step is a single rounded operation, so that a row's result depends on that row alone.
"""

import torch
import torch.nn.functional as F

from headrace.kernels.weights import LARGEST, SMALLEST, InputRounding

GROUP = 32
EIGHT_BITS = InputRounding("int8", GROUP)


def rounded(x: torch.Tensor, how: InputRounding) -> torch.Tensor:
    """x [T, K] in float32, rounded as `InputRounding` says."""
    if how.scale is not None:
        scale = torch.tensor(how.scale, dtype=torch.float32, device=x.device)
        return _codes(x * (1.0 / scale), how.kind) * scale
    width = x.shape[1]
    group = min(how.group or width, width)
    grouped = F.pad(x, (0, -width % group)).unflatten(1, (-1, group))
    highest = grouped.abs().amax(-1, keepdim=True)
    small, largest = highest < SMALLEST, LARGEST[how.kind]
    codes = _codes(grouped * torch.where(small, 0.0, largest / highest), how.kind)
    return (codes * torch.where(small, 0.0, highest / largest)).flatten(1)[:, :width]


def _codes(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        return x.round().clamp(-128.0, 127.0)
    return x.clamp(-LARGEST["e4m3"], LARGEST["e4m3"]).to(torch.float8_e4m3fn).to(torch.float32)


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] in float32 as bfloat16 has it, what is halfway between two of that rounded upwards in magnitude."""
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)
    return ((bits + 0x8000) & ~0xFFFF).view(torch.float32)
