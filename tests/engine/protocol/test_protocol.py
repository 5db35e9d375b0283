"""A model check of the two-plan protocol: whatever happens in whatever order, every request ends once with the tokens it is owed.

Hypothesis plays fate for a `World`: it says what is asked for, which message comes next, who dies when and whose memory fails. That the
check can fail is shown by planting faults, each of which it must find.
"""

import logging
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from headrace.engine.ledger.ledger import Ledger, LedgerError, Row
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.sampling import Sampling
from headrace.engine.scheduler.ranks import Ranks
from headrace.engine.scheduler.scheduler import Scheduler
from headrace.workers.worker import Worker
from tests.engine.protocol.oracle import STOP, Ask
from tests.engine.protocol.peers import FRONTEND
from tests.engine.protocol.world import DESKS, RANKS, World

SHORT = settings(
    max_examples=240,
    stateful_step_count=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)
LONG = settings(SHORT, max_examples=5000, derandomize=False)
HUNT = settings(SHORT, max_examples=2000, phases=[Phase.generate], report_multiple_bugs=False)
"""To find a fault, whose smallest example nobody needs."""

ASKS = st.builds(
    Ask,
    # Two words and few lengths, so that many prompts begin alike.
    prompt=st.lists(st.integers(3, 4), min_size=1, max_size=14).map(tuple),
    seed=st.integers(0, 40),
    sampling=st.builds(
        Sampling,
        max_tokens=st.integers(0, 14),
        min_tokens=st.sampled_from([0, 0, 3]),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (STOP,)]),
    ),
)


class Protocol(RuleBasedStateMachine):
    """Rules are what may happen; after each, everything that must hold is proved."""

    ledger: type[Ledger] = Ledger
    steps = 0
    """Rules that were run, over all examples."""
    seen: Counter[str] = Counter()
    """What happened, over all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    @initialize(
        seed=st.integers(0, 2**32),
        pages=st.sampled_from([7, 10, 16]),
        draft=st.sampled_from(["none", "ngram"]),
        prefix_cache=st.booleans(),
        max_running=st.integers(1, 6),
        max_step_tokens=st.sampled_from([5, 16, 64]),
    )
    def begin(self, seed, pages, **config):
        self.world = World(seed, pages, self.ledger, **config)
        self.world.deliver_fairly(40)

    @rule(
        ask=ASKS,
        desk=st.sampled_from(DESKS),
        timeout=st.sampled_from([None, None, None, 0.5, 3.0]),
        tenant=st.sampled_from(["", "a"]),
        priority=st.integers(0, 1),
    )
    def somebody_asks(self, ask, desk, timeout, tenant, priority):
        self.world.submit(ask, desk, timeout, tenant, priority)

    @rule(choices=st.binary(min_size=1, max_size=24))
    def messages_come_in_any_order(self, choices):
        self.world.deliver(choices)

    @rule(count=st.integers(1, 60))
    def messages_come_in_turn(self, count):
        self.world.deliver_fairly(count)

    @rule(place=st.integers(0, 7))
    def somebody_gives_up(self, place):
        self.world.abort(place)

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def time_passes(self, seconds):
        self.world.pass_time(seconds)

    @rule(name=st.sampled_from([*RANKS, "scheduler", *DESKS, FRONTEND]), by_itself=st.booleans())
    def a_process_dies(self, name, by_itself):
        self.world.kill(name, by_itself)

    @rule(rank=st.sampled_from(RANKS), bit=st.integers(0, 7))
    def memory_fails(self, rank, bit):
        self.world.flip(rank, bit)

    @invariant()
    def everything_holds(self):
        if self.world is not None:
            type(self).steps += 1
            self.world.check()

    def teardown(self):
        if self.world is not None:
            try:
                if not self.world.broken:
                    self.world.come_to_rest()
                    self.seen.update(self.world.seen)
            finally:
                self.world.close()


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Divergences are logged; here there are thousands."""
    caplog.set_level(logging.CRITICAL)


def check(machine: type[Protocol], chosen: settings) -> None:
    machine.steps = 0
    machine.seen.clear()
    run_state_machine_as_test(machine, settings=chosen)


def test_every_request_ends_once_with_its_tokens_whatever_happens():
    check(Protocol, SHORT)
    print(f"{Protocol.steps} steps:", *(f"{count} {what}" for what, count in sorted(Protocol.seen.items())), sep="\n")
    assert Protocol.steps >= 10_000
    kinds = ("plans ahead", "preemptions", "aborts", "rows from the cache", "rows of several tokens", "divergences")
    assert all(Protocol.seen[kind] > 20 for kind in kinds)
    assert {"stop", "length", "invalid_logits", "timeout"} <= {what.removeprefix("ended: ") for what in Protocol.seen}


@pytest.mark.slow
def test_every_request_ends_once_with_its_tokens_whatever_happens_for_a_long_time():
    check(Protocol, LONG)
    print(f"{Protocol.steps} steps")
    assert Protocol.steps >= 200_000


# Faults that must be found


class LosesPages(Ledger):
    """Does not give back the last page of a request that ends."""

    def release(self, request: int) -> None:
        sequence = self.sequences.get(request)
        if sequence and len(sequence.pages) > len(sequence.nodes):
            sequence.pages.pop()
        super().release(request)


class SkipsPages(Ledger):
    """Its digest knows nothing of the pages that were taken."""

    def _grow(self, sequence: Sequence, length: int, lookahead: int) -> Row:
        known = len(self._events)
        row = super()._grow(sequence, length, lookahead)
        del self._events[known:]
        return row


@pytest.mark.parametrize("ledger", [LosesPages, SkipsPages])
def test_a_ledger_with_a_fault_is_found_out(ledger):
    machine = type("Faulty", (Protocol,), {"ledger": ledger})
    with pytest.raises(AssertionError):
        check(machine, HUNT)


def results_count_twice(monkeypatch):
    take = Scheduler._take_result

    def twice(self, result):
        take(self, result)
        take(self, result)

    monkeypatch.setattr(Scheduler, "_take_result", twice)


def old_epochs_are_not_told_apart(monkeypatch):
    step = Worker._step

    def any_epoch(self, plan):
        self._epoch = plan.epoch
        step(self, plan)

    monkeypatch.setattr(Worker, "_step", any_epoch)


def old_deaths_are_taken_for_new_ones(monkeypatch):
    leave = Ranks.leave

    def any_incarnation(self, name, incarnation):
        return leave(self, name, max(incarnation, *self._newest))

    monkeypatch.setattr(Ranks, "leave", any_incarnation)


FAULTS = [
    results_count_twice,
    old_deaths_are_taken_for_new_ones,
    pytest.param(old_epochs_are_not_told_apart, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_protocol_is_found_out(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises((AssertionError, LedgerError)):
        check(Protocol, HUNT)
