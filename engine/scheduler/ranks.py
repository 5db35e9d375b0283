"""The worker ranks of one replica, as the scheduler knows them: which are up, and what they agree on.

An epoch can begin when every rank is up. It has as many pages as the poorest rank. What a rank says of itself and what is said of its death
come in any order, so both bear its incarnation, and what is older than what is known changes nothing.
"""

from headrace.engine.messages.steps import WorkerUp


class Ranks:
    def __init__(self, names: list[str]) -> None:
        self.names = names
        """Process names by rank."""
        self._up: dict[int, WorkerUp] = {}
        self._newest = [-1] * len(names)
        """The latest incarnation of each rank that was heard of, alive or dead."""

    @property
    def ready(self) -> bool:
        return len(self._up) == len(self.names)

    @property
    def pages(self) -> int:
        return min(up.pages for up in self._up.values())

    @property
    def page_size(self) -> int:
        return self._up[0].page_size

    @property
    def step_tokens(self) -> int:
        return min(up.step_tokens for up in self._up.values())

    def arrive(self, up: WorkerUp) -> bool:
        """A rank says it is up; False when that is known, or no longer true."""
        if not 0 <= up.rank < len(self.names) or up.incarnation <= self._newest[up.rank]:
            return False
        self._newest[up.rank] = up.incarnation
        self._up[up.rank] = up
        return True

    def leave(self, name: str, incarnation: int) -> bool:
        """A process died; True when it was a rank that has no successor yet."""
        if name not in self.names or incarnation < self._newest[rank := self.names.index(name)]:
            return False
        self._newest[rank] = incarnation
        self._up.pop(rank, None)
        return True
