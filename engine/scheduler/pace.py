"""How many drafts a request should have verified: more while they prove right, fewer while they do not, none where they do not pay.

A verified draft costs a fraction of a step of its own, and gains a whole one if it is right. So it pays as long as a good part of the
drafts are right, and a request whose text does not repeat itself is left alone, but for a probe now and then.
"""

MOST = 8
"""Drafts that a step verifies for one request at most."""

FIRST = 3
"""Drafts to begin with."""

WORTH = 0.25
"""Share of right drafts, as an average that forgets, below which drafting pauses."""

REST = 32
"""Steps that a pause takes."""

_MEMORY = 0.8


class Pace:
    """Of one request."""

    __slots__ = ("_rest", "_right", "lookahead")

    def __init__(self) -> None:
        self.lookahead = FIRST
        """Drafts for the next step."""
        self._right = 0.5
        self._rest = 0

    def verified(self, drafted: int, accepted: int) -> None:
        """A step is over in which `accepted` of `drafted` tokens were right."""
        if self._rest:
            self._rest -= 1
            if self._rest == 0:
                self.lookahead = 1
            return
        if drafted == 0:
            return
        self._right = _MEMORY * self._right + (1 - _MEMORY) * accepted / drafted
        if self._right < WORTH:
            self._right, self._rest, self.lookahead = WORTH, REST, 0
        elif accepted == drafted:
            self.lookahead = min(MOST, max(2 * self.lookahead, 1))
        else:
            self.lookahead = max(1, accepted + 1)
