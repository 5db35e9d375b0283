"""What becomes of a step's result once the mirror ledger has committed it.

    rows, result ─▶ whom it served (tenants), how long it took (speed), how its drafts did (pace)
                 ─▶ tokens and logprobs, to be sent to the tokenizers (outgoing)

The scheduler calls it for each step. It ends no request: that is done by who took it in.
"""

from collections import Counter
from collections.abc import Collection

from headrace.engine.ledger.ledger import Ledger, Row
from headrace.engine.messages.steps import StepResult
from headrace.engine.scheduler.admission import Admission
from headrace.engine.scheduler.journal import Journal
from headrace.engine.scheduler.meters import Meters
from headrace.engine.scheduler.outgoing import Outgoing
from headrace.engine.scheduler.speed import Speed
from headrace.engine.scheduler.tenants import Tenants


class Delivery:
    """`tokenizers` are the names of all there are; with `drafts`, steps may have verified some."""

    def __init__(
        self,
        journal: Journal,
        tenants: Tenants,
        speed: Speed,
        admission: Admission,
        meters: Meters,
        outgoing: Outgoing,
        tokenizers: Collection[str],
        drafts: bool,
    ) -> None:
        self._journal = journal
        self._tenants = tenants
        self._speed = speed
        self._admission = admission
        self._meters = meters
        self._outgoing = outgoing
        self._tokenizers = tokenizers
        self._drafts = drafts

    def take(self, result: StepResult, rows: list[Row], ledger: Ledger, now: float, cancelled: bool) -> None:
        """A step is over. With `cancelled`, requests of some of its `rows` may be."""
        self._outgoing.step = result.step
        self._meters.step(result)
        self._account(result, rows, now)
        if self._drafts:
            self._count_drafts(result, ledger)
        self._hand_out(result, rows, cancelled)

    def _account(self, result: StepResult, rows: list[Row], now: float) -> None:
        """Note whom the step served, and how long that took."""
        chunks = [row for row in rows if row.start < row.sequence.prompt]
        chunk = 0
        for row in chunks:
            sequence = row.sequence
            chunk += row.length
            self._tenants.charge(sequence.tenant, row.length, 0)
            if entry := self._journal.running(sequence.request):
                entry.chunks += 1
                if row.emits and entry.first_token is None:
                    entry.first_token = now
        decodes = len(rows) - len(chunks)
        seen = lambda: sum([row.start for row in rows]) - sum([row.start for row in chunks])  # noqa: E731
        self._speed.observe(decodes, seen, [(row.length, row.start) for row in chunks], result.times.total * 1e-9)
        self._admission.work.add(decodes + chunk, now)
        if len(rows) == 1 and rows[0].sequence.suspect and (entry := self._journal.running(rows[0].sequence.request)):
            # Suspects run alone, and one that is past where it was is cleared.
            rows[0].sequence.suspect = entry.suspect

    def _count_drafts(self, result: StepResult, ledger: Ledger) -> None:
        """Learn from what became of the drafts how many to ask for."""
        for request, count, drafted in zip(result.requests, result.counts, result.drafted or [0] * len(result.counts), strict=True):
            accepted = max(0, count - 1)
            self._meters.drafts(drafted, accepted)
            if entry := self._journal.running(request):
                entry.pace.verified(drafted, accepted)
                if sequence := ledger.sequences.get(request):
                    sequence.lookahead = entry.pace.lookahead

    def _hand_out(self, result: StepResult, rows: list[Row], cancelled: bool) -> None:
        """Tell the tokenizers what their requests emitted."""
        told = rows if len(rows) == len(result.requests) else [row for row in rows if row.emits]
        if cancelled:
            told = [row for row in told if self._journal.running(row.sequence.request)]
        one_each = result.counts.count(1) == len(result.counts)
        if one_each and told and not cancelled and len(self._tokenizers) == 1:
            # As most steps of most engines: the result's own columns.
            (receiver,) = self._tokenizers
            self._outgoing.add_step(receiver, result, told)
        else:
            for row in told:
                sequence, known = row.sequence, row.start + row.length
                receiver = self._journal.must_have(sequence.request).reply_to
                self._outgoing.add(receiver, sequence.request, known - sequence.prompt, sequence.tokens[known:])
        if one_each and self._tenants.live == 1 and told:
            served = {told[0].sequence.tenant: len(told)}
        else:
            served = Counter()
            for row in told:
                served[row.sequence.tenant] += len(row.sequence.tokens) - row.start - row.length
        for tenant, taken in served.items():
            self._meters.emitted_tokens.add(taken)
            self._tenants.charge(tenant, 0, taken)
        for scores in result.logprobs:
            if entry := self._journal.running(scores.request):
                entry.logprobs.append(scores)
                self._outgoing.to(entry.reply_to).logprobs.append(scores)
        for scores in result.prompt_logprobs:
            if entry := self._journal.running(scores.request):
                entry.prompt_logprobs.append(scores)
                self._outgoing.to(entry.reply_to).prompt_logprobs.append(scores)
