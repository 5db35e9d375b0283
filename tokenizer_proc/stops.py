"""Looks for stop strings in text that comes in pieces.

Text that could be the beginning of a stop string is held back until it is clear that it is none, so nothing is shown that must be
taken back. The match that ends first wins (of those, the one that starts first), whatever pieces the text came in.

    "…and th" │ "e En" │ "d."   stop "the End":   "…and " │ "" │ match
"""

import re


class StopFinder:
    """Finds the first of some stop strings in one request's text."""

    __slots__ = ("_begins", "_held", "_include", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._begins = re.compile("[" + "".join(re.escape(stop[0]) for stop in stops) + "]").search
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a match it ends before the stop string, or with it when stops are included."""
        if not self._held and not self._begins(text):
            return text
        text = self._held + text
        self._held = ""
        first: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first = start + len(stop), start
                self.matched = stop
        if first is not None:
            end, start = first
            return text[: end if self._include else start]
        keep = len(text) - max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[keep:]
        return text[:keep]

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    start = max(0, len(text) - len(stop) + 1)
    while True:
        start = text.find(stop[0], start)
        if start < 0:
            return 0
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
