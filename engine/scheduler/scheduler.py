"""The scheduler process: takes requests, writes the plans, hands out the tokens.

    Submit, Cancel ─▶ journal, queues ─▶ plan() ─▶ Plan ──▶ workers
    Tokens, Refused ◀─ outgoing ◀── mirror ledger ◀── StepResult ◀┘

It holds no tensor and imports no torch. All state of a step lies in the mirror ledger; all state of a request that must outlive a
worker lies in the journal. While nothing but decoding goes on, a step's successor is sent before its result is back, so that the workers
never wait for a plan; otherwise a new plan is written as soon as the result is there.

    plan k ──▶ ┌ step k ┐ plan k+1 ──▶ ┌ step k+1 ┐        without: the worker waits from each result to the next plan
                        └─▶ result k             └─▶ …     ahead:   plan k+1 is there already
"""

import logging
import math
import time
from bisect import insort
from collections import deque

from headrace.engine.ledger.ledger import Ended, Ledger, LedgerError, Row
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.lifecycle import Drain, Drained, PeerDied, Progress, Restart
from headrace.engine.messages.steps import Begin, FromWorker, Hello, Plan, StepResult, WorkerUp
from headrace.engine.messages.tokens import Cancel, Refused, SchedulerUp, Submit, TokenEnd, Tokens, ToScheduler
from headrace.engine.messages.wire import Message
from headrace.engine.metrics import SECONDS
from headrace.engine.names import SUPERVISOR, tokenizer_names, worker_names
from headrace.engine.process import Process, main
from headrace.engine.scheduler.journal import Entry, Journal
from headrace.engine.scheduler.plan import Limits, plan, plan_ahead
from headrace.engine.scheduler.ranks import Ranks

log = logging.getLogger(__name__)

DIGESTS_KEPT = 8
"""Steps by which a rank may be behind the first and still be checked."""

NO_LOGITS = "the model gave no valid logits for this request (not a number, or nothing but minus infinity): other requests are not affected"


class Scheduler:
    """The actor."""

    def __init__(self, process: Process) -> None:
        config = process.config
        self._process = process
        self._limits = Limits(config.max_running, config.max_step_tokens)
        self._max_waiting = config.max_waiting
        self._drafts = config.draft != "none"
        self._ranks = Ranks(worker_names(config))
        self._journal = Journal()
        self._epoch = process.incarnation << 20
        self._ledger: Ledger | None = None
        """The mirror; None until an epoch has begun."""
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._aborts: list[int] = []
        """Cancelled requests that the workers still hold."""
        self._in_flight: Plan | None = None
        """The plan that the mirror has applied, whose result is due."""
        self._rows: list[Row] = []
        """Those of the plan in flight."""
        self._ahead: Plan | None = None
        """The plan after it, if the workers have it already."""
        self._digests: deque[tuple[int, int]] = deque(maxlen=DIGESTS_KEPT)
        """The last steps and the mirror's digests in them, for ranks that are behind the first."""
        self._early: list[StepResult] = []
        """Results of ranks that are before the first."""
        self._outgoing: dict[str, Tokens] = {}
        self._draining = self._drained = False
        self._last_step: float | None = None
        self._finishes = Rate()
        self._meters = Meters(process)
        process.progress = self.progress
        for name in self._ranks.names:
            process.send(name, Hello())
        for name in tokenizer_names(config):
            process.send(name, SchedulerUp(process.incarnation))

    def receive(self, message: Message) -> None:
        match message:
            case StepResult():
                self._take_result(message)
            case Submit():
                self._submit(message)
            case Cancel():
                for request in message.requests:
                    self._cancel(request, message.reason)
            case WorkerUp():
                if self._ranks.arrive(message):
                    self._leave_epoch()
                    if self._ranks.ready:
                        self._begin_epoch()
            case PeerDied():
                self._process.post.forget(message.name)
                if self._ranks.leave(message.name):
                    self._leave_epoch()
            case Drain():
                self._draining = True

    def settle(self) -> None:
        if self._ledger is not None and self._in_flight is None and (self._running or self._waiting or self._aborts):
            self._start_step(self._ledger)
        if self._ledger is not None and self._in_flight is not None and self._ahead is None and not (self._waiting or self._aborts):
            self._look_ahead(self._ledger)
        for name, tokens in self._outgoing.items():
            self._process.send(name, tokens)
        self._outgoing.clear()
        if self._draining and not self._drained and not len(self._journal):
            self._drained = self._process.send(SUPERVISOR, Drained(self._process.name))

    def progress(self) -> Progress:
        """The engine's pulse, and the gauges that go with it."""
        now = time.monotonic()
        # Cancelled requests run until the workers have been told.
        running = len(self._running) + len(self._aborts)
        self._meters.show(self._ledger, running, len(self._journal) - len(self._running))
        return Progress(
            running=running,
            waiting=len(self._journal) - len(self._running),
            workers_ready=self._ranks.ready,
            last_step_age_s=None if self._last_step is None else now - self._last_step,
            step=self._ledger.step if self._ledger else 0,
        )

    # Requests

    def _submit(self, submit: Submit) -> None:
        """Queue a request, or refuse it with a reason."""
        if known := self._journal.get(submit.request):
            self._tell_again(known, submit)
            return
        waiting = len(self._journal) - len(self._running)
        if self._draining:
            self._refuse(submit, 503, "draining", "the server is shutting down and takes no new requests: try again in a moment", 5.0)
        elif waiting >= self._max_waiting and not submit.emitted:
            rate = self._finishes.per_second(time.monotonic())
            wait = min(60.0, max(1.0, waiting / rate)) if rate > 0 else 5.0
            self._refuse(submit, 429, "overloaded", f"{waiting} requests are waiting already: try again in {wait:.0f} s", wait)
        else:
            entry = self._journal.open(submit, time.monotonic())
            if self._ledger is not None:
                self._enqueue(entry, self._ledger)

    def _tell_again(self, entry: Entry, submit: Submit) -> None:
        """A tokenizer asks for a request that is running: it has taken it over from one that died, and lacks what came since."""
        entry.reply_to = submit.reply_to
        outgoing = self._outgoing_for(submit.reply_to)
        have = len(submit.emitted)
        for index, token in enumerate(entry.emitted[have:], have):
            outgoing.requests.append(submit.request)
            outgoing.index.append(index)
            outgoing.tokens.append(token)
        outgoing.logprobs.extend(one for one in entry.logprobs if one.index >= have)
        outgoing.prompt_logprobs.extend(entry.prompt_logprobs)

    def _enqueue(self, entry: Entry, ledger: Ledger) -> None:
        submit = entry.submit
        most = len(submit.prompt) + (submit.sampling.max_tokens or 0)
        if ledger.pages_for(most) > ledger.pool.total:
            room = ledger.pool.total * ledger.page_size
            self._journal.close(submit.request)
            self._refuse(
                submit,
                400,
                "context_length_exceeded",
                f"prompt and max_tokens together are {most} tokens, the KV memory holds {room}: "
                "ask for fewer, or serve with more --kv-memory",
            )
            return
        entry.sequence = ledger.sequence_of(entry.admit())
        insort(self._waiting, entry.sequence, key=self._order)

    def _refuse(self, submit: Submit, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        self._meters.refused(code)
        self._process.send(submit.reply_to, Refused(submit.request, status, code, message, retry_after))

    def _cancel(self, request: int, reason: str) -> None:
        entry = self._journal.close(request)
        if entry is None:
            return
        self._meters.ended(reason)
        self._tell_end(entry, entry.end(reason, time.monotonic()))
        sequence = entry.sequence
        if sequence is None or self._ledger is None:
            return
        if request in self._ledger.sequences:
            self._aborts.append(request)
        self._running = [other for other in self._running if other.request != request]
        self._waiting = [other for other in self._waiting if other.request != request]

    def _order(self, sequence: Sequence) -> tuple[int, float]:
        """Who comes first: a lower priority number, then an earlier arrival, however often it was preempted."""
        entry = self._journal.get(sequence.request)
        return (entry.submit.priority, entry.arrived) if entry else (0, 0.0)

    # Steps

    def _start_step(self, ledger: Ledger) -> None:
        """Write the next plan, apply it to the mirror and send it to every rank."""
        decision = plan(ledger, self._running, self._waiting, self._limits)
        if not decision.run and not decision.preempt and not self._aborts:
            return
        message = Plan(
            epoch=self._epoch,
            step=ledger.step,
            digest=ledger.digest,
            abort=self._aborts,
            preempt=[sequence.request for sequence in decision.preempt],
            admit=[self._entry(sequence.request).admit() for sequence in decision.start if sequence.request not in ledger.sequences],
            run=[sequence.request for sequence, _ in decision.run],
            lengths=[length for _, length in decision.run],
            lookahead=decision.lookahead if any(decision.lookahead) else [],
        )
        self._aborts = []
        self._put_in_flight(message, ledger)
        for name in self._ranks.names:
            self._process.send(name, message)
        if decision.preempt:
            self._preempted(decision.preempt)
        if decision.start:
            now = time.monotonic()
            started = {sequence.request for sequence in decision.start}
            self._waiting = [sequence for sequence in self._waiting if sequence.request not in started]
            for request in started:
                self._started(ledger.sequences[request], now)

    def _look_ahead(self, ledger: Ledger) -> None:
        """Send the plan after the one in flight, if its result cannot change it."""
        decision = plan_ahead(ledger, self._rows, self._running, self._limits)
        if not decision.run:
            return
        run = [sequence.request for sequence, _ in decision.run]
        lookahead = decision.lookahead if any(decision.lookahead) else []
        self._ahead = Plan(self._epoch, ledger.step + 1, 0, [], [], [], run, [1] * len(run), ahead=True, lookahead=lookahead)
        for name in self._ranks.names:
            self._process.send(name, self._ahead)

    def _put_in_flight(self, message: Plan, ledger: Ledger) -> None:
        self._rows = ledger.apply(message)
        self._digests.append((message.step, ledger.digest))
        self._in_flight = message
        self._meters.step_tokens.observe(sum(row.length for row in self._rows))

    def _started(self, sequence: Sequence, now: float) -> None:
        """A waiting request has its pages."""
        entry = self._entry(sequence.request)
        entry.sequence = sequence
        if self._drafts:
            sequence.lookahead = entry.pace.lookahead
        entry.cached = max(entry.cached, min(sequence.cached, sequence.prompt))
        if entry.started is None:
            entry.started = now
            self._meters.queue_time.observe(now - entry.arrived)
            self._meters.prompt_tokens.add(sequence.prompt)
            self._meters.cached_tokens.add(sequence.cached)
        insort(self._running, sequence, key=self._order)

    def _preempted(self, victims: list[Sequence]) -> None:
        gone = {sequence.request for sequence in victims}
        self._running = [sequence for sequence in self._running if sequence.request not in gone]
        for sequence in victims:
            self._entry(sequence.request).preemptions += 1
            insort(self._waiting, sequence, key=self._order)
        self._meters.preemptions.add(len(victims))

    def _take_result(self, result: StepResult) -> None:
        """Commit a step to the mirror and hand out what it emitted."""
        ledger = self._ledger
        if ledger is None or result.epoch != self._epoch:
            return
        if result.step > self._digests[-1][0]:
            self._early.append(result)
            return
        if not self._agrees(result) or result.rank != 0 or self._in_flight is None or result.step != self._in_flight.step:
            return
        try:
            ended = {end.sequence.request: end for end in ledger.commit(result)}
        except LedgerError as error:
            self._diverged(str(error))
            return
        now = time.monotonic()
        self._in_flight, ahead, self._ahead = None, self._ahead, None
        self._meters.step(result)
        self._last_step = now
        if self._drafts:
            self._count_drafts(result, ledger)
        self._hand_out(result, ended, now)
        if ahead is not None:
            self._put_in_flight(ahead, ledger)
            early, self._early = self._early, []
            for other in early:
                self._take_result(other)

    def _count_drafts(self, result: StepResult, ledger: Ledger) -> None:
        """Learn from what became of the drafts how many to ask for."""
        for request, count, drafted in zip(result.requests, result.counts, result.drafted or [0] * len(result.counts), strict=True):
            accepted = max(0, count - 1)
            self._meters.drafts(drafted, accepted)
            if entry := self._journal.get(request):
                entry.pace.verified(drafted, accepted)
                if sequence := ledger.sequences.get(request):
                    sequence.lookahead = entry.pace.lookahead

    def _agrees(self, result: StepResult) -> bool:
        """Whether the rank's ledger was the mirror in that step. If not, its epoch is over."""
        for step, digest in self._digests:
            if step == result.step and digest != result.digest:
                self._diverged(f"rank {result.rank} has ledger digest {result.digest:x} in step {step}, the scheduler {digest:x}")
                return False
        return True

    def _hand_out(self, result: StepResult, ended: dict[int, Ended], now: float) -> None:
        journal = self._journal
        position = 0
        for request, count in zip(result.requests, result.counts, strict=True):
            entry = journal.get(request)
            if entry is not None:
                outgoing = self._outgoing_for(entry.reply_to)
                emitted = entry.emitted
                # A request that ended within its count has fewer tokens in the ledger than in the result.
                count_taken = ended[request].sequence.emitted - len(emitted) if request in ended else count
                for token in result.tokens[position : position + count_taken]:
                    outgoing.requests.append(request)
                    outgoing.index.append(len(emitted))
                    outgoing.tokens.append(token)
                    emitted.append(token)
                self._meters.emitted_tokens.add(count_taken)
            position += count
        for scores in result.logprobs:
            if entry := journal.get(scores.request):
                entry.logprobs.append(scores)
                self._outgoing_for(entry.reply_to).logprobs.append(scores)
        for scores in result.prompt_logprobs:
            if entry := journal.get(scores.request):
                entry.prompt_logprobs.append(scores)
                self._outgoing_for(entry.reply_to).prompt_logprobs.append(scores)
        if ended:
            for request, end in ended.items():
                if entry := journal.close(request):
                    self._meters.ended(end.reason)
                    if end.reason == "error":
                        self._process.send(entry.reply_to, Refused(request, 500, "invalid_logits", NO_LOGITS))
                    else:
                        self._tell_end(entry, entry.end(end.reason, now))
            self._running = [sequence for sequence in self._running if sequence.request not in ended]
            self._finishes.add(len(ended), now)

    def _outgoing_for(self, name: str) -> Tokens:
        tokens = self._outgoing.get(name)
        if tokens is None:
            step = self._ledger.step if self._ledger else 0
            tokens = self._outgoing[name] = Tokens(self._epoch, step, [], [], [], [], [], [])
        return tokens

    def _tell_end(self, entry: Entry, end: TokenEnd) -> None:
        self._outgoing_for(entry.reply_to).ends.append(end)

    def _entry(self, request: int) -> Entry:
        entry = self._journal.get(request)
        assert entry is not None, f"request {request:x} runs without a journal entry"
        return entry

    # Epochs

    def _begin_epoch(self) -> None:
        """All ranks are up: start with empty pages, and queue every live request with the tokens it has."""
        self._epoch += 1
        begin = Begin(
            self._epoch, self._ranks.pages, self._ranks.page_size, self._process.model.end_tokens, self._process.config.prefix_cache
        )
        for name in self._ranks.names:
            self._process.send(name, begin)
        self._ledger = Ledger(begin)
        for entry in self._journal.entries():
            self._enqueue(entry, self._ledger)

    def _leave_epoch(self) -> None:
        """A rank is gone: nothing of the mirror is true any more."""
        self._ledger = None
        self._in_flight = self._ahead = None
        self._digests.clear()
        self._early.clear()
        self._running, self._waiting, self._aborts = [], [], []
        for entry in self._journal.entries():
            entry.sequence = None

    def _diverged(self, what: str) -> None:
        """The ranks' ledgers and the mirror disagree: no page table can be trusted, so the ranks start again."""
        log.error("%s: the workers are restarted", what)
        self._meters.divergences.add()
        self._leave_epoch()
        self._process.send(SUPERVISOR, Restart(tuple(self._ranks.names), what))


class Rate:
    """Events a second over about the last ten seconds, older ones fading."""

    MEMORY = 10.0

    def __init__(self) -> None:
        self._weight = 0.0
        self._at = 0.0

    def add(self, events: int, now: float) -> None:
        self._weight = self.per_second(now) * self.MEMORY + events
        self._at = now

    def per_second(self, now: float) -> float:
        return self._weight * math.exp((self._at - now) / self.MEMORY) / self.MEMORY


class Meters:
    """What the scheduler measures."""

    def __init__(self, process: Process) -> None:
        metrics = self._metrics = process.metrics
        self.queue_time = metrics.histogram("headrace_queue_seconds", "From arrival at the scheduler to the first step.")
        self.preemptions = metrics.counter("headrace_preemptions_total", "Requests that gave up their pages and waited again.")
        self.divergences = metrics.counter("headrace_divergences_total", "Steps in which a rank's ledger differed from the scheduler's.")
        self.prompt_tokens = metrics.counter("headrace_prompt_tokens_total", "Prompt tokens of requests that were started.")
        self.cached_tokens = metrics.counter("headrace_prefix_hit_tokens_total", "Prompt tokens that the prefix cache gave.")
        self.emitted_tokens = metrics.counter("headrace_generated_tokens_total", "Tokens emitted.")
        self._drafted = metrics.counter("headrace_draft_tokens_total", "Tokens that were drafted and verified.")
        self._accepted = metrics.counter("headrace_accepted_draft_tokens_total", "Drafted tokens that proved right.")
        self._acceptance = metrics.histogram(
            "headrace_acceptance_length",
            "Tokens that a request emitted in a step in which drafts were verified.",
            (1, 2, 3, 4, 5, 6, 7, 8, 9),
        )
        self.step_tokens = metrics.histogram(
            "headrace_step_tokens", "Tokens computed in a step.", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
        )
        self._step_time = metrics.histogram("headrace_step_seconds", "A step on the worker, from plan to result.", SECONDS)
        self._forward_time = metrics.histogram("headrace_forward_seconds", "The model's part of a step.", SECONDS)
        self._running = metrics.gauge("headrace_requests_running", "Requests that have pages.")
        self._waiting = metrics.gauge("headrace_requests_waiting", "Requests that wait for pages.")
        self._pages = {
            state: metrics.gauge("headrace_kv_pages", "KV pages by state.", (("state", state),)) for state in ("used", "cached", "free")
        }

    def step(self, result: StepResult) -> None:
        self._step_time.observe(result.times.total * 1e-9)
        self._forward_time.observe(result.times.forward * 1e-9)

    def drafts(self, drafted: int, accepted: int) -> None:
        if drafted:
            self._drafted.add(drafted)
            self._accepted.add(accepted)
            self._acceptance.observe(accepted + 1)

    def ended(self, reason: str) -> None:
        self._metrics.counter("headrace_requests_ended_total", "Requests that ended, by reason.", labels=(("reason", reason),)).add()

    def refused(self, code: str) -> None:
        self._metrics.counter("headrace_requests_refused_total", "Requests refused, by cause.", labels=(("cause", code),)).add()

    def show(self, ledger: Ledger | None, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        if ledger:
            self._pages["free"].set(len(ledger.pool))
            self._pages["cached"].set(ledger.tree.idle)
            self._pages["used"].set(ledger.pool.total - ledger.available)


async def build(process: Process) -> Scheduler:
    """The scheduler of `process`, which needs nothing but its peers' names."""
    return Scheduler(process)


if __name__ == "__main__":
    main(ToScheduler | FromWorker, build)
