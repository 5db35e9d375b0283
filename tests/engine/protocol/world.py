"""The control plane in one object: the real scheduler, two real workers with ledgers and paged memory, and their peers around them.

Whatever a test does to it goes through the methods here, each of which ends with a proof that what must hold still does:

    every ledger keeps its own invariants              ledgers that took the same steps have the same digest exactly if they are the same
    what a request has is what it is owed so far       a divergence is claimed only where there is one, and at its own step
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.ledger.ledger import Ended, Ledger, Row
from headrace.engine.messages.frontend import ToFrontend, ToTokenizer
from headrace.engine.messages.lifecycle import FromChild, Started, ToChild
from headrace.engine.messages.steps import Begin, FromWorker, Plan, StepResult, ToWorker
from headrace.engine.messages.tokens import FromScheduler, ToScheduler
from headrace.engine.process import EngineSpec
from headrace.engine.scheduler import epoch as epoch_module
from headrace.engine.scheduler import scheduler as scheduler_module
from headrace.engine.scheduler.scheduler import Scheduler
from headrace.workers import worker as worker_module
from headrace.workers.worker import Worker
from tests.engine.protocol.network import Channel, Died, Network, Surroundings
from tests.engine.protocol.oracle import END, Ask, PagedRunner, answer
from tests.engine.protocol.peers import FRONTEND, Asked, Frontend, Supervisor, Tokenizer

MODEL = ModelFiles("paged", "/nowhere", "gguf", "llama", context=256, vocab_size=16, end_tokens=(END,), bos_token=1, weight_bytes=0)
PAGE = 4
RANKS = ["worker-0", "worker-1"]
DESKS = ["tokenizer-0", "tokenizer-1"]
MOST_EVENTS = 20_000
"""Within which everything that was asked for must have ended, once nothing is disturbed any more."""


class World:
    def __init__(self, seed: int, pages: int = 12, ledger: type[Ledger] = Ledger, **settings) -> None:
        self.network = network = Network(seed)
        self.config = Config(tensor_parallel=len(RANKS), tokenizers=len(DESKS), **settings)
        self.ended: dict[int, tuple[Asked, str]] = {}
        """Requests that had their last word, and which."""
        self._flipped: dict[int, Ledger] = {}
        """The ledger that was tampered with, by epoch."""
        self._parted: list[int] = []
        """Steps in which a ledger that was tampered with became another, for which no restart was asked yet."""
        self.seen: Counter[str] = Counter()
        """What has happened, so that a test can tell that it has."""
        self.broken = False
        """Something was found that must not be."""
        self._next = 0
        self._parted_epochs: set[int] = set()
        self._states: dict[tuple[int, int, bool], tuple[int, int]] = {}
        """By epoch, step and whether its result is in: digest and state of the first ledger that came there."""
        self._stack = ExitStack()
        for module in (scheduler_module, epoch_module, worker_module):
            self._stack.enter_context(patch.object(module, "time", network.clock))
        watched = self._watched(ledger)
        for module in (epoch_module, worker_module):
            self._stack.enter_context(patch.object(module, "Ledger", watched))
        self.supervisor = Supervisor(network, RANKS)
        spec = EngineSpec(self.config, MODEL)

        def add(name: str, union: object, build: Callable[[Surroundings], object]) -> None:
            def born(process: Surroundings) -> object:
                actor = build(process)
                if process.name != "supervisor":
                    process.send("supervisor", Started(process.name, process.incarnation))
                return actor

            network.add(Surroundings(network, name, spec, union | ToChild, born))

        add("supervisor", FromChild | Died, lambda process: self.supervisor)
        network.processes["supervisor"].boot()
        add(FRONTEND, ToFrontend, lambda process: Frontend(process, network, self.ended))
        for name in DESKS:
            add(name, FromScheduler | ToTokenizer, lambda process: Tokenizer(process, network))
        add("scheduler", ToScheduler | FromWorker, Scheduler)
        for rank, name in enumerate(RANKS):
            add(name, ToWorker, lambda process, rank=rank: Worker(process, rank, PagedRunner(pages, PAGE)))
        for name in network.processes:
            if name != "supervisor":
                network.start(name)

    def close(self) -> None:
        self._stack.close()

    # What may happen

    def submit(self, ask: Ask, desk: str, timeout: float | None = None, tenant: str = "", priority: int = 0) -> None:
        self._submit(Asked(ask, desk, None if timeout is None else self.network.clock.now + timeout, tenant, priority, []))

    def _submit(self, asked: Asked) -> None:
        if frontend := self.frontend:
            self._next += 1
            frontend.generate(self.network.processes[FRONTEND].incarnation << 32 | self._next, asked)

    def abort(self, place: int) -> None:
        if (frontend := self.frontend) and frontend.live:
            frontend.abort(sorted(frontend.live)[place % len(frontend.live)])

    def deliver(self, choices: bytes) -> None:
        """A message for each choice, of the channel that it names, with the ones behind it where its high bits say so."""
        for choice in choices:
            if ready := self.network.ready():
                self._deliver(ready[choice % 32 % len(ready)], 1 + choice // 64)

    def deliver_fairly(self, count: int) -> None:
        """One message of each channel in turn."""
        while count > 0 and (ready := self.network.ready()):
            for channel in ready[:count]:
                if channel.frames and (channel.name == "kernel" or self.network.alive(channel.to)):
                    self._deliver(channel, 1)
            count -= len(ready)

    def pass_time(self, seconds: float) -> None:
        self.network.pass_time(seconds)

    def kill(self, name: str, by_itself: bool) -> None:
        """A process dies."""
        if not self.network.alive(name):
            return
        if name == FRONTEND:
            self._kill_frontend()
        else:
            self.network.kill(name, by_itself)

    def _kill_frontend(self) -> None:
        """Its successor asks for the same under new names, and goes on from what had been delivered."""
        lost = list(self.frontend.live.values()) if self.frontend else []
        for desk in DESKS:
            self.network.hang_up(FRONTEND, desk)
        self.network.kill(FRONTEND, by_itself=False)
        while not self.network.alive(FRONTEND):
            self.deliver_fairly(1)
        for asked in lost:
            self._submit(asked)

    def flip(self, rank: str, bit: int) -> None:
        """Something changes in the memory of a rank's ledger: another page is free next. Once an epoch, lest two go wrong alike."""
        ledger = self._ledger_of(rank)
        if ledger is not None and ledger.epoch not in self._flipped and len(ledger.pool) > 1:
            free = ledger.pool._free
            other = -2 - bit % (len(free) - 1)
            free[-1], free[other] = free[other], free[-1]
            self._flipped[ledger.epoch] = ledger

    # What must hold

    @property
    def frontend(self) -> Frontend | None:
        return self.network.processes[FRONTEND].actor

    @property
    def scheduler(self) -> Scheduler | None:
        return self.network.processes["scheduler"].actor

    def check(self) -> None:
        """Every ledger, and every request, at this moment."""
        self.broken = True
        for ledger in self._ledgers():
            ledger.check()
        if frontend := self.frontend:
            for asked in frontend.live.values():
                self._check_tokens(asked)
        for request in self.supervisor.restarts:
            step = int(request.why.partition(" in step ")[2].partition(",")[0] or -1)
            assert step in self._parted, f"ledgers parted in steps {self._parted}: {request.why}"
            self._parted.remove(step)
        self.supervisor.restarts.clear()
        self.broken = False

    def come_to_rest(self) -> None:
        """Nothing disturbs any more: everything ends, and nothing is left of it."""
        self._deliver_all()
        assert self.frontend is not None
        for request, asked in self.frontend.live.items():
            raise AssertionError(f"request {request & 0xFFFFFFFF} never ends; it has {len(asked.tokens)} of {len(answer(asked.ask)[0])}")
        for asked, why in self.ended.values():
            self._check_end(asked, why)
            self.seen[f"ended: {why}"] += 1
        self.seen["divergences"] += len(self._parted_epochs)
        self.seen.update({f"deaths: {name}": count for name, count in self.network.deaths.items()})
        # Deadlines of requests that are over are forgotten in their time.
        self.pass_time(1e6)
        self._deliver_all()
        scheduler = self.scheduler
        assert scheduler is not None and scheduler._epoch is not None
        tables = {
            "journal": scheduler._journal._entries,
            "queue": scheduler._waiting._all,
            "lines": scheduler._waiting._lines,
            "running": scheduler._running,
            "aborts": scheduler._aborts,
            "deadlines": scheduler._deadlines,
            "outgoing": scheduler._outgoing._messages,
            "tenants": scheduler._tenants._live,
            "digests": scheduler._epoch._digests,
            "early results": scheduler._epoch._early,
            "plans": [plan for plan in (scheduler._epoch.in_flight, scheduler._epoch.ahead) if plan],
        }
        tables |= {name: self.network.processes[name].actor.held for name in DESKS}
        assert not any(tables.values()), {name: table for name, table in tables.items() if table}
        assert scheduler._journal.prompt_tokens == scheduler._waiting.prompt_tokens == 0
        for ledger in self._ledgers():
            assert not ledger.sequences
            assert ledger.available == ledger.pool.total
        assert len({ledger.digest for ledger in self._ledgers()}) == 1

    def _check_tokens(self, asked: Asked) -> None:
        tokens, owed = asked.tokens, answer(asked.ask)[0]
        assert tuple(tokens) == owed[: len(tokens)], f"{asked.ask} has {tokens}, it was owed {owed}"

    def _check_end(self, asked: Asked, why: str) -> None:
        self._check_tokens(asked)
        owed, reason = answer(asked.ask)
        match why:
            case "stop" | "length":
                assert (len(asked.tokens), why) == (len(owed), reason), f"{asked.ask} ended as {why} with {asked.tokens} of {owed}"
            case "invalid_logits":
                # A tokenizer that takes over does not ask again for what an error makes worthless.
                whole = len(asked.tokens) == len(owed) or any(self.network.deaths[name] for name in DESKS)
                assert reason == "error" and whole, f"{asked.ask} failed with {asked.tokens}, {owed} and {reason} were due"
            case "timeout":
                assert asked.deadline is not None and self.network.clock.now >= asked.deadline - 0.01
            case "quarantined":
                assert sum(self.network.deaths[name] for name in RANKS) > 1
            case "overloaded":
                assert not asked.tokens
            case _:
                raise AssertionError(f"{asked.ask} ended as {why}")

    def _deliver_all(self) -> None:
        limit = self.network.events + MOST_EVENTS
        while self.network.ready():
            self.deliver_fairly(64)
            self.check()
            assert self.network.events < limit, "there is no end of messages"

    def _deliver(self, channel: Channel, burst: int) -> None:
        name = channel.to
        try:
            self.network.deliver(channel, burst)
        except Exception:
            # Only who was tampered with may fail, and then as a process does.
            if name not in RANKS or self._ledger_of(name) not in self._flipped.values():
                self.broken = True
                raise
            self.network.kill(name, by_itself=True)

    def _ledger_of(self, rank: str) -> Ledger | None:
        worker = self.network.processes[rank].actor
        return worker._ledger if worker else None

    def _ledgers(self) -> list[Ledger]:
        found = [self._ledger_of(rank) for rank in RANKS]
        if self.scheduler and self.scheduler._epoch:
            found.append(self.scheduler._epoch.ledger)
        return [ledger for ledger in found if ledger is not None]

    def _watched(self, ledger: type[Ledger]) -> type[Ledger]:
        """`ledger`, with every state that it comes to compared to that of the others."""
        world = self

        class Watched(ledger):
            def __init__(self, begin: Begin) -> None:
                super().__init__(begin)
                self.epoch = begin.epoch

            def apply(self, plan: Plan) -> list[Row]:
                rows = super().apply(plan)
                world.seen["plans ahead"] += plan.ahead
                world.seen["preemptions"] += len(plan.preempt)
                world.seen["aborts"] += len(plan.abort)
                world.seen["rows from the cache"] += sum(row.start == row.sequence.cached > 0 for row in rows)
                world._compare(self, True)
                return rows

            def commit(self, result: StepResult) -> list[Ended]:
                ended = super().commit(result)
                world.seen["rows of several tokens"] += sum(count > 1 for count in result.counts)
                world._compare(self, False)
                return ended

        return Watched

    def _compare(self, ledger: Ledger, computing: bool) -> None:
        place = ledger.epoch, ledger.step, computing
        state = ledger.digest, _state(ledger)
        known = self._states.setdefault(place, state)
        if known == state:
            return
        assert known[0] != state[0], f"one digest stands for two ledgers in step {ledger.step}"
        assert ledger.epoch in self._flipped, f"ledgers part in step {ledger.step}"
        if ledger.epoch not in self._parted_epochs:
            self._parted_epochs.add(ledger.epoch)
            self._parted.append(ledger.step)


def _state(ledger: Ledger) -> int:
    """Of everything that decides what a step reads and writes."""
    return hash(tuple((request, one.computed, *one.pages, -1, *one.tokens) for request, one in ledger.sequences.items()))
