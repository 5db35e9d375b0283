"""The scheduler process: takes requests, writes the plans, hands out the tokens.

    Submit, Cancel ─▶ journal, queues ─▶ plan() ─▶ Plan ──▶ workers
    Tokens, Refused ◀─ outgoing ◀── mirror ledger ◀── StepResult ◀┘

It holds no tensor and imports no torch. All state of a step lies in the mirror ledger; all state of a request that must outlive a
worker lies in the journal. While nothing but decoding goes on, a step's successor is sent before its result is back, so that the workers
never wait for a plan; otherwise a new plan is written as soon as the result is there.

    plan k ──▶ ┌ step k ┐ plan k+1 ──▶ ┌ step k+1 ┐        without: the worker waits from each result to the next plan
                        └─▶ result k             └─▶ …     ahead:   plan k+1 is there already
"""

import heapq
import logging
import time
from bisect import insort
from dataclasses import replace

from headrace.engine.ledger.ledger import Ended, Ledger
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.lifecycle import Drain, Drained, PeerDied, Progress, Restart, Resume
from headrace.engine.messages.steps import Begin, FromWorker, Hello, Plan, StepResult, WorkerUp
from headrace.engine.messages.tokens import Cancel, Moved, Refused, SchedulerUp, Submit, TokenEnd, ToScheduler
from headrace.engine.messages.wire import Message
from headrace.engine.names import SUPERVISOR, tokenizer_names, worker_names
from headrace.engine.process import Process, Role
from headrace.engine.scheduler.admission import Admission, Load
from headrace.engine.scheduler.ahead import plan_ahead
from headrace.engine.scheduler.delivery import Delivery
from headrace.engine.scheduler.epoch import Divergence, Epoch
from headrace.engine.scheduler.journal import Entry, Journal
from headrace.engine.scheduler.meters import Meters
from headrace.engine.scheduler.outgoing import Outgoing
from headrace.engine.scheduler.pace import MOST as MOST_DRAFTS
from headrace.engine.scheduler.plan import plan
from headrace.engine.scheduler.queue import Queue
from headrace.engine.scheduler.ranks import Ranks
from headrace.engine.scheduler.speed import Speed
from headrace.engine.scheduler.step import Limits, Situation
from headrace.engine.scheduler.tenants import Tenants
from headrace.engine.scheduler.timeline import Timelines
from headrace.engine.scheduler.traces import Traces

log = logging.getLogger(__name__)

TICK_S = 0.002
"""By how much the event loop's timers may be early."""
NO_LOGITS = "the model gave no valid logits for this request (not a number, or nothing but minus infinity): other requests are not affected"
QUARANTINED = "a worker process died whenever it ran this request, so it is not run again: other requests are not affected"


def _arrival(sequence: Sequence) -> tuple[int, float]:
    """Who comes first among those that run: a lower priority number, then an earlier arrival, however often it was preempted."""
    return sequence.priority, sequence.arrived


class Scheduler:
    """The actor."""

    def __init__(self, process: Process) -> None:
        config = process.config
        self._process = process
        self._drafts = config.draft != "none"
        # Without a setting the workers say what suits them, once they are up.
        self._limits = Limits(config.max_running, config.max_step_tokens or 1, self._drafts)
        self._admission = Admission(config.max_waiting, config.max_waiting_tokens)
        self._ranks = Ranks(worker_names(config))
        self._tokenizers = frozenset(tokenizer_names(config))
        self._journal = Journal()
        self._last_epoch = process.incarnation << 20
        self._epoch: Epoch | None = None
        """None until every rank is up."""
        self._tenants = Tenants()
        self._running: list[Sequence] = []
        self._waiting = Queue(self._tenants)
        self._aborts: list[int] = []
        """Cancelled requests that the workers still hold."""
        self._speed = Speed(config.step_target)
        self._deadlines: list[tuple[float, int]] = []
        """Heap of (when, request); those of requests that are over by then say nothing."""
        self._outgoing = Outgoing(process)
        self._draining = self._drained = False
        self._last_step: float | None = None
        self._meters = Meters(process.metrics)
        self._delivery = Delivery(
            self._journal, self._tenants, self._speed, self._admission, self._meters, self._outgoing, self._tokenizers, self._drafts
        )
        self._timelines = Timelines(config.request_log)
        self._traces = Traces(process.model.name)
        process.progress = self.progress
        for name in self._ranks.names:
            process.send(name, Hello(process.incarnation))
        for name in tokenizer_names(config):
            process.send(name, SchedulerUp(process.incarnation))

    async def close(self) -> None:
        self._timelines.close()
        self._traces.close()

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
                # What waits for a tokenizer its successor may have: it tells by the request what is meant for it.
                if self._ranks.leave(message.name, message.incarnation):
                    self._process.post.forget(message.name)
                    self._implicate(message.by_itself)
                    self._leave_epoch()
            case Drain():
                self._draining, self._drained = True, False
            case Resume():
                self._draining = False

    def settle(self) -> None:
        epoch = self._epoch
        if epoch is not None:
            if epoch.in_flight is None and (self._running or self._waiting or self._aborts):
                self._start_step(epoch)
            if epoch.in_flight is not None and epoch.ahead is None and not self._aborts:
                self._look_ahead(epoch)
        self._outgoing.send_all()
        if self._draining and not self._drained and not len(self._journal):
            self._drained = self._process.send(SUPERVISOR, Drained(self._process.name))

    def progress(self) -> Progress:
        """The engine's pulse, and the gauges that go with it."""
        now = time.monotonic()
        # Cancelled requests run until the workers have been told.
        running = len(self._running) + len(self._aborts)
        epoch = self._epoch
        self._meters.show(epoch.ledger if epoch else None, running, self._queued)
        owed = epoch.owed_since if epoch else None
        return Progress(
            running=running,
            waiting=self._queued,
            workers_ready=self._ranks.ready,
            last_step_age_s=None if self._last_step is None else now - self._last_step,
            step=epoch.ledger.step if epoch else 0,
            owed_s=None if owed is None else now - owed,
        )

    # Requests

    @property
    def _queued(self) -> int:
        """Requests without pages; between epochs that is all of them."""
        return len(self._journal) - len(self._running)

    @property
    def _load(self) -> Load:
        prompts = self._journal.prompt_tokens
        return Load(len(self._journal), self._queued, self._waiting.prompt_tokens if self._epoch else prompts, prompts)

    def _submit(self, submit: Submit) -> None:
        """Queue a request, or refuse it with a reason."""
        if submit.reply_to not in self._tokenizers:
            # Nobody is there to be told anything.
            self._process.rejected_frames.add()
            return
        if known := self._journal.get(submit.request):
            if known.submit.tenant == submit.tenant:
                self._tell_again(known, submit)
            else:
                self._refuse(submit, 409, "id_in_use", "the request's id is another's: draw ids at random")
            return
        if self._draining:
            self._refuse(submit, 503, "draining", "the engine is draining and takes no new requests: try again in a moment", 5.0)
            return
        if not submit.emitted and (full := self._admission.full(len(submit.prompt), self._load, self._limits)):
            self._refuse(submit, 429, "overloaded", full.message, full.retry_after, full.hold_s)
            return
        entry = self._journal.open(submit, time.monotonic())
        self._tenants.arrive(submit.tenant)
        if submit.deadline is not None:
            self._watch_deadline(submit.deadline, submit.request)
        if self._epoch is not None:
            self._enqueue(entry, self._epoch.ledger)

    def _watch_deadline(self, deadline: float, request: int) -> None:
        heapq.heappush(self._deadlines, (deadline, request))
        self._process.later(max(0.0, deadline - time.monotonic()), self._expire)

    def _expire(self) -> None:
        """End every request whose time is up."""
        # A timer may be early by its clock's tick, and will not come again.
        due = time.monotonic() + TICK_S
        while self._deadlines and self._deadlines[0][0] <= due:
            deadline, request = heapq.heappop(self._deadlines)
            entry = self._journal.get(request)
            if entry is not None and entry.submit.deadline == deadline:
                got = f"after {entry.emitted_count} tokens" if entry.emitted_count else "before its first token"
                message = f"the request's time was up {got}: allow a longer timeout, or ask for less"
                self._fail(entry, 504, "timeout", message)
        self.settle()

    def _fail(self, entry: Entry, status: int, code: str, message: str) -> None:
        """End a request with an error."""
        self._close(entry.submit.request, code)
        self._tell_failure(entry, status, code, message)

    def _tell_failure(self, entry: Entry, status: int, code: str, message: str) -> None:
        """The last word on a request, after all of its tokens."""
        self._outgoing.send(entry.reply_to)
        self._process.send(entry.reply_to, Refused(entry.submit.request, status, code, message))

    def _tell_again(self, entry: Entry, submit: Submit) -> None:
        """A tokenizer asks for a request that is running: it has taken it over from one that died, and lacks what came since. That one's
        successor may have been asked for it too, by a frontend that had not heard of the death yet."""
        if submit.attempt < entry.attempt:
            if submit.reply_to != entry.reply_to:
                self._process.send(submit.reply_to, Moved(submit.request, entry.attempt))
            return
        if submit.reply_to != entry.reply_to:
            self._process.send(entry.reply_to, Moved(submit.request, submit.attempt))
        entry.attempt = submit.attempt
        entry.reply_to = submit.reply_to
        have = len(submit.emitted)
        self._outgoing.add(submit.reply_to, submit.request, have, entry.emitted[have:])
        outgoing = self._outgoing.to(submit.reply_to)
        outgoing.logprobs.extend(one for one in entry.logprobs if one.index >= have)
        outgoing.prompt_logprobs.extend(entry.prompt_logprobs)

    def _enqueue(self, entry: Entry, ledger: Ledger) -> None:
        submit = entry.submit
        if submit.request in ledger.sequences:
            # It was ended here and is submitted again, before the workers have heard of its end. Its second life begins after that.
            assert submit.request in self._aborts
            return
        most = len(submit.prompt) + (submit.sampling.max_tokens or 0)
        if ledger.pages_for(most) > ledger.pool.total:
            room = ledger.pool.total * ledger.page_size
            message = (
                f"prompt and max_tokens together are {most} tokens, the KV memory holds {room}: "
                "ask for fewer, or serve with more --kv-memory"
            )
            self._fail(entry, 400, "context_length_exceeded", message)
            return
        sequence = ledger.sequence_of(entry.admit())
        if entry.emitted and (reason := sequence.ends_with(entry.emitted[-1])):
            # It was submitted again by who lacks nothing but its end.
            self._cancel(submit.request, reason)
            return
        entry.sequence = sequence
        sequence.priority, sequence.tenant, sequence.arrived = submit.priority, submit.tenant, entry.arrived
        sequence.suspect = entry.suspect
        self._waiting.add(sequence)

    def _refuse(self, submit: Submit, status: int, code: str, message: str, retry_after: float | None = None, hold_s: float = 0.0) -> None:
        self._meters.refused(code)
        self._process.send(submit.reply_to, Refused(submit.request, status, code, message, retry_after, hold_s))

    def _cancel(self, request: int, reason: str) -> None:
        if entry := self._close(request, reason):
            self._tell_end(entry, entry.end(reason, time.monotonic()))

    def _close(self, request: int, why: str) -> Entry | None:
        """A request is over by no doing of the workers': take it out of everything. None when it is not known."""
        entry = self._forget(request, why)
        if entry is not None and entry.sequence is not None and self._epoch is not None:
            if request in self._epoch.ledger.sequences:
                self._aborts.append(request)
            self._running = [other for other in self._running if other.request != request]
            self._waiting.discard(request)
        return entry

    def _forget(self, request: int, why: str) -> Entry | None:
        entry = self._journal.close(request)
        if entry is not None:
            now = time.monotonic()
            self._tenants.leave(entry.submit.tenant, now)
            self._meters.ended(why)
            self._timelines.add(entry, why, now)
            self._traces.add(entry, why, now)
        return entry

    # Steps

    def _start_step(self, epoch: Epoch) -> None:
        """Write the next plan, apply it to the mirror and send it to every rank."""
        ledger = epoch.ledger
        decision = plan(self._situation(epoch))
        if not decision.run and not decision.preempt and not self._aborts:
            return
        message = Plan(
            epoch=epoch.number,
            step=ledger.step,
            digest=ledger.digest,
            abort=self._aborts,
            preempt=[sequence.request for sequence in decision.preempt],
            admit=[self._journal.must_have(one.request).admit() for one in decision.start if one.request not in ledger.sequences],
            run=[sequence.request for sequence, _ in decision.run],
            lengths=[length for _, length in decision.run],
            lookahead=decision.lookahead if any(decision.lookahead) else [],
        )
        self._aborts = []
        self._fly(epoch, message)
        for name in self._ranks.names:
            self._process.send(name, message)
        for request in message.abort:
            if (entry := self._journal.get(request)) and entry.sequence is None:
                self._enqueue(entry, ledger)
        if decision.preempt:
            self._preempted(decision.preempt)
        if decision.start:
            now = time.monotonic()
            for sequence in decision.start:
                self._waiting.discard(sequence.request)
                self._started(ledger.sequences[sequence.request], sequence, now)

    def _look_ahead(self, epoch: Epoch) -> None:
        """Send the plan after the one in flight, if its result cannot change it."""
        lookahead = plan_ahead(self._situation(epoch), epoch.rows)
        if lookahead is None:
            return
        epoch.ahead = Plan(epoch.number, epoch.ledger.step + 1, 0, [], [], [], [], [], ahead=True, lookahead=lookahead)
        for name in self._ranks.names:
            self._process.send(name, epoch.ahead)

    def _situation(self, epoch: Epoch) -> Situation:
        shared = self._tenants.shared(time.monotonic())
        return Situation(epoch.ledger, self._running, self._waiting, self._limits, self._speed, self._tenants, shared)

    def _fly(self, epoch: Epoch, message: Plan) -> None:
        epoch.fly(message)
        self._meters.step_tokens.observe(len(epoch.rows) if message.ahead else sum(message.lengths))

    def _started(self, sequence: Sequence, queued: Sequence, now: float) -> None:
        """A waiting request has its pages. The ledger's sequence takes over what the scheduler noted on the queued one."""
        entry = self._journal.must_have(sequence.request)
        entry.sequence = sequence
        sequence.priority, sequence.tenant, sequence.arrived = queued.priority, queued.tenant, queued.arrived
        sequence.suspect = entry.suspect
        if self._drafts:
            sequence.lookahead = entry.pace.lookahead
        entry.cached = max(entry.cached, min(sequence.cached, sequence.prompt))
        if entry.started is None:
            entry.started = now
            if entry.emitted_count:  # under a scheduler before this one
                entry.first_token = now
            self._meters.queue_time.observe(now - entry.arrived)
            self._meters.prompt_tokens.add(sequence.prompt)
            self._meters.cached_tokens.add(sequence.cached)
        insort(self._running, sequence, key=_arrival)

    def _preempted(self, victims: list[Sequence]) -> None:
        gone = {sequence.request for sequence in victims}
        self._running = [sequence for sequence in self._running if sequence.request not in gone]
        for sequence in victims:
            self._journal.must_have(sequence.request).preemptions += 1
            self._waiting.add(sequence)
        self._meters.preemptions.add(len(victims))

    def _take_result(self, result: StepResult) -> None:
        """Commit a step to the mirror and hand out what it emitted."""
        epoch = self._epoch
        if epoch is None or result.epoch != epoch.number or not 0 <= result.rank < len(self._ranks.names):
            return
        try:
            for step, ended, rows in epoch.land(result):
                self._last_step = now = time.monotonic()
                # Only where requests were cancelled may any of the rows' be over.
                self._delivery.take(step, rows, epoch.ledger, now, cancelled=bool(self._aborts))
                if ended:
                    self._end({end.sequence.request: end for end in ended}, now)
        except Divergence as divergence:
            self._diverged(str(divergence))

    def _end(self, ended: dict[int, Ended], now: float) -> None:
        """The last words on requests that a step has ended."""
        for request, end in ended.items():
            if self._journal.running(request) and (entry := self._forget(request, end.reason)):
                if end.reason == "error":
                    self._tell_failure(entry, 500, "invalid_logits", NO_LOGITS)
                else:
                    self._tell_end(entry, entry.end(end.reason, now))
        self._running = [sequence for sequence in self._running if sequence.request not in ended]
        self._admission.finishes.add(len(ended), now)

    def _tell_end(self, entry: Entry, end: TokenEnd) -> None:
        self._outgoing.to(entry.reply_to).ends.append(end)

    # Epochs

    def _begin_epoch(self) -> None:
        """All ranks are up: start with empty pages, and queue every live request with the tokens it has."""
        self._last_epoch += 1
        if self._process.config.max_step_tokens is None:
            self._limits = replace(self._limits, max_step_tokens=self._ranks.step_tokens)
        begin = Begin(
            self._last_epoch, self._ranks.pages, self._ranks.page_size, self._process.model.end_tokens, self._process.config.prefix_cache
        )
        for name in self._ranks.names:
            self._process.send(name, begin)
        self._epoch = Epoch(begin, len(self._ranks.names))
        self._outgoing.epoch = self._last_epoch
        for entry in self._journal.entries():
            self._enqueue(entry, self._epoch.ledger)

    def _leave_epoch(self) -> None:
        """A rank is gone: nothing of the mirror is true any more."""
        self._epoch = None
        self._running, self._aborts = [], []
        self._waiting.clear()
        for entry in self._journal.entries():
            entry.leave_ledger()

    def _implicate(self, crashed: bool) -> None:
        """A rank has died: what ran in its step may have been why."""
        if self._epoch is None or self._epoch.in_flight is None:
            return
        # The result of the step in flight may be lost with it, and the rank may have been in the step after that.
        lost = 2 * (1 + MOST_DRAFTS) if self._drafts else 2
        for row in self._epoch.rows:
            entry = self._journal.get(row.sequence.request)
            if entry is None:
                continue
            entry.worker_deaths += 1
            if entry.suspicion.implicate(crashed, entry.emitted_count, lost):
                log.error("request %016x is not run again: %d workers died while they ran it", row.sequence.request, entry.worker_deaths)
                self._meters.quarantines.add()
                self._fail(entry, 500, "quarantined", QUARANTINED)

    def _diverged(self, what: str) -> None:
        """The ranks' ledgers and the mirror disagree: no page table can be trusted, so the ranks start again."""
        log.error("%s: the workers are restarted", what)
        self._meters.divergences.add()
        self._leave_epoch()
        self._process.send(SUPERVISOR, Restart(tuple(self._ranks.names), what))


async def build(process: Process) -> Scheduler:
    """The scheduler of `process`, which needs nothing but its peers' names."""
    return Scheduler(process)


ROLE = Role(ToScheduler | FromWorker, build)
