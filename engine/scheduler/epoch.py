"""One life of the worker ranks, from `Begin` to the loss of one of them: the mirror ledger, and the plans whose results are due.

fly(plan k) ─▶ mirror applied, digest k noted ──▶ ranks
land(result of any rank) ─▶ its digest is the mirror's? ─▶ rank 0: commit ─▶ what ended; the plan ahead is in flight now
"""

import time
from collections.abc import Iterator

from headrace.engine.ledger.ledger import Ended, Ledger, LedgerError, Row
from headrace.engine.messages.steps import Begin, Plan, StepResult


class Divergence(Exception):
    """A rank's ledger is not the mirror: no page table of this epoch can be trusted."""


class Epoch:
    def __init__(self, begin: Begin, ranks: int) -> None:
        self.number = begin.epoch
        self.ledger = Ledger(begin)
        """The mirror."""
        self.in_flight: Plan | None = None
        """The plan that the mirror has applied, whose result is due."""
        self.rows: list[Row] = []
        """Those of the plan in flight."""
        self.ahead: Plan | None = None
        """The plan after it, if the workers have it already."""
        self._digests: dict[int, int] = {}
        """The mirror's digests of the steps that not every rank has ended."""
        self._ended = [-1] * ranks
        """The last step that each rank has ended."""
        self._flown = -1
        self._since = 0.0
        self._early: list[StepResult] = []
        """Results of ranks that are before the first."""

    @property
    def owed_since(self) -> float | None:
        """Since when a rank owes a result, monotonic seconds; None while none does."""
        return self._since if min(self._ended) < self._flown else None

    def fly(self, plan: Plan) -> None:
        """Apply a plan that the ranks have, or are about to get, to the mirror."""
        if self.owed_since is None:
            self._since = time.monotonic()
        self.rows = self.ledger.apply(plan)
        self._digests[plan.step] = self.ledger.digest
        self._flown = plan.step
        self.in_flight = plan

    def land(self, result: StepResult) -> Iterator[tuple[StepResult, list[Ended], list[Row]]]:
        """Take a rank's result; each step that it ended, with the requests that this ended and the step's rows. Raises `Divergence`."""
        if result.step > self._flown:
            self._early.append(result)
            return
        if self._digests.get(result.step) != result.digest:
            due = self._digests.get(result.step, 0)
            raise Divergence(f"rank {result.rank} has ledger digest {result.digest:x} in step {result.step}, the scheduler {due:x}")
        self._ended[result.rank] = result.step
        self._since = time.monotonic()
        last = min(self._ended)
        for step in [step for step in self._digests if step <= last]:
            del self._digests[step]
        if result.rank != 0:
            return
        rows = self.rows
        try:
            ended = self.ledger.commit(result)
        except LedgerError as error:
            raise Divergence(str(error)) from None
        self.in_flight, ahead, self.ahead = None, self.ahead, None
        yield result, ended, rows
        if ahead is not None:
            self.fly(ahead)
            early, self._early = self._early, []
            for other in early:
                yield from self.land(other)
