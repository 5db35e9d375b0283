"""Sampling on the device: the tokens that `kernels.reference.sampling` would choose from the same logits, without copying them to the host.

    logits [B, V] ─▶ adjusted ─▶ argmax ─────────────────────────────────────────────────────────────▶ token, where greedy
                        └──────▶ order_kernel ─▶ keys ─▶ the HEAD least, in order ─▶ filters, draw ─▶ token, else
                                        └─▶ mass                                   └─▶ the whole row in order, where HEAD is not enough

Probabilities are whole numbers, so that their sums are exact in any order, and what they are made from is computed by the same single
operations as the reference's: the tokens are equal to the last one, not nearly so. A key is unique: the rank of a logit and then the token.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from headrace.kernels.ops import Sampled, SamplingBatch
from headrace.kernels.reference.exact import HIGHEST, LN2_HIGH, LN2_LOW, LOG2_E, LOWEST, POLYNOMIAL
from headrace.kernels.reference.sampling import UNIT, Scores, adjusts, check_largest, is_greedy, penalizes
from headrace.kernels.triton.rounding import nearest_whole

HEAD = 1024
"""How many tokens are put in order before it is all of them."""
ROWS = 32
"""Rows whose keys are in memory at once."""

_BLOCK = 4096
_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)
_LOG2_E, _LN2_HIGH, _LN2_LOW = tl.constexpr(LOG2_E), tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
_P0, _P1, _P2, _P3, _P4, _P5 = map(tl.constexpr, POLYNOMIAL)
_UNIT = tl.constexpr(UNIT)


@triton.jit
def exact_exp(x):
    """`kernels.reference.exact.exp`, without its NaN. No two operations may become one: kernels that call this forbid fusion."""
    clamped = tl.minimum(tl.maximum(x, _LOWEST), _HIGHEST)
    whole = nearest_whole(clamped * _LOG2_E)
    rest = clamped - whole * _LN2_HIGH
    rest = rest - whole * _LN2_LOW
    value = (rest * _P0 + _P1) * rest
    value = (value + _P2) * rest
    value = (value + _P3) * rest
    value = (value + _P4) * rest
    value = (value + _P5) * rest
    value = value * rest + rest + 1.0
    power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < _LOWEST, 0.0, value * power)


@triton.jit
def exponent_of(value, largest, temperature):
    """(value - largest) / temperature, each rounded once. Where the largest is infinite, all that are share the whole probability."""
    infinite = largest == float("inf")
    value = tl.where(infinite, tl.where(value == float("inf"), 0.0, float("-inf")), value)
    return tl.div_rn(value - tl.where(infinite, 0.0, largest), temperature)


@triton.jit
def weight_of(value, largest, temperature):
    """A probability before it is normalized, in units of 1 / UNIT: int64."""
    return (exact_exp(exponent_of(value, largest, temperature)) * _UNIT).to(tl.int64)


@triton.jit
def order_kernel(logits, largest, temperature, keys, masses, V, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """keys [B, V] rise in the order of tokens; masses [B, blocks] are the sums of the weights of a block."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    value = tl.load(logits + row * V + columns, mask=inside, other=float("-inf"))
    weight = weight_of(value, tl.load(largest + row), tl.load(temperature + row))
    tl.store(masses + row * tl.num_programs(1) + block, tl.sum(tl.where(inside, weight, 0), 0))
    if KEYS:
        bits = value.to(tl.int32, bitcast=True)
        # The bits of floats rise as the floats do, save that negative ones fall.
        rank = tl.where(bits < 0, bits & 0x7FFFFFFF, -bits)
        tl.store(keys + row * V + columns, (rank.to(tl.int64) << 32) + columns, mask=inside)


@triton.jit
def head_kernel(logits, largest, temperature, tokens, weights, exponents, V, count, BLOCK: tl.constexpr):
    """Weights and exponents [B, count] of some tokens of each row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < count
    token = tl.load(tokens + row * count + columns, mask=inside, other=0)
    value = tl.load(logits + row * V + token, mask=inside, other=float("-inf"))
    top, divisor = tl.load(largest + row), tl.load(temperature + row)
    tl.store(exponents + row * count + columns, exponent_of(value, top, divisor), mask=inside)
    tl.store(weights + row * count + columns, weight_of(value, top, divisor), mask=inside)


@triton.jit
def philox_kernel(seeds, positions, draws, numbers, B, BLOCK: tl.constexpr):
    """`kernels.philox.uniform` as whole numbers of 53 bits: int64 [B]. Without `draws`, those of draw 0."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + row, mask=row < B, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions + row, mask=row < B, other=0).to(tl.uint64, bitcast=True)
    word: tl.constexpr = 0xFFFFFFFF
    a, b = position & word, position >> 32
    c, d = a * 0, a * 0
    if draws is not None:
        c = tl.load(draws + row, mask=row < B, other=0).to(tl.uint64, bitcast=True)
    left, right = seed & word, seed >> 32
    for _ in tl.static_range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ left, second & word, (first >> 32) ^ d ^ right, first & word
        left, right = (left + 0x9E3779B9) & word, (right + 0xBB67AE85) & word
    number = ((a >> 5) << 26) + (b >> 6)
    tl.store(numbers + row, number.to(tl.int64, bitcast=True), mask=row < B)


@dataclass(frozen=True, slots=True)
class Draws:
    """The parameters of rows that are drawn, on their device."""

    temperature: torch.Tensor
    """float32 [B]."""
    top_k: torch.Tensor
    """int64 [B], V where it is off."""
    top_p: torch.Tensor
    """float64 [B]."""
    least: torch.Tensor
    """float32 [B]: the lowest exponent that min_p leaves; minus infinity where it is off."""
    numbers: torch.Tensor
    """int64 [B], below 2^53."""

    @classmethod
    def of(cls, batch: SamplingBatch, rows: Sequence[int], vocabulary: int, device: torch.device) -> "Draws":
        """A row that is greedy draws from the one token that a temperature of 1 makes the first."""
        greedy = [is_greedy(batch, row) for row in rows]
        top_ks = [1 if is_first else batch.top_k[row] for row, is_first in zip(rows, greedy, strict=True)]
        temperature = np.array([1 if is_first else batch.temperature[row] for row, is_first in zip(rows, greedy, strict=True)], np.float32)
        top_k = np.array([top_k if 0 < top_k < vocabulary else vocabulary for top_k in top_ks])
        top_p = np.array([batch.top_p[row] for row in rows], np.float64)
        least = np.array([math.log(batch.min_p[row]) if batch.min_p[row] > 0 else -math.inf for row in rows], np.float32)
        seeds = np.array([batch.seed[row] & (1 << 64) - 1 for row in rows], np.uint64).view(np.int64)
        positions = np.array([batch.position[row] for row in rows])
        on = [torch.from_numpy(x).to(device) for x in (temperature, top_k, top_p, least, seeds, positions)]
        return cls(*on[:4], random_numbers(on[4], on[5]))

    @property
    def filtered(self) -> torch.Tensor:
        """Whether top p or min p leaves anything out: bool [B]."""
        return (self.top_p < 1) | (self.least > -math.inf)

    def take(self, rows: torch.Tensor) -> "Draws":
        return Draws(*(getattr(self, name)[rows] for name in self.__slots__))


def random_numbers(seeds: torch.Tensor, positions: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
    """Of 53 bits, for seeds, positions and draws int64 [B]."""
    numbers = torch.empty_like(seeds)
    philox_kernel[(triton.cdiv(len(seeds), 128),)](seeds, positions, draws, numbers, len(seeds), BLOCK=128, num_warps=4)
    return numbers


def sample(logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
    """See `Backend.sample`: logits float32 [B, V] on any device."""
    values = adjusted(logits, batch)
    tokens = _best(logits)
    if values is not logits:
        tokens = _best(values)
    drawn = [row for row in range(len(logits)) if not is_greedy(batch, row)]
    for begin in range(0, len(drawn), ROWS):
        rows = drawn[begin : begin + ROWS]
        at = torch.tensor(rows, device=logits.device)
        part = values if len(rows) == len(values) else values.index_select(0, at)
        tokens[at] = _draw(part, Draws.of(batch, rows, values.shape[1], logits.device))
    found = tokens.tolist()
    scores: list[Scores | None] = [None] * len(found)
    asked = [row for row, top in enumerate(batch.logprobs) if top is not None]
    for begin in range(0, len(asked), ROWS):
        rows = asked[begin : begin + ROWS]
        part = logits if len(rows) == len(logits) else logits.index_select(0, torch.tensor(rows, device=logits.device))
        tops = [batch.logprobs[row] or 0 for row in rows]
        for row, score in zip(rows, _scores(part, [found[row] for row in rows], tops), strict=True):
            scores[row] = score
    return Sampled(found, scores)


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scores]:
    """See `Backend.score`."""
    _best(logits)
    parts = [slice(begin, begin + ROWS) for begin in range(0, len(logits), ROWS)]
    return [one for part in parts for one in _scores(logits[part], tokens[part], [top] * len(tokens[part]))]


def _best(logits: torch.Tensor) -> torch.Tensor:
    """The lowest id among the largest logits of each row: int64 [B]. FloatingPointError for a row that is invalid."""
    best = logits.argmax(1)
    for row, value in enumerate(logits.gather(1, best[:, None])[:, 0].tolist()):
        check_largest(value, row)
    return best


def adjusted(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The logits with penalties, bias and bans; themselves where there are none."""
    rows = [row for row in range(len(logits)) if adjusts(batch, row)]
    if not rows:
        return logits
    values = logits.clone()
    repeated = [(row, token, batch.repetition_penalty[row]) for row in rows if batch.repetition_penalty[row] != 1
                for token in {*batch.prompt[row], *batch.output[row]}]  # fmt: skip
    if repeated:
        at, penalty = _places(repeated, torch.float64, logits.device)
        logit = values[at].double()
        values[at] = torch.where(logit > 0, logit / penalty, logit * penalty).float()
    less = [(row, token, batch.presence_penalty[row] + batch.frequency_penalty[row] * count)
            for row in rows if penalizes(batch, row) for token, count in Counter(batch.output[row]).items()]  # fmt: skip
    if less:
        at, penalty = _places(less, torch.float32, logits.device)
        values[at] -= penalty
    # A token that is named twice is given both, in their order.
    turns: list[list[tuple[int, int, float]]] = []
    named: Counter[tuple[int, int]] = Counter()
    for row in rows:
        for token, bias in batch.logit_bias[row]:
            if (turn := named[row, token]) == len(turns):
                turns.append([])
            turns[turn].append((row, token, bias))
            named[row, token] += 1
    for turn in turns:
        at, bias = _places(turn, torch.float32, logits.device)
        values[at] += bias
    banned = [(row, token, 0.0) for row in rows for token in batch.banned[row]]
    if banned:
        values[_places(banned, torch.float32, logits.device)[0]] = -math.inf
    return values


def _places(
    changes: list[tuple[int, int, float]], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Rows and tokens as an index, and the values beside them."""
    rows, tokens, values = zip(*changes, strict=True)
    at = torch.tensor((rows, tokens), device=device)
    return (at[0], at[1]), torch.tensor(values, dtype=torch.float64).to(dtype).to(device)


def order(logits: torch.Tensor, largest: torch.Tensor, temperature: torch.Tensor, keys: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Keys [B, V], if they are wanted, and the sum of all weights [B]."""
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, _BLOCK)
    made = torch.empty(rows, vocabulary, dtype=torch.int64, device=logits.device) if keys else None
    masses = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    options = {"KEYS": keys, "BLOCK": _BLOCK, "num_warps": 8, "enable_fp_fusion": False}
    order_kernel[(rows, blocks)](logits, largest, temperature, made, masses, vocabulary, **options)
    return made, masses.sum(1)


def _draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A token for each row of logits: int64 [B]."""
    vocabulary, largest = logits.shape[1], logits.amax(1)
    keys, mass = order(logits, largest, draws.temperature, True)
    assert keys is not None
    count = min(HEAD, vocabulary)
    head = torch.topk(keys, count, 1, largest=False, sorted=True).values & 0xFFFFFFFF
    tokens, complete = _walk(logits, largest, draws, head, mass)
    if count < vocabulary and not bool(complete.all()):
        rows = (~complete).nonzero()[:, 0]
        head = keys[rows].sort(1).values & 0xFFFFFFFF
        tokens[rows], _ = _walk(logits[rows], largest[rows], draws.take(rows), head, mass[rows])
    return tokens


def weigh(logits: torch.Tensor, largest: torch.Tensor, draws: Draws, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and exponents of the tokens `head` [B, count]."""
    weights, exponents = torch.empty_like(head), torch.empty(head.shape, dtype=torch.float32, device=head.device)
    (rows, count), vocabulary = head.shape, logits.shape[1]
    head_kernel[(rows, triton.cdiv(count, HEAD))](
        logits, largest, draws.temperature, head, weights, exponents, vocabulary, count, BLOCK=HEAD, num_warps=4, enable_fp_fusion=False
    )
    return weights, exponents


def _walk(
    logits: torch.Tensor, largest: torch.Tensor, draws: Draws, head: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token that each row's number falls on, if the tokens that are in order (`head` [B, count]) are enough to tell, and whether."""
    count, vocabulary = head.shape[1], logits.shape[1]
    sums, kept, mass, within = prefix(logits, largest, draws, head, mass)
    found = torch.searchsorted(sums, _share(draws.numbers[:, None], mass), right=True)
    told = (within | ~draws.filtered[:, None]) & (found < kept) & ((draws.top_k[:, None] <= count) | (draws.top_k[:, None] == vocabulary))
    return head.gather(1, found.clamp(max=count - 1))[:, 0], told[:, 0]


def prefix(
    logits: torch.Tensor, largest: torch.Tensor, draws: Draws, head: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the tokens `head` [B, count], which are the first in order: sums of weights up to each [B, count], how many of them the filters
    leave, the mass of all that they leave, and whether those are all among these, [B, 1] each. `mass` [B] is that of all tokens."""
    count, vocabulary = head.shape[1], logits.shape[1]
    weights, exponents = weigh(logits, largest, draws, head)
    place = torch.arange(count, device=head.device)[None, :]
    known = draws.top_k.clamp(max=count)[:, None]
    weights *= place < known
    sums = weights.cumsum(1)
    last = sums.gather(1, known - 1)
    # Where top k ends within the head, it is all there is.
    mass = torch.where(draws.top_k < vocabulary, last[:, 0], mass)[:, None]
    complete = draws.top_k[:, None] <= count
    reach = torch.minimum((draws.top_p[:, None] * mass.double()).ceil().long(), mass)
    reached = (draws.top_p[:, None] < 1) & (last >= reach)
    kept = torch.where(reached, torch.searchsorted(sums, reach) + 1, known)
    likely = ((exponents >= draws.least[:, None]) & (place < known)).sum(1, keepdim=True)
    cut = (draws.least[:, None] > -math.inf) & (likely < known)
    kept = torch.where(cut, torch.minimum(kept, likely), kept)
    within = complete | reached | cut
    return sums, kept, torch.where(within, sums.gather(1, (kept - 1).clamp(min=0)), mass), within


def _share(number: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """number * mass >> 53, for numbers below 2^53 and masses below 2^63, in limbs that fit int64."""
    high, low = number >> 27, number & (1 << 27) - 1
    above, below = mass >> 32, mass & (1 << 32) - 1
    # (2^27 high + low)(2^32 above + below): what lies below 2^53 is carried along as far as it matters.
    middle = (low * above) + ((high * below) >> 5) + (((high * below & 31) + (low * below >> 27)) >> 5)
    return high * above * 64 + (middle >> 21)


def _scores(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Scores]:
    """Log-probabilities of `tokens`, and the most likely ones of each row, so many as `tops` says."""
    largest = logits.amax(1)
    count = min(max(tops), logits.shape[1])
    keys, mass = order(logits, largest, torch.ones_like(largest), count > 0)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    wanted = chosen if keys is None else torch.cat([chosen, torch.topk(keys, count, 1, largest=False, sorted=True).values & 0xFFFFFFFF], 1)
    values = logits.gather(1, wanted)
    rows = zip(tops, largest.tolist(), mass.tolist(), wanted.tolist(), values.tolist(), strict=True)
    return [_score(top, *row) for top, *row in rows]


def _score(top: int, largest: float, mass: int, tokens: list[int], values: list[float]) -> Scores:
    total = math.log(mass / UNIT)
    if largest == math.inf:
        largest, values = 0.0, [0.0 if value == math.inf else -math.inf for value in values]
    logprobs = [value - largest - total for value in values]
    return logprobs[0], tokens[1 : top + 1], logprobs[1 : top + 1]
