"""Drafts looked up in the request's own text: what followed the last few tokens when they stood there before.

It costs no model, and is right wherever a text repeats itself: code, quotations, summaries, structured output (prompt lookup decoding,
as in arXiv:2304.04487).

    … the cat sat on the mat . … the cat sat ▏      the last 3 tokens were followed by: on the mat .
"""

from headrace.engine.ledger.sequence import Sequence

SIZES = (3, 2)
"""Lengths of the pieces that are looked up, the best first."""


class _Index:
    """Where each piece of a text was followed by something last."""

    __slots__ = ("after", "read")

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}
        """The place after a piece, by its tokens."""
        self.read = 0
        """Places up to which pieces are known."""

    def extend(self, tokens: list[int]) -> None:
        # The piece at the very end is followed by nothing yet.
        for place in range(self.read, len(tokens)):
            for size in SIZES:
                if place >= size:
                    self.after[tuple(tokens[place - size : place])] = place
        self.read = max(self.read, len(tokens))


class NGram:
    """The drafter of one worker."""

    def __init__(self) -> None:
        self._indices: dict[int, _Index] = {}

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        """Up to `most` tokens that may follow what is known of the sequence; perhaps none."""
        tokens = sequence.tokens
        index = self._indices.get(sequence.request)
        if index is None or index.read > len(tokens):
            # Of a text that was longer once (before a restart) nothing may be known: all ranks draft alike.
            index = self._indices[sequence.request] = _Index()
        index.extend(tokens)
        for size in SIZES:
            place = index.after.get(tuple(tokens[-size:]))
            if place is not None:
                # What stands between the two places is taken to repeat itself.
                period = len(tokens) - place
                return (tokens[place : place + most] * (most // period + 1))[:most]
        return []

    def keep(self, requests: set[int]) -> None:
        """Forget all others, now and then."""
        if len(self._indices) > 2 * len(requests) + 16:
            self._indices = {request: index for request, index in self._indices.items() if request in requests}
