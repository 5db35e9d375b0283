"""Whether one more request may wait, and when to come again if not.

    what is here, the limits ─▶ Full: what there is too much of │ when it will have been started │ for how long all are told the same

Asked by the scheduler for each new request; it tells how fast requests finish and tokens are computed, from which the wait is reckoned.
"""

import time
from dataclasses import dataclass

from headrace.engine.scheduler.meters import Rate
from headrace.engine.scheduler.step import Limits

MOST_HOLD_S, HOLD_OF_DRAIN = 0.2, 0.05
"""For how long one refusal by a full queue may speak for all: seconds, and as a share of the time in which what waits would be started, so
that the queue is never found empty."""
UNKNOWN_S = 5.0
"""When to come again while nothing is known of how fast requests end."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is here already."""

    requests: int
    queued: int
    """Those without pages."""
    queued_tokens: int
    """Of the prompts of those that wait for a place."""
    prompt_tokens: int
    """Of all prompts."""


@dataclass(frozen=True, slots=True)
class Full:
    message: str
    retry_after: float
    """Seconds."""
    hold_s: float
    """See `Refused.hold_s`."""


class Admission:
    def __init__(self, max_waiting: int, max_waiting_tokens: int) -> None:
        self._max_waiting, self._max_waiting_tokens = max_waiting, max_waiting_tokens
        self.finishes, self.work = Rate(), Rate()
        """Requests that ended, and tokens that were computed."""

    def full(self, prompt: int, load: Load, limits: Limits) -> Full | None:
        """What there is too much of to take one more request of so many tokens. None when there is room."""
        # Places that are free belong to those who wait for the next step.
        if load.requests >= limits.max_running + self._max_waiting:
            return self._full(f"{load.queued} requests are waiting", load, MOST_HOLD_S)
        if load.requests and load.queued_tokens + prompt > self._max_waiting_tokens + limits.max_step_tokens:
            # A shorter one may fit.
            return self._full(f"requests with {load.queued_tokens} prompt tokens are waiting", load, 0.0)
        return None

    def _full(self, what: str, load: Load, hold_s: float) -> Full:
        wait = self._time_to_drain(load)
        return Full(f"{what} already: try again in {wait:.0f} s", wait, min(hold_s, wait * HOLD_OF_DRAIN))

    def _time_to_drain(self, load: Load) -> float:
        """Seconds until what waits now will have been started, at the rate at which requests finish, or tokens are computed, of late."""
        now = time.monotonic()
        if rate := self.finishes.per_second(now):
            return min(3600.0, max(1.0, load.queued / rate))
        if rate := self.work.per_second(now):
            return min(3600.0, max(1.0, load.prompt_tokens / rate))
        return UNKNOWN_S
