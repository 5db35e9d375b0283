"""The engine's doors: who has let its last request out, and when new ones may come in again.

    close ─▶ Drain to servers and scheduler ─▶ each says Drained ─▶ empty
    open  ─▶ Resume to the scheduler, a Probe behind it ─▶ Snapshot ─▶ then(): servers let requests in

Servers open last: what one lets in comes to the scheduler by another way than the supervisor's word, and may overtake it. A scheduler that
starts anew takes requests whatever the one before was told. Called by the supervisor, which knows the engine's state.
"""

import asyncio
from collections.abc import Callable, Iterable

from headrace.engine.actor import Post
from headrace.engine.messages.lifecycle import Drain, Probe, Resume
from headrace.engine.names import SCHEDULER

RESUMING = -2
"""The call by which the scheduler shows that it takes requests again."""


class Doors:
    def __init__(self, post: Post) -> None:
        self._post = post
        self._undrained: set[str] = set()
        self._all_drained = asyncio.Event()
        self._opening: list[Callable[[], None]] = []
        """What is to be done once the scheduler takes requests again."""

    @property
    def opening(self) -> bool:
        return bool(self._opening)

    def close(self, names: Iterable[str]) -> None:
        """Have these take nothing new, and say when all that ran has ended."""
        self.opened()
        self.expect(names)
        for name in self._undrained:
            self._post.send(name, Drain())

    def expect(self, names: Iterable[str]) -> None:
        """These will say when all that ran has ended."""
        self._undrained = set(names)
        self._all_drained.clear()

    def drained(self, name: str) -> bool:
        """One has said so. Whether all have."""
        self._undrained.discard(name)
        if not self._undrained:
            self._all_drained.set()
        return not self._undrained

    async def emptied(self) -> None:
        await self._all_drained.wait()

    def open(self, then: Callable[[], None]) -> None:
        """Have the scheduler take requests again, and then the servers."""
        self._opening.append(then)
        self._post.send(SCHEDULER, Resume())
        self._post.send(SCHEDULER, Probe(RESUMING))

    def opened(self) -> None:
        """The scheduler takes requests, or is told otherwise now."""
        opening, self._opening = self._opening, []
        for then in opening:
            then()
