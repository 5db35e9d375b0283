"""Requests that wait for pages, in the order in which they are to be served.

    suspect ─▶ priority ─▶ tenant with the lowest counter ─▶ earliest arrival

Suspects come first, so that they are cleared or convicted soon. The order between tenants changes with every step, that within a tenant
never does: so there is a sorted list for each tenant and priority, and an iteration merges their heads. It costs what it yields, not what
waits.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace

from headrace.engine.ledger.sequence import Sequence
from headrace.engine.scheduler.tenants import PROMPT_TOKEN, Tenants


def _arrival(sequence: Sequence) -> tuple[float, int]:
    return sequence.arrived, sequence.request


def _class(sequence: Sequence) -> tuple[bool, int]:
    return not sequence.suspect, sequence.priority


class Queue:
    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._lines: dict[tuple[bool, int], dict[str, list[Sequence]]] = {}
        """By suspicion and priority, then by tenant: sorted by arrival, none of them empty."""
        self._all: dict[int, Sequence] = {}
        self.prompt_tokens = 0
        """Of all that wait."""

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, request: object) -> bool:
        return request in self._all

    def add(self, sequence: Sequence) -> None:
        line = self._lines.setdefault(_class(sequence), {}).setdefault(sequence.tenant, [])
        insort(line, sequence, key=_arrival)
        self._all[sequence.request] = sequence
        self.prompt_tokens += sequence.prompt

    def discard(self, request: int) -> None:
        """Take a request out; nothing happens when it does not wait."""
        sequence = self._all.pop(request, None)
        if sequence is None:
            return
        self.prompt_tokens -= sequence.prompt
        lines = self._lines[_class(sequence)]
        line = lines[sequence.tenant]
        del line[bisect_left(line, _arrival(sequence), key=_arrival)]
        if not line:
            del lines[sequence.tenant]
            if not lines:
                del self._lines[_class(sequence)]

    def clear(self) -> None:
        self._lines.clear()
        self._all.clear()
        self.prompt_tokens = 0

    def __iter__(self) -> Iterator[Sequence]:
        """In the order of service, if each is served as it is yielded: its tenant's next comes after what others are due."""
        for _, lines in sorted(self._lines.items()):
            heads = [(self._tenants.served(tenant), line[0].arrived, tenant, 0, line) for tenant, line in lines.items()]
            heapify(heads)
            while heads:
                served, _, tenant, place, line = heads[0]
                sequence = line[place]
                yield sequence
                if place + 1 == len(line):
                    heappop(heads)
                else:
                    served += PROMPT_TOKEN * sequence.remaining
                    heapreplace(heads, (served, line[place + 1].arrived, tenant, place + 1, line))
