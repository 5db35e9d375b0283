"""Mixtures of experts (arXiv:1701.06538): which experts a token goes to, and what they make of it.

    x ─router─▶ logits [T, E] ─▶ chosen [T, used], weights [T, used]
    rows of x that chose expert e ─▶ its MLP ─▶ outputs [T, used, H] ─▶ sum by weights, in the order of the choice

An expert multiplies its rows in the tiles of `tiles.py`, which do not care who is beside whom.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.kernels.reference.exact import exp, row_sum
from headrace.kernels.reference.gated import gated
from headrace.kernels.reference.linear import PreparedLinear, linear


@dataclass(frozen=True, slots=True)
class Routing:
    """`headrace.kernels.ops.Routing`."""

    experts: torch.Tensor
    """int64 [T, used]: by falling logit, equal ones by number."""
    weights: torch.Tensor
    """float32 [T, used]."""
    of: int
    """E."""


def route(logits: torch.Tensor, used: int, renormalize: bool) -> Routing:
    """The choice that logits [T, E] make."""
    count = logits.shape[1]
    if not 1 <= used <= count:
        raise ValueError(f"{used} of {count} experts cannot be used: from 1 to all of them can")
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    shares = exp(values - values[:, :1])
    # A logit that is not a number comes first, and so is in every difference.
    weights = shares[:, :used] / row_sum(shares[:, :used] if renormalize else shares)
    return Routing(order[:, :used], weights, count)


def experts(
    x: torch.Tensor, routing: Routing, gate_up: Sequence[PreparedLinear], down: Sequence[PreparedLinear], activation: str
) -> torch.Tensor:
    """See `Ops.experts`. x [T, H]: [T, H]."""
    if not routing.of == len(gate_up) == len(down):
        raise ValueError(f"the router chooses among {routing.of} experts, there are {len(gate_up)} and {len(down)}")
    tokens, used = routing.experts.shape
    outputs = x.new_empty(tokens, used, down[0].outputs)
    for expert in routing.experts.unique().tolist():
        rows, places = (routing.experts == expert).nonzero(as_tuple=True)
        outputs[rows, places] = linear(gated(linear(x[rows], gate_up[expert]), activation), down[expert])
    total = x.new_zeros(tokens, down[0].outputs)
    for place in range(used):
        total += routing.weights[:, place, None] * outputs[:, place]
    return total


def alike(experts: Sequence[PreparedLinear], expected: int) -> Sequence[PreparedLinear]:
    """The experts' layers as they are. ValueError unless there are as many as expected, of one shape."""
    shapes = {(one.outputs, one.parts[0].matrix.shape[0]) for one in experts}
    if len(experts) != expected or len(shapes) != 1:
        raise ValueError(f"there are layers of {len(experts)} experts, of shapes {sorted(shapes)}: it must be {expected} of one shape")
    return experts
