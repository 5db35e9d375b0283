"""Speculative sampling over trees of drafts on the device: a program a request, which walks its tree from the root to the end of a path.

    logits [N, V] ─▶ adjusted ─▶ limits: the last token in order that filters leave, and the mass ─┐
    probabilities [N, V] ─────────▶ their mass ─────────────────────────────────────────────────────┴─▶ rejection_kernel ─▶ path, tokens

What is left of a row's target after some drafts were rejected follows from one number (see `kernels.reference.rejection`), so that nothing
is written but what is found. All rows are made ready at once; the walk passes over a vocabulary once for each draft that is rejected, and
twice for each token that is drawn.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from headrace.kernels.drafts import DraftTrees, Verified
from headrace.kernels.ops import SamplingBatch
from headrace.kernels.reference.rejection import MOST, check, check_probabilities
from headrace.kernels.reference.sampling import UNIT
from headrace.kernels.triton.drafts import DeviceTrees, ends_with
from headrace.kernels.triton.sampling import HEAD, ROWS, Draws, adjusted, order, prefix, random_numbers, weight_of

_BLOCK = 4096
_ALL = torch.iinfo(torch.int64).max
"""The limit of a row without filters."""
_UNIT, _MOST = tl.constexpr(UNIT), tl.constexpr(MOST)


@triton.jit
def target_of(logits, columns, inside, largest, temperature, limit):
    """The weights of tokens of a row, 0 of those that are filtered out."""
    value = tl.load(logits + columns, mask=inside, other=float("-inf"))
    bits = value.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits & 0x7FFFFFFF, -bits)
    key = (rank.to(tl.int64) << 32) + columns
    return tl.where(inside & (key <= limit), weight_of(value, largest, temperature), 0)


@triton.jit
def drafted_of(probabilities, columns, inside):
    return (tl.load(probabilities + columns, mask=inside, other=0.0) * _UNIT).to(tl.int64)


@triton.jit
def rest_of(target, drafted, slope):
    return tl.maximum(target - tl.minimum(drafted.to(tl.float64) * slope, _MOST).to(tl.int64), 0)


@triton.jit
def share_of(number, mass):
    """number * mass >> 53, as `kernels.triton.sampling` has it."""
    high, low = number >> 27, number & (1 << 27) - 1
    above, below = mass >> 32, mass & 0xFFFFFFFF
    middle = (low * above) + ((high * below) >> 5) + (((high * below & 31) + (low * below >> 27)) >> 5)
    return high * above * 64 + (middle >> 21)


@triton.jit
def rejection_kernel(
    logits,
    largest,
    temperature,
    limits,
    masses,
    probabilities,
    drafted_masses,
    draw_numbers,
    accept_numbers,
    starts,
    parents,
    drafts,
    end_starts,
    end_tokens,
    path,
    emitted,
    counts,
    V,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`accept_numbers` decide on the draft of a row, `draw_numbers` draw what follows a row: int64 [N] of 53 bits. The rest is [N] too, and
    results are as those of `verify_kernel`."""
    request = tl.program_id(0)
    begin, end = tl.load(starts + request), tl.load(starts + request + 1)
    first_end, last_end = tl.load(end_starts + request), tl.load(end_starts + request + 1)
    at = tl.arange(0, ROWS)
    parent = tl.load(parents + begin + at, mask=at < end - begin, other=-2)
    row, count = tl.where(begin < end, 0, ROWS), 0
    while row < ROWS:
        here = begin + row
        whole = tl.load(masses + here)
        if whole == 0:
            row = ROWS
        else:
            top, divisor, limit = tl.load(largest + here), tl.load(temperature + here), tl.load(limits + here)
            target, drafted = logits + here * V, probabilities + here * V
            mass, left = whole, tl.load(drafted_masses + here)
            slope = (whole * 0).to(tl.float64)
            following, token = row * 0 + ROWS, whole * 0
            child = tl.min(tl.where(parent == row, at, ROWS), 0)
            while child < ROWS:
                next_child = tl.min(tl.where((parent == row) & (at > child), at, ROWS), 0)
                draft = tl.load(drafts + begin + child)
                share = drafted_of(drafted, draft, True)
                if share > 0:
                    rest = rest_of(target_of(target, draft, True, top, divisor, limit), share, slope)
                    ratio = rest.to(tl.float64) / mass.to(tl.float64) * (left.to(tl.float64) / share.to(tl.float64))
                    number = tl.load(accept_numbers + begin + child).to(tl.float64) * (1.0 / (1 << 53))
                    if number < ratio:
                        following, token, next_child = child, draft, ROWS
                    else:
                        slope += mass.to(tl.float64) / left.to(tl.float64)
                        left -= share
                        mass = whole * 0
                        for first in range(0, V, BLOCK):
                            columns = first + tl.arange(0, BLOCK)
                            inside = columns < V
                            weights = target_of(target, columns, inside, top, divisor, limit)
                            mass += tl.sum(rest_of(weights, drafted_of(drafted, columns, inside), slope), 0)
                        if mass == 0:
                            slope, mass, next_child = slope * 0.0, whole, ROWS
                child = next_child
            if following == ROWS:
                chosen = share_of(tl.load(draw_numbers + here), mass)
                # The block that it falls into, and what lies before that.
                below, before, within = whole * 0, whole * 0, 0
                for first in range(0, V, BLOCK):
                    columns = first + tl.arange(0, BLOCK)
                    inside = columns < V
                    weights = target_of(target, columns, inside, top, divisor, limit)
                    behind = below + tl.sum(rest_of(weights, drafted_of(drafted, columns, inside), slope), 0)
                    hit = (below <= chosen) & (chosen < behind)
                    before, within = tl.where(hit, below, before), tl.where(hit, first, within)
                    below = behind
                columns = within + tl.arange(0, BLOCK)
                inside = columns < V
                weights = target_of(target, columns, inside, top, divisor, limit)
                sums = before + tl.cumsum(rest_of(weights, drafted_of(drafted, columns, inside), slope), 0)
                token = (within + tl.sum((sums <= chosen).to(tl.int32), 0)).to(tl.int64)
            tl.store(path + begin + count, row)
            tl.store(emitted + begin + count, token)
            count += 1
            row = tl.where(ends_with(token, end_tokens, first_end, last_end), ROWS, following)
    tl.store(counts + request, count)


@dataclass(frozen=True, slots=True)
class Ready:
    """The rows of all trees, as the walk reads them. [N] each unless said otherwise."""

    logits: torch.Tensor
    """float32 [N, V]: adjusted."""
    largest: torch.Tensor
    temperature: torch.Tensor
    limits: torch.Tensor
    """int64: the key of the last token that filters leave."""
    masses: torch.Tensor
    """int64: of the tokens that they leave, 0 where the logits are invalid."""
    probabilities: torch.Tensor
    """float32 [N, V]."""
    drafted_masses: torch.Tensor
    """int64: of the probabilities, of rows that have children."""
    draw_numbers: torch.Tensor
    accept_numbers: torch.Tensor


def rejection_sample(logits: torch.Tensor, batch: SamplingBatch, trees: DraftTrees, probabilities: torch.Tensor) -> Verified:
    """See `Backend.rejection_sample`: logits and probabilities float32 [N, V] on any device."""
    following = check(trees, logits.shape, probabilities.shape)
    if not len(logits):
        return Verified([[] for _ in trees.end_tokens], [[] for _ in trees.end_tokens])
    on_device = DeviceTrees.of(trees, logits.device)
    launch(_ready(logits.contiguous(), batch, following, probabilities.contiguous()), on_device)
    return on_device.verified(trees)


def launch(ready: Ready, trees: DeviceTrees) -> None:
    rejection_kernel[(trees.requests,)](
        *(getattr(ready, name) for name in ready.__slots__),
        trees.starts,
        trees.parents,
        trees.drafts,
        trees.end_starts,
        trees.end_tokens,
        *trees.results(),
        ready.logits.shape[1],
        ROWS=trees.rows,
        BLOCK=_BLOCK,
        num_warps=16,
        enable_fp_fusion=False,
    )


def _ready(logits: torch.Tensor, batch: SamplingBatch, following: list[list[int]], probabilities: torch.Tensor) -> Ready:
    count, vocabulary = logits.shape
    values, device = adjusted(logits, batch), logits.device
    largest, every = values.amax(1), Draws.of(batch, range(count), vocabulary, device)
    limits, masses, drafted = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(3))
    valid = torch.ones(count, dtype=torch.bool, device=device)
    for begin in range(0, count, ROWS):
        rows = torch.arange(begin, min(begin + ROWS, count), device=device)
        limits[rows], masses[rows] = _limits(values[rows], largest[rows], every.take(rows))
    raw = logits.amax(1)
    masses[raw.isnan() | (raw == -torch.inf)] = 0
    parents = [row for row, children in enumerate(following) if children]
    for begin in range(0, len(parents), ROWS):
        rows = torch.tensor(parents[begin : begin + ROWS], device=device)
        part = probabilities[rows]
        valid[rows] = ((part >= 0) & (part <= 1)).all(1)
        drafted[rows] = (part * UNIT).long().sum(1)
    for row, is_valid in enumerate(valid.tolist()):
        check_probabilities(is_valid, row)
    return Ready(
        values, largest, every.temperature, limits, masses, probabilities, drafted, every.numbers, _numbers(batch, following, device)
    )


def _numbers(batch: SamplingBatch, following: list[list[int]], device: torch.device) -> torch.Tensor:
    """What decides on each row's draft: the number of its place among its parent's children, from 1, at the parent's position."""
    seeds, positions, draws = (np.zeros(len(following), np.uint64) for _ in range(3))
    for row, children in enumerate(following):
        for turn, child in enumerate(children):
            seeds[child], positions[child], draws[child] = batch.seed[row] & (1 << 64) - 1, batch.position[row], turn + 1
    return random_numbers(*(torch.from_numpy(x.view(np.int64)).to(device) for x in (seeds, positions, draws)))


def _limits(values: torch.Tensor, largest: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """`Ready.limits` and `Ready.masses` of some rows."""
    vocabulary = values.shape[1]
    keys, mass = order(values, largest, draws.temperature, True)
    assert keys is not None
    count = min(HEAD, vocabulary)
    head = torch.topk(keys, count, 1, largest=False, sorted=True).values
    limits, masses, told = _limits_in(values, largest, draws, head, mass)
    if count < vocabulary and not bool(told.all()):
        rows = (~told).nonzero()[:, 0]
        limits[rows], masses[rows], _ = _limits_in(values[rows], largest[rows], draws.take(rows), keys[rows].sort(1).values, mass[rows])
    return limits, masses


def _limits_in(
    values: torch.Tensor, largest: torch.Tensor, draws: Draws, head: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As far as the keys that are in order tell, and whether they do."""
    vocabulary = values.shape[1]
    _, kept, masses, within = prefix(values, largest, draws, head & 0xFFFFFFFF, mass)
    open_ = ~draws.filtered & (draws.top_k == vocabulary)
    limits = torch.where(open_, _ALL, head.gather(1, (kept - 1).clamp(min=0))[:, 0])
    return limits, masses[:, 0], open_ | (within[:, 0] & ((draws.top_k <= head.shape[1]) | (draws.top_k == vocabulary)))
