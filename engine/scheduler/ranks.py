"""The worker ranks of one replica, as the scheduler knows them: which are up, and what they agree on.

An epoch can begin when every rank is up. It has as many pages as the poorest rank.
"""

from headrace.engine.messages.steps import WorkerUp


class Ranks:
    def __init__(self, names: list[str]) -> None:
        self.names = names
        """Process names by rank."""
        self._up: dict[int, WorkerUp] = {}

    @property
    def ready(self) -> bool:
        return len(self._up) == len(self.names)

    @property
    def pages(self) -> int:
        return min(up.pages for up in self._up.values())

    @property
    def page_size(self) -> int:
        return self._up[0].page_size

    def arrive(self, up: WorkerUp) -> bool:
        """A rank says it is up; False when it said so before."""
        known = self._up.get(up.rank)
        if up.rank >= len(self.names) or (known and known.incarnation == up.incarnation):
            return False
        self._up[up.rank] = up
        return True

    def leave(self, name: str) -> bool:
        """A process died; True when it was a rank."""
        if name not in self.names:
            return False
        self._up.pop(self.names.index(name), None)
        return True
