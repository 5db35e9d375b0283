"""From logits to tokens: penalties, filters, one random number a row, and the log-probabilities that were asked for.

    logits ─▶ repetition ─▶ presence, frequency ─▶ bias ─▶ bans ─▶ temperature ─▶ top k ─▶ top p ─▶ min p ─▶ draw
      └─────▶ log-softmax ─▶ logprobs of the chosen token and of the most likely ones

Tokens stand in one fixed order: by falling logit, equal ones by id. Each filter keeps a prefix of it, and reads the probabilities
that the filter before it left (renormalized). top k keeps exactly k tokens. The draw walks the prefix until the running sum of the
probabilities exceeds the random number. Temperature 0 takes the first token and looks at no filter.

Rows are worked on one at a time and probabilities are added as integers, so a row's result never depends on the others, on threads
or on the order of a sum, to the last bit. The head of the order is usually enough; when it is not, the whole row is sorted and the
result is the same. numpy does what is not a kernel's work: it needs no threads, and finds, parts and sorts much faster than torch.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.kernels.ops import Sampled, SamplingBatch
from headrace.kernels.philox import uniform
from headrace.kernels.reference import exact

HEADS = (1024, 8192)
"""How many tokens are put in order first, and next, before it is all of them."""

CHUNK = 32768
"""Most elements worked on at once: torch wakes no threads for so few, whose stalls cost more than they gain."""

UNIT = float(1 << 44)
"""What a probability of 1, before it is normalized, is as an integer: the sum over 2^19 tokens still fits."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

Scores = tuple[float, list[int], list[float]]
"""A token's logprob, then ids and logprobs of the most likely tokens."""


def sample(logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
    """See `Ops.sample`. Raises FloatingPointError, which names the row, for logits that contain NaN or are all minus infinity."""
    tokens: list[int] = []
    scores: list[Scores | None] = []
    for row, values in enumerate(logits.cpu().numpy()):
        tokens.append(_choose(values, batch, row))
        top = batch.logprobs[row]
        scores.append(None if top is None else _scores(values, tokens[row], top, row))
    return Sampled(tokens, scores)


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scores]:
    """See `Ops.score`. Raises FloatingPointError as `sample` does."""
    return [_scores(values, token, top, row) for row, (values, token) in enumerate(zip(logits.cpu().numpy(), tokens, strict=True))]


def is_greedy(batch: SamplingBatch, row: int) -> bool:
    """A temperature may be so small that float32 has no other name for it than 0."""
    return np.float32(batch.temperature[row]) == 0


def _choose(values: Floats, batch: SamplingBatch, row: int) -> int:
    """One row's token."""
    best = int(values.argmax())
    check_largest(values[best], row)
    if adjusts(batch, row):
        values = _adjusted(values, batch, row)
        best = int(values.argmax())
        check_largest(values[best], row)
    if is_greedy(batch, row):
        return best
    number = uniform(batch.seed[row], batch.position[row])
    return _draw(values, number, batch.temperature[row], batch.top_k[row], batch.top_p[row], batch.min_p[row])


def check_largest(largest: float, row: int) -> None:
    """The largest logit of a row is NaN when any of them is."""
    if math.isnan(largest):
        raise FloatingPointError(f"row {row} of the logits contains NaN")
    if largest == -math.inf:
        raise FloatingPointError(f"row {row} of the logits leaves no token to choose: all are minus infinity")


def penalizes(batch: SamplingBatch, row: int) -> bool:
    return batch.presence_penalty[row] != 0 or batch.frequency_penalty[row] != 0


def adjusts(batch: SamplingBatch, row: int) -> bool:
    """Does anything change the logits themselves?"""
    return batch.repetition_penalty[row] != 1 or penalizes(batch, row) or bool(batch.logit_bias[row]) or bool(batch.banned[row])


@np.errstate(over="ignore")
def _adjusted(values: Floats, batch: SamplingBatch, row: int) -> Floats:
    """A copy of the logits [V] with penalties, bias and bans."""
    values = values.copy()
    if (penalty := batch.repetition_penalty[row]) != 1 and (seen := {*batch.prompt[row], *batch.output[row]}):
        ids = np.fromiter(seen, np.int64)
        found = values[ids].astype(np.float64)
        values[ids] = np.where(found > 0, found / penalty, found * penalty)
    if penalizes(batch, row) and (counts := Counter(batch.output[row])):
        presence, frequency = batch.presence_penalty[row], batch.frequency_penalty[row]
        less = np.array([presence + frequency * count for count in counts.values()], np.float32)
        values[np.fromiter(counts, np.int64)] -= less
    for token, bias in batch.logit_bias[row]:
        values[token] += np.float32(bias)
    if batch.banned[row]:
        values[np.array(batch.banned[row], np.int64)] = -math.inf
    return values


def distribution(values: Floats, batch: SamplingBatch, row: int) -> Integers:
    """What a row's token is drawn from: the weights [V] of the tokens that the filters leave, 0 of all others. One that is greedy leaves
    one. FloatingPointError as `sample`."""
    check_largest(values.max(), row)
    if adjusts(batch, row):
        values = _adjusted(values, batch, row)
        check_largest(values.max(), row)
    if is_greedy(batch, row):
        return _filtered(values, 1.0, 1, 1.0, 0.0)
    return _filtered(values, batch.temperature[row], batch.top_k[row], batch.top_p[row], batch.min_p[row])


def _filtered(values: Floats, temperature: float, top_k: int, top_p: float, min_p: float) -> Integers:
    values, largest = _bounded(values)
    if not 0 < top_k < len(values) and top_p >= 1 and min_p <= 0:
        return _weights(values, largest, temperature)
    for prefix in _prefixes(values, largest, temperature, top_k, top_p, min_p):
        if prefix.complete:
            weights = np.zeros(len(values), np.int64)
            weights[prefix.ids[: prefix.kept]] = np.diff(prefix.sums[: prefix.kept], prepend=0)
            return weights
    raise AssertionError("the last attempt holds every token")


def _draw(values: Floats, number: float, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """The token that the random number in [0, 1) falls on."""
    values, largest = _bounded(values)
    for prefix in _prefixes(values, largest, temperature, top_k, top_p, min_p):
        # The product of integers is exact, so that it stays below the mass.
        target = int(number * (1 << 53)) * prefix.mass >> 53
        if (place := int(prefix.sums.searchsorted(target, side="right"))) < prefix.kept:
            return int(prefix.ids[place])
    raise AssertionError("the last attempt holds every token")


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The first tokens in order."""

    ids: Integers
    sums: Integers
    """Of their weights, up to each and with it."""
    kept: int
    """How many of them the filters leave."""
    mass: int
    """Of all that the filters leave."""
    complete: bool
    """Whether those are all among these."""


def _prefixes(values: Floats, largest: float, temperature: float, top_k: int, top_p: float, min_p: float) -> Iterator[_Prefix]:
    """Longer and longer ones, from the first on that tells where the filters end."""
    size, weights, mass = len(values), None, 0
    if 0 < top_k < size:
        limit, attempts = top_k, [top_k]
    else:
        limit, attempts = size, [*(head for head in HEADS if head < size), size]
        weights = _weights(values, largest, temperature)
        mass = int(weights.sum())
    for count in attempts:
        ids = _ordered(values, count)
        if weights is None:
            sums = _weights(values[ids], largest, temperature).cumsum()
            mass = int(sums[-1])
        else:
            sums = weights[ids].cumsum()
        # Do the filters keep a prefix that ends within what was put in order?
        kept, complete = count, count == limit
        if top_p < 1 and sums[-1] >= (reach := min(math.ceil(top_p * mass), mass)):
            kept, complete = int(sums.searchsorted(reach)) + 1, True
        if min_p > 0 and (likely := int((_exponents(values[ids], largest, temperature) >= math.log(min_p)).sum())) < count:
            kept, complete = min(kept, likely), True
        if complete or (top_p >= 1 and min_p <= 0):
            yield _Prefix(ids, sums, kept, int(sums[kept - 1]) if complete else mass, complete)


def _scores(values: Floats, token: int, top: int, row: int) -> Scores:
    check_largest(values.max(), row)
    raw, (values, largest) = values, _bounded(values)
    total = math.log(int(_weights(values, largest, 1.0).sum()) / UNIT)
    ids = _ordered(raw, min(top, len(values)))
    return float(values[token]) - largest - total, ids.tolist(), [value - largest - total for value in values[ids].tolist()]


def _bounded(values: Floats) -> tuple[Floats, float]:
    """Logits whose largest is finite, and that largest one. Infinite logits share the whole probability between them."""
    largest = float(values.max())
    if largest == math.inf:
        return np.where(values == math.inf, np.float32(0), np.float32(-math.inf)), 0.0
    return values, largest


def _exponents(values: Floats, largest: float, temperature: float) -> Floats:
    with np.errstate(over="ignore"):
        return (values - np.float32(largest)) / np.float32(temperature)


def _weights(values: Floats, largest: float, temperature: float) -> Integers:
    """e^((value - largest) / temperature) as integers, in units of 1 / UNIT: their sums are exact in any order."""
    weights = np.empty(len(values), np.int64)
    for start in range(0, len(values), CHUNK):
        part = torch.from_numpy(_exponents(values[start : start + CHUNK], largest, temperature))
        weights[start : start + CHUNK] = exact.exp(part).mul_(UNIT).numpy()
    return weights


def _ordered(values: Floats, count: int) -> Integers:
    """The first `count` ids of the order of tokens."""
    size = len(values)
    if count == 0:
        return np.empty(0, np.int64)
    if count > size // 2:
        ids = np.arange(size)
    else:
        ids = np.flatnonzero(values >= np.partition(values, size - count)[size - count])
    # Logit and id in one integer, which sorts faster: the bits of floats rise as the floats do, save that negative ones fall.
    bits = values[ids].view(np.int32).astype(np.int64)
    rank = np.where(bits < 0, bits & 0x7FFFFFFF, -bits)
    return np.sort((rank << 32) + ids)[:count] & 0xFFFFFFFF
