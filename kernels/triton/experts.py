"""Mixtures of experts: which experts a token goes to, products with the weights of each, and their sum. Nothing waits for the host, and
every grid follows from the number of tokens, of experts and of those used.

    router's logits [T, E] ─route─▶ chosen, weights [T, used]
    chosen ─sort─▶ order [T * used]    pairs token * used + place, by expert, then by number
                   places [T * used]   where each pair stands among them
                   tiles [tiles, 3]    an expert, its first pair of the tile among the sorted, the one behind its last; perhaps none
    x ─products of tiles, gated, products of tiles─▶ [T * used, H], sorted ─combine─▶ [T, H], each token's in the order of its choice

Pairs are sorted by counting: the place of one is how many come before it. A tile is rows of one expert, so that its product is that of a
linear layer (`linear.py`, `grouped.py`, `scaled.py`), whose rows do not know each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.gated import gated
from headrace.kernels.triton.linear import multiply
from headrace.kernels.triton.products import Tiles
from headrace.kernels.triton.tiles import EXPERT_TOKENS, power_of_two
from headrace.kernels.triton.weights import DeviceWeight, prepare
from headrace.kernels.weights import Weight

_SORTED_AT_ONCE = 8192
"""Comparisons of pairs with experts that a program makes at once."""
_COMBINE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Routing:
    """`headrace.kernels.ops.Routing`."""

    chosen: torch.Tensor
    """int32 [T, used]."""
    weights: torch.Tensor
    """float32 [T, used]."""
    experts: int
    places: torch.Tensor
    """int32 [T * used]."""
    tiles: Tiles

    @property
    def used(self) -> int:
        return self.chosen.shape[1]


@triton.jit
def route_kernel(logits, chosen, weights, E, used, RENORMALIZE: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    experts, places = tl.arange(0, BLOCK), tl.arange(0, PLACES)
    logit = tl.load(logits + token * E + experts, mask=experts < E, other=float("-inf"))
    odd = tl.max((logit != logit).to(tl.int32), 0) > 0
    # What is not a number is chosen first, so that it shows.
    key = tl.where(logit != logit, float("inf"), logit)
    largest = tl.where(odd, float("nan"), tl.max(key, 0))
    share = tl.exp(logit - largest)
    left = experts < E
    found, shares = tl.zeros([PLACES], tl.int32), tl.zeros([PLACES], tl.float32)
    for place in range(used):
        best = tl.max(tl.where(left, key, float("-inf")), 0)
        expert = tl.min(tl.where(left & (key == best), experts, BLOCK), 0)
        left = left & (experts != expert)
        found = tl.where(places == place, expert, found)
        shares = tl.where(places == place, tl.sum(tl.where(experts == expert, share, 0.0), 0), shares)
    total = tl.sum(shares, 0) if RENORMALIZE else tl.sum(tl.where(experts < E, share, 0.0), 0)
    tl.store(chosen + token * used + places, found, mask=places < used)
    tl.store(weights + token * used + places, shares / total, mask=places < used)


@triton.jit
def of_expert(hit, values):
    """For each row of hit [rows, experts], which has one expert at most, that expert's value; else 0."""
    return tl.sum(tl.where(hit, values[None, :], 0), 1)


@triton.jit(do_not_specialize=["pairs", "most"])
def sort_kernel(chosen, order, places, tiles, pairs, most, E: tl.constexpr, EACH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """A program sorts BLOCK pairs, and writes as many rows of `tiles`, of which there are `most`.

    With EACH, tile i begins with pair i of the sorted ones, if any does. Otherwise those of expert e are numbered from
    starts[e] // TOKENS + e on: that is behind the last one of expert e - 1, and never more than pairs // TOKENS + experts.
    """
    begin = tl.program_id(0) * BLOCK
    rows, experts = begin + tl.arange(0, BLOCK), tl.arange(0, E)
    starts, counts, before = tl.zeros([E], tl.int32), tl.zeros([E], tl.int32), tl.zeros([E], tl.int32)
    for at in range(0, pairs, BLOCK):
        pair = at + tl.arange(0, BLOCK)
        expert = tl.load(chosen + pair, mask=pair < pairs, other=E)
        count = tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
        counts += count
        before += tl.where(at < begin, count, 0)
        starts += tl.sum((expert[:, None] < experts[None, :]).to(tl.int32), 0)

    own = tl.load(chosen + rows, mask=rows < pairs, other=E)
    earlier = (own[:, None] == own[None, :]) & (rows[:, None] > rows[None, :])
    place = of_expert(own[:, None] == experts[None, :], starts + before) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + place, rows, mask=rows < pairs)
    tl.store(places + rows, place, mask=rows < pairs)

    first = starts if EACH else starts // TOKENS + experts
    # The last expert whose tiles begin here or before.
    expert = tl.sum((first[None, :] <= rows[:, None]).to(tl.int32), 1) - 1
    hit = expert[:, None] == experts[None, :]
    number, start, count = rows - of_expert(hit, first), of_expert(hit, starts), of_expert(hit, counts)
    skipped = number if EACH else number * TOKENS
    some = (skipped < count) & (number % TOKENS == 0 if EACH else number >= 0)
    inside = rows < most
    tl.store(tiles + 3 * rows, expert, mask=inside)
    # Where there is no row, a product still reads what belongs to the first one.
    tl.store(tiles + 3 * rows + 1, tl.where(some, start + skipped, 0), mask=inside)
    tl.store(tiles + 3 * rows + 2, tl.where(some, start + tl.minimum(skipped + TOKENS, count), 0), mask=inside)


@triton.jit
def combine_kernel(X, places, weights, Y, used, width, BLOCK: tl.constexpr):
    """Y[t] = 0 + weights[t, 0] * X[places[t, 0]] + … in this order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(used):
        row = tl.load(places + token * used + i).to(tl.int64)
        x = tl.load(X + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
        total += tl.load(weights + token * used + i) * x
    tl.store(Y + token * width + columns, total.to(Y.dtype.element_ty), mask=columns < width)


def tiles_of(pairs: int, experts: int) -> tuple[int, int]:
    """Rows of a tile at most, which are about as many as an expert has, and how many tiles there may be."""
    tile = EXPERT_TOKENS[pairs > EXPERT_TOKENS[0] * experts]
    return tile, min(pairs, pairs // tile + experts)


def route(logits: torch.Tensor, used: int, renormalize: bool) -> Routing:
    """The choice that float32 logits [T, E] make. ValueError for a number of experts that there is not."""
    tokens, experts = logits.shape
    if not 1 <= used <= experts:
        raise ValueError(f"{used} of {experts} experts cannot be used: from 1 to all of them can")
    device, pairs = logits.device, tokens * used
    chosen, order, places = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(3))
    weights = torch.empty(tokens, used, dtype=torch.float32, device=device)
    tile, most = tiles_of(pairs, experts)
    table = torch.empty(most, 3, dtype=torch.int32, device=device)
    if tokens:
        route_kernel[(tokens,)](
            logits,
            chosen,
            weights,
            experts,
            used,
            RENORMALIZE=renormalize,
            BLOCK=power_of_two(experts),
            PLACES=power_of_two(used),
            num_warps=1,
        )
        columns = power_of_two(experts)
        block = max(16, min(64, _SORTED_AT_ONCE // columns))
        sort_kernel[(triton.cdiv(pairs, block),)](
            chosen, order, places, table, pairs, most, E=columns, EACH=most == pairs, TOKENS=tile, BLOCK=block, num_warps=4
        )
    return Routing(chosen.view(tokens, used), weights, experts, places, Tiles(table, order, used, tile))


def prepare_experts(experts: int, stacks: Sequence[Sequence[Weight]], device: torch.device, rounds_inputs: bool) -> list[DeviceWeight]:
    """A layer's weights of so many experts, `DeviceWeight.experts` of them in each part. Inputs are not rounded where every expert wants
    that by another scale. ValueError where experts differ in anything else."""
    if len(stacks) != experts:
        raise ValueError(f"there are weights of {len(stacks)} experts: it must be {experts}")
    each = [prepare(stack, None, device, rounds_inputs) for stack in stacks]
    if rounds_inputs and len({part.rounding for parts in each for part in parts}) > 1:
        return prepare_experts(experts, stacks, device, False)
    if len(forms := {tuple(_form(part) for part in parts) for parts in each}) != 1:
        raise ValueError(f"experts must have weights of one form, not of {sorted(map(str, forms))}")
    return [_together(parts) for parts in zip(*each, strict=True)]


def _form(part: DeviceWeight) -> tuple:
    return part.form, part.values.dtype, tuple(part.values.shape), part.minimums is None, part.group, part.low, part.rounding


def _together(parts: Sequence[DeviceWeight]) -> DeviceWeight:
    """One behind the other."""

    def stacked(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        found = [tensor for tensor in tensors if tensor is not None]
        if not found:
            return None
        # Scales may fit float16 in some experts and not in others.
        dtype = found[0].dtype if len({tensor.dtype for tensor in found}) == 1 else torch.float32
        return torch.cat([tensor.to(dtype) for tensor in found])

    # Bytes, as not every type can be put together everywhere.
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(parts[0].values.dtype)
    scales, minimums = stacked([part.scales for part in parts]), stacked([part.minimums for part in parts])
    return replace(parts[0], values=values, scales=scales, minimums=minimums, experts=len(parts))


def experts(
    x: torch.Tensor, routing: Routing, gate_up: Sequence[DeviceWeight], down: Sequence[DeviceWeight], activation: str, out: torch.dtype
) -> torch.Tensor:
    """See `Ops.experts`. x [T, H]: [T, H] of type `out`."""
    if not routing.experts == gate_up[0].experts == down[0].experts:
        raise ValueError(f"the router chooses among {routing.experts} experts, there are {gate_up[0].experts} and {down[0].experts}")
    if len(x) == 0:
        return torch.empty(0, sum(part.outputs for part in down), dtype=out, device=x.device)
    inner = gated(products(x, routing.tiles, gate_up, out), activation)
    return combine(products(inner, replace(routing.tiles, used=0), down, out), routing.places, routing.weights)


def combine(x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows `places` [T * used] of x [T * used, H] added up by weights [T, used]: [T, H] of its type."""
    (tokens, used), width = weights.shape, x.shape[1]
    y = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    combine_kernel[(tokens, triton.cdiv(width, _COMBINE_BLOCK))](x, places, weights, y, used, width, BLOCK=_COMBINE_BLOCK, num_warps=4)
    return y


def products(x: torch.Tensor, tiles: Tiles, parts: Sequence[DeviceWeight], out: torch.dtype) -> torch.Tensor:
    """Every sorted pair's row of x, which is the token's or its own, times its expert's weights: [pairs, N]."""
    pairs, width = len(tiles.order), sum(part.outputs for part in parts)
    y = torch.empty(pairs, width, dtype=out, device=x.device)
    begin = 0
    for part in parts:
        multiply(x, part, y[:, begin:], width, tiles)
        begin += part.outputs
    return y
