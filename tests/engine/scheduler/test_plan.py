"""plan() on its own: thousands of random traces, without a process or a device."""

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.ledger.ledger import Ledger, Row
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.steps import Admit, Begin, Plan, StepResult, StepTimes
from headrace.engine.scheduler.ahead import plan_ahead
from headrace.engine.scheduler.plan import plan
from headrace.engine.scheduler.queue import Queue
from headrace.engine.scheduler.speed import Speed
from headrace.engine.scheduler.step import Decision, Limits, Situation
from headrace.engine.scheduler.tenants import Tenants

PAGE = 4
STEP_S, DECODE_S, TOKEN_S = 0.006, 0.0022, 0.0005
"""How long steps take on a machine that is as fast as some tests need to know: at all, and more for each decode or token of a chunk."""


class Trace:
    """A scheduler's queues and ledger, without its process: applies what plan() decides."""

    def __init__(self, pages: int, limits: Limits, prefix_cache: bool = True, lookahead: int = 0) -> None:
        self.ledger = Ledger(Begin(1, pages, PAGE, (), prefix_cache))
        self.limits = limits
        self.lookahead = lookahead
        self.tenants = Tenants()
        self.speed: Speed | None = None
        self.shared = False
        """Whether another tenant may come at any moment."""
        self.running: list[Sequence] = []
        self.waiting = Queue(self.tenants)
        self.admits: dict[int, Admit] = {}
        self.tenant_of: dict[int, str] = {}
        self.aborts: list[int] = []
        self.finished: dict[int, list[int]] = {}
        self.steps = 0
        self.ahead = 0
        """Steps whose successor was known before their result."""

    def submit(self, request: int, prompt: list[int], max_tokens: int, tenant: str = "", priority: int = 0, suspect: bool = False) -> None:
        admit = Admit(request, prompt, [], Sampling(max_tokens=max_tokens), request)
        self.admits[request] = admit
        sequence = self.ledger.sequence_of(admit)
        sequence.tenant, sequence.priority, sequence.suspect, sequence.arrived = tenant, priority, suspect, float(request)
        self.tenants.arrive(tenant)
        self.tenant_of[request] = tenant
        self.waiting.add(sequence)

    def abort(self, request: int) -> None:
        if request in self.ledger.sequences:
            self.aborts.append(request)
        self.running = [s for s in self.running if s.request != request]
        self.waiting.discard(request)
        self.leave(request)

    def leave(self, request: int) -> None:
        if self.admits.pop(request, None):
            self.tenants.leave(self.tenant_of[request], 0.0)

    def decide(self) -> Decision:
        return plan(self.situation())

    def situation(self) -> Situation:
        return Situation(self.ledger, self.running, self.waiting, self.limits, self.speed, self.tenants, self.shared)

    def step(self) -> Decision:
        ledger = self.ledger
        decision = self.decide()
        assert sum(length for _, length in decision.run) + sum(decision.lookahead) <= self.limits.max_step_tokens
        message = Plan(
            1,
            ledger.step,
            ledger.digest,
            self.aborts,
            [s.request for s in decision.preempt],
            [self.admits[s.request] for s in decision.start if s.request not in ledger.sequences],
            [s.request for s, _ in decision.run],
            [length for _, length in decision.run],
            lookahead=decision.lookahead,
        )
        self.aborts = []
        rows = ledger.apply(message)
        ledger.check()
        gone = {s.request for s in decision.preempt}
        self.running = [s for s in self.running if s.request not in gone]
        for queued in decision.start:
            self.waiting.discard(queued.request)
            sequence = ledger.sequences[queued.request]
            sequence.tenant, sequence.priority, sequence.arrived = queued.tenant, queued.priority, queued.arrived
            sequence.suspect, sequence.lookahead = queued.suspect, self.lookahead
            self.running.append(sequence)
        for victim in decision.preempt:
            self.waiting.add(victim)
        self.running.sort(key=lambda s: (s.priority, s.arrived))
        assert len(self.running) <= self.limits.max_running
        assert len(rows) == 1 or not any(row.sequence.suspect for row in rows)
        ahead = plan_ahead(self.situation(), rows)
        for row in rows:
            self.tenants.charge(row.sequence.tenant, row.length, 0)
        emitting = [row for row in rows if row.emits]
        # Of the drafts there was room for, as many prove right as it happens.
        counts = [1 + hash((row.sequence.request, self.steps)) % (row.lookahead + 1) for row in emitting]
        tokens = [
            hash((row.sequence.request, row.sequence.emitted + place)) % 3
            for row, count in zip(emitting, counts, strict=True)
            for place in range(count)
        ]
        times = StepTimes(0, 0, 0, 0)
        requests = [row.sequence.request for row in emitting]
        result = StepResult(1, ledger.step, 0, ledger.digest, requests, counts, tokens, [], [], times)
        ended = ledger.commit(result)
        if ahead is not None:
            self.ahead += 1
            if not ended:
                # What was sent before the result was known is what would be sent now.
                after = self.decide()
                assert not after.start and not after.preempt
                assert {(s.request, length) for s, length in after.run} == {(row.sequence.request, 1) for row in rows}
        for end in ended:
            sequence = end.sequence
            self.finished[sequence.request] = sequence.tokens[sequence.prompt :]
            self.running.remove(sequence)
            self.leave(sequence.request)
        for row in emitting:
            row.sequence.suspect = False
        ledger.check()
        if self.shared and self.speed is not None:
            chunks = [row for row in rows if row.start < row.sequence.prompt]
            seen = sum(row.start for row in rows) - sum(row.start for row in chunks)
            self.speed.observe(len(rows) - len(chunks), lambda: seen, [(row.length, row.start) for row in chunks], seconds_of(rows))
        self.steps += 1
        return decision


def seconds_of(rows: list[Row]) -> float:
    chunk = sum(row.length for row in rows if row.start < row.sequence.prompt)
    return STEP_S + DECODE_S * sum(row.start >= row.sequence.prompt for row in rows) + TOKEN_S * chunk


def flooded(running: int, prompt: int = 1) -> Trace:
    """Many requests of one tenant decode, while another may come."""
    trace = Trace(4096, Limits(256, 256))
    trace.speed, trace.shared = Speed(0.05), True
    for request in range(1, running + 1):
        trace.submit(request, [request] * prompt, 500, tenant="many")
    while trace.waiting or any(sequence.remaining > 1 for sequence in trace.running):
        trace.step()
    for _ in range(40):
        trace.step()
    return trace


def test_decodes_come_before_prefill_chunks_and_newcomers():
    trace = Trace(64, Limits(8, 8))
    trace.submit(1, [1, 2], 5)
    trace.step()
    trace.submit(2, [7] * 20, 5)
    decision = trace.step()
    assert [(s.request, n) for s, n in decision.run] == [(1, 1), (2, 7)]
    decision = trace.step()
    assert [(s.request, n) for s, n in decision.run] == [(1, 1), (2, 7)]


def test_decodes_never_take_the_whole_budget_from_a_waiting_prompt():
    trace = Trace(256, Limits(32, 8))
    for request in range(1, 9):
        trace.submit(request, [request], 50)
    while trace.waiting:
        trace.step()
    trace.submit(9, [5] * 10, 2)
    decision = trace.step()
    assert sum(length for s, length in decision.run if s.request == 9) == 2


def test_decodes_that_do_not_fit_the_budget_take_turns():
    trace = Trace(256, Limits(32, 4))
    for request in range(1, 9):
        trace.submit(request, [request], 6)
    while trace.waiting or trace.running:
        trace.step()
        assert trace.steps < 100
    assert all(len(tokens) == 6 for tokens in trace.finished.values())


def test_equal_prompts_that_arrive_together_are_computed_once():
    trace = Trace(256, Limits(32, 16))
    prompt = [hash(("shared", i)) % 50 for i in range(40)]
    for request in range(1, 9):
        trace.submit(request, [*prompt, request], 2)
    computed = 0
    while trace.waiting or trace.running:
        computed += sum(length for _, length in trace.step().run)
    # The shared forty once, then for each request its own tail and one decode.
    assert computed <= 40 + 8 * (1 + 1)


def test_when_pages_run_out_the_last_one_admitted_waits_and_still_ends_right():
    trace = Trace(6, Limits(8, 64))
    trace.submit(1, [1] * 6, 14)
    trace.submit(2, [2] * 6, 14)
    preempted = []
    while trace.waiting or trace.running:
        preempted += [s.request for s in trace.step().preempt]
        assert trace.steps < 200
    assert set(preempted) == {2}
    assert {request: len(tokens) for request, tokens in trace.finished.items()} == {1: 14, 2: 14}


def test_two_half_computed_prompts_that_fill_the_pages_do_not_block_each_other():
    trace = Trace(6, Limits(8, 4), prefix_cache=False)
    trace.submit(1, [1] * 18, 2)
    trace.submit(2, [2] * 18, 2)
    while trace.waiting or trace.running:
        trace.step()
        assert trace.steps < 100
    assert set(trace.finished) == {1, 2}


def test_a_prompt_that_fills_every_page_and_asks_for_no_token_is_served():
    trace = Trace(4, Limits(8, 64))
    trace.submit(1, [3] * 16, 0)
    while trace.waiting or trace.running:
        trace.step()
        assert trace.steps < 10
    assert trace.finished == {1: []}


def test_drafts_share_what_the_decodes_leave_of_their_part_of_the_budget():
    trace = Trace(256, Limits(32, 16), lookahead=8)
    for request in range(1, 4):
        trace.submit(request, [request], 100)
    trace.step()
    assert trace.step().lookahead == [4, 4, 4], "16 tokens for 3 requests"
    trace.submit(9, [5] * 40, 2)
    decision = trace.step()
    assert decision.lookahead == [3, 3, 3, 0], "a quarter of the 16 is the newcomer's"


def test_no_more_is_drafted_than_a_request_may_still_emit():
    trace = Trace(256, Limits(32, 64), lookahead=8)
    trace.submit(1, [1], 5)
    drafted = []
    while trace.waiting or trace.running:
        left = 5 - (trace.running[0].emitted if trace.running else 0)
        drafted.append((left, trace.step().lookahead))
    assert all(lookahead[0] < left for left, lookahead in drafted)
    assert len(trace.finished[1]) == 5


def test_a_request_goes_on_without_drafts_where_their_pages_would_cost_another_its_own():
    trace = Trace(4, Limits(8, 64), prefix_cache=False, lookahead=8)
    trace.submit(1, [1] * 7, 8)
    trace.submit(2, [2] * 7, 1)
    while trace.waiting or trace.running:
        decision = trace.step()
        assert not decision.preempt
        assert trace.steps < 40
    assert {request: len(tokens) for request, tokens in trace.finished.items()} == {1: 8, 2: 1}


def test_suspects_run_alone_until_they_are_cleared():
    trace = Trace(256, Limits(32, 64))
    for request in range(1, 5):
        trace.submit(request, [request] * 3, 4, suspect=request < 4)
    alone = [{s.request for s, _ in trace.step().run} for _ in range(3)]
    assert alone == [{1}, {2}, {3}]
    assert {s.request for s, _ in trace.step().run} == {1, 2, 3, 4}, "all are cleared"


def test_tenants_with_many_requests_and_with_few_are_served_alike():
    trace = Trace(1024, Limits(64, 32))
    for request in range(1, 41):
        trace.submit(request, [request] * 20, 4, tenant="many")
    for _ in range(4):
        trace.step()
    trace.submit(50, [50] * 20, 4, tenant="few")
    started = 0
    while 50 not in {sequence.request for sequence in trace.running}:
        started += len(trace.step().start)
    assert started <= 3, "it need not wait for the queue of the others"


def test_a_tenant_with_more_than_its_share_of_the_places_gives_one_up():
    trace = Trace(1024, Limits(4, 32))
    for request in range(1, 9):
        trace.submit(request, [request] * 4, 100, tenant="many")
    for _ in range(4):
        trace.step()
    trace.submit(50, [50] * 4, 100, tenant="few")
    trace.submit(51, [51] * 4, 100, tenant="few")
    trace.submit(52, [52] * 4, 100, tenant="few")
    gone = [sequence.request for _ in range(30) for sequence in trace.step().preempt]
    assert gone == [4, 3], "the latest of those with too many, and no more than the share"
    assert sorted(sequence.tenant for sequence in trace.running) == ["few", "few", "many", "many"]


def test_cached_pages_of_one_who_has_to_go_are_not_counted_twice_when_a_newcomer_starts_from_them():
    trace = Trace(6, Limits(4, 64))
    trace.submit(1, [1] * 4, 50, tenant="many")
    trace.submit(2, [2] * 8, 50, tenant="many")
    trace.step()
    trace.step()
    trace.submit(3, [3] * 7, 4, tenant="few")
    trace.submit(4, [2] * 4 + [9] * 7, 4, tenant="few")
    decision = trace.step()
    assert [sequence.request for sequence in decision.preempt] == [2]
    assert [sequence.request for sequence in decision.start] == [3]


def test_a_prompt_of_a_tenant_that_got_less_takes_most_of_the_budget():
    trace = Trace(1024, Limits(64, 16))
    for request in range(1, 15):
        trace.submit(request, [request], 200, tenant="many")
    while trace.waiting:
        trace.step()
    for _ in range(5):
        trace.step()
    trace.submit(50, [50] * 60, 4, tenant="few")
    first = {sequence.request: length for sequence, length in trace.step().run}
    assert first.pop(50) == 12
    assert len(first) == 4


def test_a_queue_without_a_place_does_not_keep_the_next_plan_from_being_known():
    trace = Trace(256, Limits(2, 16))
    for request in range(1, 5):
        trace.submit(request, [request], 10)
    while trace.running or trace.waiting:
        trace.step()
    assert trace.steps == 20
    assert trace.ahead == 18, "but not before the ends, when the next two start, and when nobody is left"


def test_a_waiting_tenant_that_may_be_given_a_place_keeps_the_next_plan_open():
    trace = Trace(256, Limits(2, 16))
    for request in range(1, 4):
        trace.submit(request, [request], 10, tenant="many")
    trace.step()
    trace.step()
    trace.submit(50, [50], 10, tenant="few")
    ahead = trace.ahead
    started = [sequence.request for _ in range(2) for sequence in trace.step().start]
    assert started == [50]
    assert trace.ahead == ahead


def test_chunks_beside_decodes_are_as_long_as_the_measured_pause_allows():
    trace = Trace(1024, Limits(64, 256))
    trace.speed = Speed(0.05)
    trace.submit(1, [1] * 100, 100)
    assert dict(trace.step().run).popitem()[1] == 100, "nobody decodes"
    trace.speed.observe(0, lambda: 0, [(100, 0)], 0.1)  # a millisecond a token
    for _ in range(3):
        trace.step()
        trace.speed.observe(1, lambda: 100, [], 0.01)
    trace.submit(2, [2] * 200, 4)
    assert [length for _, length in trace.step().run] == [1, 40], "0.01 s for the decode, 0.04 s for the chunk"
    trace.speed.observe(1, lambda: 100, [(40, 0)], 0.09)  # slower than it was thought
    assert [length for _, length in trace.step().run][1] < 40


def test_where_tenants_share_the_engine_steps_are_short_and_decodes_take_turns():
    trace = flooded(200)
    ran = [[sequence.request for sequence, _ in trace.step().run] for _ in range(15)]
    assert all(14 <= len(step) <= 17 for step in ran), "what four fifths of 0.05 s allow"
    assert {request for step in ran for request in step} == set(range(1, 201)), "each has its turn"
    trace.shared = False
    assert len(trace.step().run) == 200, "nobody else is there to profit"


def test_a_newcomer_finds_a_step_of_its_own_where_another_tenant_decodes_much():
    trace = flooded(200)
    trace.submit(500, [5] * 110, 8, tenant="few")
    first = {sequence.request: length for sequence, length in trace.step().run}
    assert first.pop(500) == 110, "in a step that takes longer than others for it"
    assert len(first) <= 5
    for _ in range(7):
        run = [sequence.request for sequence, _ in trace.step().run]
        assert 500 in run, "it has its turn in each step, being its tenant's only one"
        assert len(run) >= 12
    assert len(trace.finished[500]) == 8


def test_prompts_that_have_begun_make_way_for_one_of_a_tenant_that_got_less():
    trace = flooded(30)
    trace.submit(400, [4] * 300, 8, tenant="many")
    trace.step()
    trace.submit(500, [5] * 40, 8, tenant="few")
    trace.tenants.charge("many", 0, 20)
    run = {sequence.request: length for sequence, length in trace.step().run}
    assert run.pop(500) == 40
    assert 400 not in run
    while 400 not in trace.finished:
        trace.step()
        assert trace.steps < 400


def test_who_waits_for_a_place_takes_none_of_the_step_from_those_who_have_one():
    trace = Trace(4096, Limits(8, 16))
    for request in range(1, 5):
        trace.submit(request, [request], 100, tenant="many")
        trace.submit(request + 10, [request], 100, tenant="few")
    for _ in range(4):
        trace.step()
    trace.tenants.charge("many", 0, 1000)
    trace.submit(50, [5] * 9, 8, tenant="few")
    assert [length for _, length in trace.step().run] == [1] * 8


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_trace_ends_with_every_request_served_and_every_page_free(data):
    pages = data.draw(st.integers(8, 40), label="pages")
    limits = Limits(data.draw(st.integers(1, 8), label="running"), data.draw(st.integers(4, 40), label="budget"))
    trace = Trace(
        pages, limits, data.draw(st.booleans(), label="prefix cache"), data.draw(st.sampled_from([0, 0, 2, 5]), label="lookahead")
    )
    if data.draw(st.booleans(), label="shared"):
        trace.speed, trace.shared = Speed(data.draw(st.sampled_from([0.0, 0.01, 0.03]), label="target")), True
    submitted: dict[int, int] = {}
    aborted = set()
    for request in range(1, data.draw(st.integers(1, 14), label="requests") + 1):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=18), label="prompt")
        most = data.draw(st.integers(0, min(12, pages * PAGE - len(prompt))), label="max_tokens")
        tenant, suspect = data.draw(st.sampled_from(["", "", "a", "b"]), label="tenant"), data.draw(st.booleans(), label="suspect")
        trace.submit(request, prompt, most, tenant, data.draw(st.integers(0, 1), label="priority"), suspect)
        submitted[request] = most
        for _ in range(data.draw(st.integers(0, 3), label="steps between")):
            trace.step()
        if data.draw(st.integers(0, 5)) == 0:
            victim = data.draw(st.sampled_from(sorted(submitted)))
            if victim not in trace.finished:
                trace.abort(victim)
                aborted.add(victim)
    idle = 0
    while trace.waiting or trace.running or trace.aborts:
        decision = trace.step()
        idle = 0 if decision.run else idle + 1
        assert idle < 3, "steps that compute nothing must not repeat while work is pending"
        assert trace.steps < 2000
    assert set(trace.finished) | aborted == set(submitted)
    for request, tokens in trace.finished.items():
        assert tokens == [hash((request, index)) % 3 for index in range(submitted[request])]
    assert trace.ledger.available == pages
    assert not trace.ledger.sequences
