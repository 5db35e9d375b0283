"""A paced worker whose memory fails when a test says so: one bit of its ledger flips, in the step in which that first matters.

The test leaves a file `flip.<rank>` in the run directory. The next step of that rank that takes a page takes a wrong one, and the worker
says in its log which step that was.
"""

import logging
from pathlib import Path

from headrace.engine.ledger.ledger import Ledger
from headrace.engine.messages.steps import Plan, ToWorker
from headrace.engine.process import Process, Role
from headrace.workers.worker import Worker, rank_of
from tests.e2e.paced import PacedRunner

log = logging.getLogger(__name__)


def order(run_dir: Path, rank: int) -> Path:
    """The file by which a test orders a flip."""
    return run_dir / f"flip.{rank}"


class FlippingWorker(Worker):
    def __init__(self, process: Process, rank: int) -> None:
        super().__init__(process, rank, PacedRunner(process.config.page_size, process.model.vocab_size))
        self._order = order(process.run_dir, rank)

    def _step(self, plan: Plan) -> None:
        ledger = self._ledger
        if ledger is not None and plan.epoch == self._epoch and _takes_a_page(ledger, plan) and self._order.exists():
            self._order.unlink()
            ledger.pool._free[-1] ^= 1
            log.warning("a bit flips in step %d", plan.step)
        super()._step(plan)


def _takes_a_page(ledger: Ledger, plan: Plan) -> bool:
    # A plan ahead goes on with the rows of the step before.
    run = [row.sequence.request for row in ledger._before] if plan.ahead else plan.run
    lengths = [1] * len(run) if plan.ahead else plan.lengths
    for request, length, lookahead in zip(run, lengths, plan.lookahead or [0] * len(run), strict=True):
        if sequence := ledger.sequences.get(request):
            drafts = min(lookahead, sequence.limit - len(sequence.tokens) - 1)
            if sequence.computed + length + drafts > len(sequence.pages) * ledger.page_size:
                return True
    return False


async def build(process: Process) -> Worker:
    return FlippingWorker(process, rank_of(process.name))


ROLE = Role(ToWorker, build)
