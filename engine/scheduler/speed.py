"""How long steps take, to size the chunks of prompts that run beside decodes.

A request that decodes sees each step as the pause before its next token. A chunk beside it may stretch that pause, but only so far:

    pause = decodes(n) + chunk × token   ≤   max(target, STRETCH × decodes(n))

Both terms are averages of what was measured, so they follow the machine, the model and the growing context by themselves.
"""

STRETCH = 1.6
"""How much longer than a step of decodes alone one with a chunk may be, where that is more than the target."""

LEAST = 16
"""Tokens of a chunk that are always allowed: smaller ones cost more than they are worth. A chunk reads all keys and values before it,
however few its tokens are: behind 8,000, chunks of 4 took a prompt three times as long, and others paused no less."""

_NEWEST = 0.2
"""Weight of the newest measurement."""


class Speed:
    def __init__(self, target_s: float) -> None:
        self._target = target_s
        self._decodes: dict[int, float] = {}
        """Seconds of a step of decodes alone, by the bit length of their number."""
        self._token = 0.0
        """Seconds that a token of a chunk adds to a step; 0 before the first was measured."""

    def observe(self, decodes: int, chunk: int, seconds: float) -> None:
        """A step of so many decodes and so many other tokens took `seconds`."""
        if chunk == 0:
            size = decodes.bit_length()
            known = self._decodes.get(size, seconds)
            self._decodes[size] = known + _NEWEST * (seconds - known)
        else:
            token = max(0.0, seconds - self._of_decodes(decodes)) / chunk
            self._token += (_NEWEST if self._token else 1.0) * (token - self._token)

    def chunk(self, decodes: int, most: int) -> int:
        """Tokens that may run beside so many decodes, up to `most`."""
        if not decodes or not self._token:
            return most
        alone = self._of_decodes(decodes)
        return min(most, max(LEAST, int((max(self._target, STRETCH * alone) - alone) / self._token)))

    def _of_decodes(self, decodes: int) -> float:
        """A step of so many decodes alone: as measured, or as the nearest smaller number was."""
        if not decodes:
            return 0.0
        size = decodes.bit_length()
        near = max((other for other in self._decodes if other <= size), default=min(self._decodes, default=size))
        return self._decodes.get(near, 0.0)
