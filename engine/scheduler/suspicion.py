"""Which request kills the workers? Every one that ran in a step in which a worker died may have.

A crash makes all of them suspects, each of which then runs alone, until it is past where it was: an innocent one is cleared by that, a
guilty one kills again and is known. A worker that was killed from outside proves nothing, so it takes two such deaths without a step
forward to make a suspect, and more than two to convict one. A worker that is out of memory is killed from outside, too.
"""

CRASHES, KILLS = 2, 4
"""Deaths of workers after which a suspect is guilty: if it crashed the last one, and if that was killed."""


class Suspicion:
    """Against one request."""

    __slots__ = ("_clear_at", "_crashed", "_deaths")

    def __init__(self) -> None:
        self._deaths = 0
        """Since it was last beyond suspicion."""
        self._crashed = False
        """One of them was a crash."""
        self._clear_at = 0
        """As soon as it has emitted so many tokens it is beyond suspicion."""

    def alone(self, emitted: int) -> bool:
        """Whether the request must run alone, `emitted` being the tokens it has."""
        return emitted < self._clear_at and (self._crashed or self._deaths > 1)

    def implicate(self, crashed: bool, emitted: int, lost: int) -> bool:
        """A worker died in a step that ran the request; True when it is guilty. Of `lost` tokens that it emitted nobody may have heard."""
        alone = self.alone(emitted)
        if emitted >= self._clear_at:
            self._deaths, self._crashed = 0, False
        self._deaths += 1
        self._crashed = self._crashed or crashed
        self._clear_at = emitted + lost + 1
        return alone and self._deaths >= (CRASHES if crashed else KILLS)
