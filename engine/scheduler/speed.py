"""How long steps take, to size the chunks of prompts that run beside decodes.

A request that decodes sees each step as the pause before its next token. A chunk beside it may stretch that pause, but only so far:

    pause = decodes(n, seen) + chunk(tokens, context)   ≤   max(target, STRETCH × decodes(n, seen))

    chunk(tokens, context) = token × tokens + place × (tokens + READ) × context
    decodes(n, seen)       = as measured with about as many,
                             + token × (n - how many these were) + place × (1 + READ) × (seen - what they saw then)

Every token of a chunk attends to all places before it, so deep in a long prompt a chunk of the same size takes many times as long; and
the keys and values of these places must be read once, however few the tokens are. A decode is a chunk of one token: `seen` are the places
before all of them together, which grow with every step. `token` and `place` are seconds, learnt from the steps that were measured, so they
follow the machine and the model. Where tenants share the engine, decodes are limited as well: whoever comes waits for the step under way,
however many others are decoding. Called by the scheduler after each step, and by `plan`.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

STRETCH = 1.8
"""How much longer than a step of decodes alone one with a chunk may be, where that is more than the target."""

LEAST = 4
"""Tokens of a chunk that are always allowed: with fewer, much of its time is the reading of what lies before it."""

READ = 3
"""Reading keys and values takes as long as attending to them does for so many tokens."""

_NEWEST = 0.2
"""Weight of the newest measurement."""

_COUNT_SEEN = 5
"""Steps of decodes alone, of which in one the places before them are counted."""

_FRESH = 500
"""Steps after which a measurement bounds no decodes any more: the machine may be busy with less, or with more, by then."""

_PLACES = 1000
"""Places by a thousand, so that both of what is learnt are of one order."""


class _Known(NamedTuple):
    """Steps of decodes alone, on average."""

    decodes: float
    seen: float
    seconds: float
    last: int
    """Which of all measured steps was the last of them."""


_NOTHING = _Known(0.0, 0.0, 0.0, 0)


class Speed:
    def __init__(self, target_s: float) -> None:
        self._target = target_s
        self._known: dict[int, _Known] = {}
        """By the bit length of their number."""
        self._steps = 0
        self._token = 0.0
        """Seconds that a token of a chunk adds to a step, what it attends to aside; 0 before the first was measured."""
        self._place = 0.0
        """Seconds that a token adds for each thousand places that it attends to."""

    def observe(self, decodes: int, seen: Callable[[], int], chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """A step of so many decodes, and of other rows (tokens, places before them), took `seconds`. `seen` counts the places before all
        decodes together; that is only asked now and then where there is nothing else."""
        self._steps += 1
        tokens = places = 0.0
        for length, context in chunks:
            tokens += length
            places += ((length + READ) * context + length * length / 2) / _PLACES
        if not tokens:
            size = decodes.bit_length()
            old = self._known.get(size) or _Known(decodes, seen(), seconds, 0)
            self._known[size] = _Known(
                old.decodes + _NEWEST * (decodes - old.decodes),
                old.seen + _NEWEST * (seen() - old.seen) if self._steps % _COUNT_SEEN == 0 else old.seen,
                old.seconds + _NEWEST * (seconds - old.seconds),
                self._steps,
            )
            return
        known = self._like(decodes)
        tokens += decodes - known.decodes
        if not self._token:
            self._token = max(0.0, seconds - known.seconds) / max(1.0, tokens)
            return
        places += _reading(seen() - known.seen)
        # Towards the nearest pair of values that explains it (normalized least mean squares): what a step says nothing of stays as it is.
        wrong = seconds - known.seconds - self._token * tokens - self._place * places
        # Where fewer decodes than known outweigh the chunk, it says next to nothing of either.
        share = _NEWEST * wrong / max(1.0, tokens * tokens + places * places)
        self._token = max(self._token / 2, self._token + share * tokens)
        self._place = max(0.0, self._place + share * places)

    def chunk(self, decodes: int, seen: int, most: int, context: int = 0, stretch: float = 1.0) -> int:
        """Tokens of a chunk behind so many places that may run beside so many decodes, up to `most`. `stretch` is how many times the target
        the step may take."""
        if not decodes or not self._token:
            return most
        known = self._like(decodes)
        alone = max(0.0, known.seconds + self._token * (decodes - known.decodes) + self._place * _reading(seen - known.seen))
        left = max(stretch * self._target, STRETCH * alone) - alone
        place = self._place * context / _PLACES
        return min(most, max(LEAST, int((left - READ * place) / (self._token + place))))

    def decodes(self, share: float) -> int:
        """How many decodes alone take such a share of the target, or of what a step takes by itself, where that is more: with big models
        few decodes take hardly longer than one. At least one, and no more than twice of what was measured to take less, so that the bound
        is approached in steps that show how far it is. No bound before any was measured."""
        points = sorted((known.decodes, known.seconds) for known in self._known.values() if self._steps - known.last < _FRESH)
        if not points:
            return sys.maxsize
        wanted = max(share * self._target, (1 + share) * _at_rest(points))
        below = max((place for place, (_, seconds) in enumerate(points) if seconds <= wanted), default=None)
        if below is None:
            number, seconds = points[0]
            return max(1, int(number * wanted / seconds))
        number, seconds = points[below]
        if below + 1 == len(points):
            return max(1, int(2 * number))
        more, longer = points[below + 1]
        # Rounded up, so that what is thought of longer steps is tried again.
        return math.ceil(number + (more - number) * (wanted - seconds) / (longer - seconds))

    def _like(self, decodes: int) -> _Known:
        """What is known of steps of so many decodes alone, or of the nearest smaller number."""
        if not decodes:
            return _NOTHING
        size = decodes.bit_length()
        near = max((other for other in self._known if other <= size), default=min(self._known, default=size))
        return self._known.get(near, _NOTHING)


def _reading(seen: float) -> float:
    """Thousands of places that decodes attend to and read, by those before them."""
    return (1 + READ) * seen / _PLACES


def _at_rest(points: list[tuple[float, float]]) -> float:
    """Seconds that a step takes however few decodes there are: on the line through its two smallest numbers."""
    number, seconds = points[0]
    if len(points) == 1:
        return seconds if number < 2 else 0.0
    more, longer = points[1]
    return min(seconds, max(0.0, seconds - number * (longer - seconds) / (more - number)))
