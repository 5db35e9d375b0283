"""From logits to tokens: penalties, filters, one random number a row, and the log-probabilities that were asked for.

    logits ─▶ repetition ─▶ presence, frequency ─▶ bias ─▶ bans ─▶ temperature ─▶ top k ─▶ top p ─▶ min p ─▶ draw
      └─────▶ log-softmax ─▶ logprobs of the chosen token and of the most likely ones

Tokens stand in one fixed order: by falling logit, equal ones by id. Each filter keeps a prefix of it, and reads the probabilities
that the filter before it left (renormalized). top k keeps exactly k tokens. The draw walks the prefix until the running sum of the
probabilities exceeds the random number. Temperature 0 takes the first token and looks at no filter.

Rows are worked on one at a time, with steps that `exact.py` calls safe, so a row's result never depends on the others to the
last bit. The head of the order is usually enough; when it is not, the whole row is sorted and the result is the same.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from headrace.kernels.ops import Sampled, SamplingBatch
from headrace.kernels.philox import uniform
from headrace.kernels.reference import exact

HEAD = 1024
"""Tokens that are put in order before anybody asks for more."""

CHUNK = 16384
"""Elements worked on at once: they stay in the cache, and torch wakes no threads for so few."""

Scores = tuple[float, list[int], list[float]]
"""A token's logprob, then ids and logprobs of the most likely tokens."""


def sample(logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
    """See `Ops.sample`. Raises FloatingPointError, which names the row, for logits that contain NaN or are all minus infinity."""
    rows = logits.shape[0]
    tokens = [0] * rows
    plain = [row for row in range(rows) if batch.temperature[row] == 0 and not _adjusts(batch, row)]
    if plain:
        values = logits if len(plain) == rows else logits[plain]
        chosen = values.argmax(-1)
        for row, token, value in zip(plain, chosen.tolist(), values.gather(1, chosen[:, None])[:, 0].tolist(), strict=True):
            _check(value, row)
            tokens[row] = token
    for row in sorted(set(range(rows)).difference(plain)):
        values = logits[row].cpu()
        _check(values.amax().item(), row)
        if _adjusts(batch, row):
            values = _adjusted(values, batch, row)
        if batch.temperature[row] == 0:
            tokens[row] = int(values.argmax().item())
        else:
            number = uniform(batch.seed[row], batch.position[row])
            tokens[row] = _draw(values, number, batch.temperature[row], batch.top_k[row], batch.top_p[row], batch.min_p[row], row)
    scores = [None if top is None else _scores(logits[row].cpu(), tokens[row], top, row) for row, top in enumerate(batch.logprobs)]
    return Sampled(tokens, scores)


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scores]:
    """See `Ops.score`. Raises FloatingPointError as `sample` does."""
    return [_scores(logits[row].cpu(), token, top, row) for row, token in enumerate(tokens)]


def _check(largest: float, row: int) -> None:
    """The largest logit of a row is NaN when any of them is."""
    if math.isnan(largest):
        raise FloatingPointError(f"row {row} of the logits contains NaN")
    if largest == -math.inf:
        raise FloatingPointError(f"row {row} of the logits leaves no token to choose: all are minus infinity")


def _penalizes(batch: SamplingBatch, row: int) -> bool:
    return batch.presence_penalty[row] != 0 or batch.frequency_penalty[row] != 0


def _adjusts(batch: SamplingBatch, row: int) -> bool:
    """Does anything change the logits themselves?"""
    return batch.repetition_penalty[row] != 1 or _penalizes(batch, row) or bool(batch.logit_bias[row]) or bool(batch.banned[row])


def _adjusted(values: torch.Tensor, batch: SamplingBatch, row: int) -> torch.Tensor:
    """A copy of the logits [V] with penalties, bias and bans."""
    values = values.clone()
    if (penalty := batch.repetition_penalty[row]) != 1:
        seen = torch.tensor(list({*batch.prompt[row], *batch.output[row]}), dtype=torch.int64)
        found = values[seen]
        values[seen] = torch.where(found > 0, found / penalty, found * penalty)
    if _penalizes(batch, row) and (counts := Counter(batch.output[row])):
        presence, frequency = batch.presence_penalty[row], batch.frequency_penalty[row]
        less = torch.tensor([presence + frequency * count for count in counts.values()], dtype=torch.float32)
        values[torch.tensor(list(counts), dtype=torch.int64)] -= less
    for token, bias in batch.logit_bias[row]:
        values[token] += bias
    if batch.banned[row]:
        values[torch.tensor(list(batch.banned[row]), dtype=torch.int64)] = -math.inf
    return values


def _draw(values: torch.Tensor, number: float, temperature: float, top_k: int, top_p: float, min_p: float, row: int) -> int:
    """The token that the random number in [0, 1) falls on."""
    values, largest = _bounded(values, row)
    size = values.shape[0]
    if 0 < top_k < size:
        limit, attempts, mass = top_k, [top_k], None
    else:
        limit, attempts, mass = size, sorted({min(HEAD, size), size}), _weight_sum(values, largest, temperature)
    for count in attempts:
        ids, ordered = _ordered(values, count)
        exponents = (ordered - largest) / temperature
        sums = exact.exp(exponents).double().cumsum(0)
        everything = sums[-1].item() if mass is None else mass
        kept, ends_here = count, count == limit
        if top_p < 1 and (ends_here or sums[-1].item() >= top_p * everything):
            kept, ends_here = min(int(torch.searchsorted(sums, top_p * everything).item()) + 1, count), True
        if min_p > 0:
            likely = int((exponents >= math.log(min_p)).sum().item())
            kept, ends_here = min(kept, likely), ends_here or likely < count
        filtered = top_p < 1 or min_p > 0
        if filtered and not ends_here:
            continue
        place = int(torch.searchsorted(sums[:kept], number * (sums[kept - 1].item() if filtered else everything), right=True).item())
        if place < kept:
            return int(ids[place].item())
        if ends_here:
            # Two orders of one sum may differ in the last bit: the draw fell behind the last token that has any probability.
            return int(ids[torch.searchsorted(sums[:kept], sums[kept - 1])].item())
    raise AssertionError("the last attempt holds every token")


def _scores(values: torch.Tensor, token: int, top: int, row: int) -> Scores:
    values, largest = _bounded(values, row)
    total = math.log(_weight_sum(values, largest, 1.0))
    ids, ordered = _ordered(values, min(top, values.shape[0]))
    return values[token].item() - largest - total, ids.tolist(), [value - largest - total for value in ordered.tolist()]


def _bounded(values: torch.Tensor, row: int) -> tuple[torch.Tensor, float]:
    """Logits whose largest is finite, and that largest one. Infinite logits share the whole probability between them."""
    largest = values.amax().item()
    _check(largest, row)
    if largest == math.inf:
        return torch.where(values == math.inf, 0.0, -math.inf), 0.0
    return values, largest


def _weight_sum(values: torch.Tensor, largest: float, temperature: float) -> float:
    """Sum of exp((value - largest) / temperature), in an order that only the number of values decides."""
    return sum(exact.row_sum(exact.exp((part - largest) / temperature).double()).item() for part in values.split(CHUNK))


def _ordered(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` ids of the order of tokens, and their logits."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64), values[:0]
    if count > HEAD:
        ordered, ids = torch.sort(values, descending=True, stable=True)
        return ids[:count], ordered[:count]
    # `topk` breaks ties as it likes: it is only asked where the head ends.
    ids = (values >= values.topk(count, sorted=False).values.amin()).nonzero()[:, 0]
    ordered, places = torch.sort(values[ids], descending=True, stable=True)
    return ids[places[:count]], ordered[:count]
