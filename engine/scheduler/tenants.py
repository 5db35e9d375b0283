"""Who was served how much: virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", arXiv:2401.00588).

Every tenant has a counter of the tokens that were computed for it. Whoever has the lowest is served next, so that with more than one
tenant each gets its share however many requests another sends, and with one tenant nothing changes. A tenant that returns does not
bring along what it did not use: its counter is lifted to the lowest of those that have requests.
"""

EXPECTED_S = 30.0
"""For so long after its last request a tenant counts as one that may send another."""
PROMPT_TOKEN = 1.0
EMITTED_TOKEN = 2.0
"""What a token counts. Emitted ones cost a step each; these are the paper's weights."""


class Tenants:
    """The counters. A tenant is known from its first request on; there are as many as there are API keys."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._live: dict[str, int] = {}
        """Requests of each tenant that has some."""
        self._left: dict[str, float] = {}
        """When the last one of each other tenant was over, monotonic seconds, the latest at the end."""

    @property
    def live(self) -> int:
        """Tenants with requests."""
        return len(self._live)

    def shared(self, now: float) -> bool:
        """Whether a tenant that has requests shares the engine with another, be it one that may come back at any moment."""
        if not self._live or not self._left:
            return len(self._live) > 1
        return len(self._live) > 1 or now - next(reversed(self._left.values())) < EXPECTED_S

    def served(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def arrive(self, tenant: str) -> None:
        """A request of `tenant` has come."""
        if tenant not in self._live:
            least = min((self._served[other] for other in self._live), default=0.0)
            self._served[tenant] = max(self.served(tenant), least)
            self._live[tenant] = 0
            self._left.pop(tenant, None)
        self._live[tenant] += 1

    def leave(self, tenant: str, now: float) -> None:
        """A request of `tenant` is over."""
        self._live[tenant] -= 1
        if not self._live[tenant]:
            del self._live[tenant]
            self._left[tenant] = now
            if not self._live:
                self._served.clear()

    def charge(self, tenant: str, prompt: int, emitted: int) -> None:
        """So many tokens were computed for `tenant`."""
        self._served[tenant] = self.served(tenant) + PROMPT_TOKEN * prompt + EMITTED_TOKEN * emitted
