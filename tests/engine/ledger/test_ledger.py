"""The KV ledger against random traces: every invariant after every operation, and two ledgers that never part."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.ledger.ledger import Ledger, LedgerError
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.steps import Admit, Begin, Plan, StepResult, StepTimes

PAGE = 4
END = 99


def begin(pages: int = 32, prefix_cache: bool = True) -> Begin:
    return Begin(1, pages, PAGE, (END,), prefix_cache)


def admit(request: int, prompt: list[int], max_tokens: int = 8, **sampling) -> Admit:
    return Admit(request, prompt, [], Sampling(max_tokens=max_tokens, **sampling), seed=request)


def plan_of(ledger: Ledger, run: dict[int, int], admits=(), abort=(), preempt=(), lookahead=()) -> Plan:
    lists = [list(one) for one in (abort, preempt, admits, run, run.values())]
    return Plan(1, ledger.step, ledger.digest, *lists, lookahead=list(lookahead))


def step(ledger: Ledger, run: dict[int, int], admits=(), abort=(), preempt=(), token=lambda request, index: 5):
    """Apply one plan and commit a result in which every row that emits gets `token(request, index)`."""
    rows = ledger.apply(plan_of(ledger, run, admits, abort, preempt))
    ledger.check()
    emitting = [row.sequence for row in rows if row.emits]
    tokens = [token(sequence.request, sequence.emitted) for sequence in emitting]
    result = StepResult(
        1, ledger.step, 0, ledger.digest, [s.request for s in emitting], [1] * len(emitting), tokens, [], [], StepTimes(0, 0, 0, 0)
    )
    ended = ledger.commit(result)
    ledger.check()
    return rows, ended


def test_a_request_ends_by_length_and_leaves_only_cached_pages():
    ledger = Ledger(begin())
    step(ledger, {1: 10}, [admit(1, list(range(10)), max_tokens=3)])
    step(ledger, {1: 1})
    _, ended = step(ledger, {1: 1})
    assert [(end.sequence.request, end.reason) for end in ended] == [(1, "length")]
    assert ledger.sequences == {}
    assert ledger.available == 32
    assert ledger.tree.size == 3, "twelve computed tokens are three full pages"


def test_an_end_token_ends_the_request_unless_it_is_ignored():
    for ignore, expected in ((False, ["stop"]), (True, [])):
        ledger = Ledger(begin())
        _, ended = step(ledger, {1: 3}, [admit(1, [1, 2, 3], ignore_eos=ignore)], token=lambda *_: END)
        assert [end.reason for end in ended] == expected


def test_a_stop_token_id_ends_the_request():
    ledger = Ledger(begin())
    _, ended = step(ledger, {1: 3}, [admit(1, [1, 2, 3], stop_token_ids=(5,))])
    assert [end.reason for end in ended] == ["stop"]


def test_a_request_for_no_tokens_ends_when_its_prompt_is_computed():
    ledger = Ledger(begin())
    _, ended = step(ledger, {1: 4}, [admit(1, list(range(6)), max_tokens=0)])
    assert not ended
    _, ended = step(ledger, {1: 2})
    assert [end.reason for end in ended] == ["length"]


def test_a_second_request_starts_from_the_pages_of_the_first():
    ledger = Ledger(begin())
    prompt = list(range(10))
    step(ledger, {1: 10}, [admit(1, prompt)])
    rows, _ = step(ledger, {2: 2, 1: 1}, [admit(2, prompt)])
    assert rows[0].start == 8
    assert ledger.sequences[2].pages[:2] == ledger.sequences[1].pages[:2]


def test_the_last_token_of_a_prompt_is_always_computed():
    ledger = Ledger(begin())
    prompt = list(range(8))
    step(ledger, {1: 8}, [admit(1, prompt)])
    rows, _ = step(ledger, {2: 4}, [admit(2, prompt)])
    assert (rows[0].start, rows[0].length) == (4, 4)


def test_a_prompt_whose_tokens_are_scored_takes_nothing_from_the_cache():
    ledger = Ledger(begin())
    prompt = list(range(10))
    step(ledger, {1: 10}, [admit(1, prompt)])
    rows, _ = step(ledger, {2: 10}, [admit(2, prompt, prompt_logprobs=1)])
    assert rows[0].start == 0


def test_equal_pages_computed_at_once_become_one():
    ledger = Ledger(begin())
    prompt = list(range(9))
    step(ledger, {1: 9, 2: 9}, [admit(1, prompt), admit(2, prompt)])
    assert ledger.sequences[1].pages[:2] == ledger.sequences[2].pages[:2]
    assert ledger.tree.size == 2


def test_the_least_recently_used_prefix_is_evicted_first():
    ledger = Ledger(begin(pages=4))
    old, new = [1] * 5, [2] * 5
    step(ledger, {1: 5}, [admit(1, old, max_tokens=1)])
    step(ledger, {2: 5}, [admit(2, new, max_tokens=1)])
    step(ledger, {3: 1}, [admit(3, old, max_tokens=1)])  # uses the first again
    step(ledger, {4: 9}, [admit(4, [3] * 9, max_tokens=1)])
    assert [key[0] for key in ledger.tree.root.children] == [1, 3]


def test_a_page_is_evicted_only_when_nothing_else_is_free():
    ledger = Ledger(begin(pages=4))
    step(ledger, {1: 5}, [admit(1, [1] * 5, max_tokens=1)])
    step(ledger, {2: 5}, [admit(2, [2] * 5, max_tokens=1)])
    assert ledger.tree.size == 2
    step(ledger, {3: 12}, [admit(3, [3] * 12, max_tokens=1)])
    assert [key[0] for key in ledger.tree.root.children] == [2, 3], "the prefix used first went first"


def test_without_a_prefix_cache_nothing_is_kept():
    ledger = Ledger(begin(prefix_cache=False))
    step(ledger, {1: 9}, [admit(1, list(range(9)), max_tokens=1)])
    assert len(ledger.pool) == 32


def verify(ledger: Ledger, tokens: list[int], lookahead: int, request: int = 1):
    """A step in which `tokens` are emitted, all but the last of which were drafted."""
    (row,) = ledger.apply(plan_of(ledger, {request: 1}, lookahead=[lookahead]))
    ledger.check()
    times = StepTimes(0, 0, 0, 0)
    ended = ledger.commit(StepResult(1, ledger.step, 0, ledger.digest, [request], [len(tokens)], tokens, [], [], times))
    ledger.check()
    return row, ended


def test_right_drafts_count_as_computed_and_wrong_ones_leave_no_trace():
    ledger = Ledger(begin())
    step(ledger, {1: 6}, [admit(1, list(range(6)), max_tokens=20)])
    sequence = ledger.sequences[1]
    row, _ = verify(ledger, [10, 11, 12], lookahead=4)
    assert (row.start, row.length, row.lookahead) == (6, 1, 4)
    assert sequence.tokens == [*range(6), 5, 10, 11, 12]
    assert sequence.computed == 9, "the last token is yet to be computed"
    assert [len(sequence.pages), len(sequence.nodes)] == [3, 2], "positions 6 to 10 had pages, two pages are full"
    verify(ledger, [13], lookahead=4)
    assert sequence.computed == 10


def test_what_was_drafted_behind_an_end_token_is_not_emitted():
    ledger = Ledger(begin())
    step(ledger, {1: 3}, [admit(1, [1, 2, 3], max_tokens=20)])
    _, ended = verify(ledger, [7, END, 8], lookahead=4)
    assert [(end.sequence.tokens[3:], end.reason) for end in ended] == [([5, 7, END], "stop")]
    assert ledger.available == 32


def test_a_row_has_room_for_no_more_drafts_than_its_request_may_still_emit():
    ledger = Ledger(begin())
    step(ledger, {1: 3}, [admit(1, [1, 2, 3], max_tokens=4)])
    row, ended = verify(ledger, [6, 7, 8], lookahead=9)
    assert row.lookahead == 2
    assert [end.reason for end in ended] == ["length"]


def test_more_tokens_than_there_was_room_for_are_refused():
    ledger = Ledger(begin())
    step(ledger, {1: 3}, [admit(1, [1, 2, 3])])
    with pytest.raises(LedgerError, match="3 tokens of 1, which had room for 2"):
        verify(ledger, [6, 7, 8], lookahead=1)


def test_release_is_idempotent():
    ledger = Ledger(begin())
    step(ledger, {1: 9}, [admit(1, list(range(9)))])
    ledger.release(1)
    ledger.release(1)
    ledger.check()
    assert ledger.available == 32


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan: {"step": plan.step + 1},
        lambda plan: {"digest": plan.digest ^ 1},
        lambda plan: {"run": [77], "lengths": [1]},
        lambda plan: {"lengths": [999]},
    ],
)
def test_a_plan_that_does_not_fit_is_refused(spoil):
    ledger = Ledger(begin())
    step(ledger, {1: 3}, [admit(1, [1, 2, 3])])
    plan = plan_of(ledger, {1: 1})
    fields = {name: getattr(plan, name) for name in plan.__struct_fields__} | spoil(plan)
    with pytest.raises(LedgerError):
        ledger.apply(Plan(**fields))


def test_a_ledger_that_has_computed_less_or_would_take_another_page_has_another_digest_after_its_next_step():
    def flip_progress(ledger: Ledger) -> None:
        ledger.sequences[1].computed ^= 1

    def flip_free_page(ledger: Ledger) -> None:
        ledger.pool._free[-1] ^= 1

    for flip in (flip_progress, flip_free_page):
        ledger, twin = Ledger(begin()), Ledger(begin())
        for one in (ledger, twin):
            step(one, {1: 7}, [admit(1, list(range(8)))])
        flip(twin)
        plan = plan_of(ledger, {1: 1}, lookahead=[2])
        ledger.apply(plan)
        twin.apply(plan)
        assert twin.digest != ledger.digest


@settings(max_examples=300, deadline=None)
@given(data=st.data(), pages=st.integers(6, 40), prefix_cache=st.booleans())
def test_any_trace_keeps_every_invariant_and_two_ledgers_alike(data, pages, prefix_cache):
    ledger, twin = Ledger(begin(pages, prefix_cache)), Ledger(begin(pages, prefix_cache))
    known: set[int] = set()
    next_request = 1
    for _ in range(data.draw(st.integers(1, 25), label="steps")):
        abort = [request for request in sorted(known) if data.draw(st.integers(0, 9)) == 0]
        alive = sorted(known - set(abort))
        preempt = [r for r in alive if ledger.sequences[r].pages and data.draw(st.integers(0, 7)) == 0]
        admits = []
        if data.draw(st.booleans()):
            # Few different tokens and lengths, so that prefixes are often shared.
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=14), label="prompt")
            admits.append(admit(next_request, prompt, max_tokens=data.draw(st.integers(0, 6))))
            next_request += 1
        # Only what surely fits is run: the plan's own care is tested with plan().
        budget = len(ledger.pool) if ledger.tree.idle == 0 else 0
        budget = max(budget, ledger.available - sum(len(ledger.sequences[r].pages) for r in alive))
        run: dict[int, int] = {}
        for request in alive:
            sequence = ledger.sequences[request]
            if request in preempt or not sequence.pages or not data.draw(st.booleans()):
                continue
            length = data.draw(st.integers(1, sequence.remaining))
            need = ledger.pages_for(sequence.computed + length) - len(sequence.pages)
            if need <= budget:
                budget -= need
                run[request] = length
        for one in admits:
            tokens = len(one.prompt)
            path = ledger.match_path(ledger.sequence_of(one))
            need = ledger.pages_for(tokens)
            if need <= budget and not abort and not preempt:
                budget -= need
                run[one.request] = data.draw(st.integers(1, tokens - len(path) * PAGE))
        lookahead = []
        for request in run:
            sequence = ledger.sequences.get(request)
            # Drafts of at most a page, if there is one to spare.
            most = PAGE if sequence is not None and run[request] == sequence.remaining and budget > 0 else 0
            budget -= most > 0
            lookahead.append(data.draw(st.integers(0, most), label="lookahead"))
        plan = plan_of(ledger, run, admits, abort, preempt, lookahead)
        rows = ledger.apply(plan)
        twin.apply(plan)
        ledger.check()
        assert twin.digest == ledger.digest
        emitting = [row for row in rows if row.emits]
        counts = [data.draw(st.integers(0, 1 + row.lookahead), label="count") for row in emitting]
        tokens = [data.draw(st.sampled_from([0, 1, 2, END])) for _ in range(sum(counts))]
        requests = [row.sequence.request for row in emitting]
        result = StepResult(1, ledger.step, 0, ledger.digest, requests, counts, tokens, [], [], StepTimes(0, 0, 0, 0))
        ledger.commit(result)
        twin.commit(result)
        ledger.check()
        twin.check()
        assert twin.digest == ledger.digest
        known = set(ledger.sequences)
    for request in list(known):
        ledger.release(request)
    ledger.check()
    assert ledger.available == pages


def ahead(ledger: Ledger, lookahead=()) -> Plan:
    return Plan(1, ledger.step, 0, [], [], [], [], [], ahead=True, lookahead=list(lookahead))


def test_a_plan_ahead_goes_on_with_the_rows_of_the_step_before_but_for_what_it_ended():
    ledger = Ledger(begin())
    step(ledger, {1: 3, 2: 3, 3: 3}, [admit(1, [1, 2, 3]), admit(2, [4, 5, 6], max_tokens=1), admit(3, [7, 8, 9])])
    rows = ledger.apply(ahead(ledger, [0, 2, 1]))
    assert [(row.sequence.request, row.start, row.length, row.emits, row.lookahead) for row in rows] == [
        (1, 3, 1, True, 0),
        (3, 3, 1, True, 1),
    ]
    ledger.check()


def test_drafts_for_other_rows_than_there_were_are_refused():
    ledger = Ledger(begin())
    step(ledger, {1: 3}, [admit(1, [1, 2, 3])])
    with pytest.raises(LedgerError, match="drafts for 2 rows, the step before had 1"):
        ledger.apply(ahead(ledger, [1, 1]))


def test_a_plan_ahead_that_names_requests_is_no_message():
    with pytest.raises(ValueError, match="names requests"):
        Plan(1, 1, 0, [], [], [], [1], [1], ahead=True)
