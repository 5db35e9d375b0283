"""The scheduler's process and the fake worker's, over real sockets: serving, ending, refusing, recovering."""

import asyncio
import json
import time
from collections.abc import Callable

import msgspec
import pytest

from headrace.engine.messages.lifecycle import Drain, Drained, Restart
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.tokens import Cancel, Moved, SchedulerUp, Submit, Tokens
from headrace.workers.fake import fake_token
from tests.engine.scheduler.stage import DRAFTING, MODEL, Stage, expected


@DRAFTING
async def test_requests_of_all_lengths_get_their_tokens_and_one_end_each(stage):
    stage.start_worker()
    scheduler = stage.start_scheduler()
    lengths = {request: 1 + request % 9 for request in range(1, 41)}
    for request, length in lengths.items():
        stage.submit(request, list(range(1, 1 + request)), length)
    await stage.tokenizer.all_ended(lengths)
    assert stage.tokenizer.tokens == {request: expected(request, length) for request, length in lengths.items()}
    assert {end.reason for end in stage.tokenizer.ends.values()} == {"length"}
    assert scheduler.progress().running == scheduler.progress().waiting == 0


async def test_it_does_not_matter_who_comes_first_scheduler_or_worker(stage):
    stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 4)
    stage.start_worker()
    await stage.tokenizer.all_ended([1])
    assert stage.tokenizer.tokens[1] == expected(1, 4)


@DRAFTING
async def test_a_cancelled_request_ends_at_once_and_frees_its_pages(stage):
    stage.start_worker()
    scheduler = stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 200)
    await stage.tokenizer.until(lambda messages: any(isinstance(m, Tokens) and m.tokens for m in messages))
    stage.send("scheduler", Cancel((1, 999), "abort"))
    await stage.tokenizer.all_ended([1])
    assert stage.tokenizer.ends[1].reason == "abort"
    stage.submit(2, [9] * 5, 3)
    await stage.tokenizer.all_ended([2])
    assert scheduler._epoch.ledger.available == 64
    assert len(stage.actor("worker-0")._ledger.sequences) == 0


@DRAFTING
async def test_a_dead_worker_costs_no_request_a_token(stage):
    stage.start_worker()
    stage.start_scheduler()
    for request in range(1, 9):
        stage.submit(request, [request] * 7, 100)
    for _ in range(3):
        before = len(stage.tokenizer.messages)
        await stage.tokenizer.until(lambda messages, before=before: len(messages) > before + 5)
        stage.kill("worker-0")
        stage.start_worker()
    await stage.tokenizer.all_ended(range(1, 9))
    assert stage.tokenizer.tokens == {request: expected(request, 100) for request in range(1, 9)}


async def test_a_new_scheduler_says_so_and_continues_what_is_submitted_again(stage):
    stage.start_worker()
    stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 60)
    await stage.tokenizer.until(lambda _: len(stage.tokenizer.tokens.get(1, [])) > 5)
    stage.kill("scheduler")
    ups = sum(isinstance(m, SchedulerUp) for m in stage.tokenizer.messages)
    stage.start_scheduler()
    await stage.tokenizer.until(lambda messages: sum(isinstance(m, SchedulerUp) for m in messages) > ups)
    stage.submit(1, [1, 2, 3], 60, emitted=list(stage.tokenizer.tokens[1]))
    await stage.tokenizer.all_ended([1])
    assert stage.tokenizer.tokens[1] == expected(1, 60)


async def test_a_tokenizer_that_takes_a_request_over_gets_what_it_lacks(stage):
    stage.start_worker()
    stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 60, sampling={"logprobs": 0})
    await stage.tokenizer.until(lambda _: len(stage.tokenizer.tokens.get(1, [])) > 20)
    # As if a successor had only the first five tokens.
    del stage.tokenizer.tokens[1][5:]
    stage.tokenizer.accept_repeats = True
    stage.submit(1, [1, 2, 3], 60, emitted=expected(1, 5), sampling={"logprobs": 0})
    await stage.tokenizer.all_ended([1])
    assert stage.tokenizer.tokens[1] == expected(1, 60)


async def test_another_tenant_cannot_take_a_request_over(stage):
    stage.start_worker()
    stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 200, tenant="a")
    await stage.tokenizer.until(lambda _: len(stage.tokenizer.tokens.get(1, [])) > 20)
    stage.submit(1, [1, 2, 3], 200, tenant="b", attempt=9)
    await stage.tokenizer.until(lambda _: 1 in stage.tokenizer.refused)
    assert (stage.tokenizer.refused[1].status, stage.tokenizer.refused[1].code) == (409, "id_in_use")
    await stage.tokenizer.until(lambda _: 1 in stage.tokenizer.ends)
    assert stage.tokenizer.tokens[1] == expected(1, 200)


async def test_the_tokens_go_to_the_latest_heir_of_a_request_though_who_died_before_is_heard_of_later(stage):
    stage.start_worker()
    scheduler = stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 30, attempt=1)
    await stage.tokenizer.until(lambda _: 1 in stage.tokenizer.tokens)
    dead = Submit(1, "tokenizer-9", [1, 2, 3], Sampling(max_tokens=30, ignore_eos=True), seed=1)
    stage.send("scheduler", dead)
    await stage.tokenizer.all_ended([1])
    assert stage.tokenizer.tokens[1] == expected(1, 30)
    assert scheduler.progress().running == 0


@pytest.mark.parametrize("stage", [{"tokenizers": 2}], indirect=True)
async def test_whom_a_request_is_taken_from_is_told(stage):
    """A frontend that hears late of a tokenizer's death has asked its successor already, and asks another one then."""
    stage.start_worker()
    scheduler = stage.start_scheduler()
    late, heir = stage.tokenizer, stage.open_tokenizer("tokenizer-1")
    sampling = Sampling(max_tokens=40, ignore_eos=True)
    # Either may come first. In one burst, so that nothing has ended by then.
    for request, order in ((1, (0, 1)), (2, (1, 0))):
        for attempt in order:
            scheduler.receive(Submit(request, f"tokenizer-{attempt}", [request, 2, 3], sampling, seed=request, attempt=attempt))
    scheduler.settle()
    await heir.all_ended([1, 2])
    await late.until(lambda _: len(late.moved) == 2)
    assert late.moved == [Moved(1, 1), Moved(2, 1)]
    assert [heir.tokens[request] for request in (1, 2)] == [expected(request, 40) for request in (1, 2)]
    assert not late.tokens and not heir.moved


@DRAFTING
async def test_a_request_that_comes_again_before_its_abort_is_known_starts_anew(stage):
    stage.start_worker()
    scheduler = stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 60)
    await stage.tokenizer.until(lambda _: len(stage.tokenizer.tokens.get(1, [])) > 5)
    stage.tokenizer.tokens.clear()
    stage.tokenizer.accept_repeats = True
    # In one burst, so that no plan lies between.
    scheduler.receive(Cancel((1,), "abort"))
    scheduler.receive(Submit(1, "tokenizer-0", [1, 2, 3], Sampling(max_tokens=60, ignore_eos=True), seed=1))
    scheduler.settle()
    await stage.tokenizer.until(lambda _: 1 in stage.tokenizer.ends and stage.tokenizer.ends[1].reason == "length")
    assert stage.tokenizer.tokens[1] == expected(1, 60)
    assert scheduler._epoch.ledger.available == 64


async def test_what_is_submitted_again_with_all_its_tokens_only_ends(stage):
    stage.start_worker()
    scheduler = stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 4, emitted=[7, 7, 7, 7])
    stage.submit(2, [1, 2, 3], 4, emitted=[7, 9], sampling={"stop_token_ids": (9,)})
    await stage.tokenizer.all_ended([1, 2])
    assert [(stage.tokenizer.ends[request].reason, stage.tokenizer.ends[request].stop_token) for request in (1, 2)] == [
        ("length", None),
        ("stop", 9),
    ]
    assert stage.tokenizer.tokens == {}
    assert scheduler.progress().running == scheduler.progress().waiting == 0


async def test_a_request_without_valid_logits_ends_alone(stage):
    def fail(worker):
        step = worker._runner.step

        def spoiled(rows):
            outcome = step(rows)
            emitting = [row for row in rows if row.emits]
            outcome.tokens = [
                [] if row.sequence.request == 2 and row.sequence.emitted == 4 else tokens
                for row, tokens in zip(emitting, outcome.tokens, strict=True)
            ]
            return outcome

        worker._runner.step = spoiled

    stage.start_worker(spoil=fail)
    scheduler = stage.start_scheduler()
    for request in (1, 2, 3):
        stage.submit(request, [request] * 5, 20)
    await stage.tokenizer.all_ended([1, 2, 3])
    assert stage.tokenizer.refused[2].code == "invalid_logits"
    assert stage.tokenizer.tokens == {1: expected(1, 20), 2: expected(2, 4), 3: expected(3, 20)}
    assert scheduler._epoch.ledger.available == 64


@pytest.mark.parametrize("stage", [{"tensor_parallel": 2}, {"tensor_parallel": 2, "draft": "ngram"}], indirect=True)
async def test_two_ranks_keep_the_same_book(stage):
    stage.start_worker(0)
    stage.start_worker(1)
    scheduler = stage.start_scheduler()
    for request in range(1, 9):
        stage.submit(request, [request] * 5, 20)
    await stage.tokenizer.all_ended(range(1, 9))
    await stage.all_landed(scheduler)
    assert stage.actor("worker-0")._ledger.digest == stage.actor("worker-1")._ledger.digest
    assert not any(isinstance(m, Restart) for m in stage.supervisor.messages)


async def test_a_worker_whose_ledger_differs_is_found_out_at_that_step(stage):
    def flip(worker):
        step = worker._step

        def spoiled(plan):
            if plan.step == 6:
                worker._ledger._events.append(1)
            step(plan)

        worker._step = spoiled

    stage.start_worker(spoil=flip)
    stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 60)
    await stage.supervisor.until(lambda messages: any(isinstance(m, Restart) for m in messages))
    restart = next(m for m in stage.supervisor.messages if isinstance(m, Restart))
    assert restart.names == ("worker-0",)
    assert "in step 6" in restart.why
    # On their way when the other message left, and no more than these.
    await stage.tokenizer.until(lambda _: len(stage.tokenizer.tokens[1]) >= 6)
    assert len(stage.tokenizer.tokens[1]) == 6
    stage.kill("worker-0")
    stage.start_worker()
    await stage.tokenizer.all_ended([1])
    assert stage.tokenizer.tokens[1] == expected(1, 60)


@pytest.mark.parametrize("stage", [{"max_waiting": 3, "max_running": 1}], indirect=True)
async def test_a_full_queue_refuses_with_a_time_to_wait(stage):
    stage.start_scheduler()
    for request in range(1, 7):  # a place to run, three to wait
        stage.submit(request, [1, 2], 2)
    await stage.tokenizer.until(lambda _: len(stage.tokenizer.refused) == 2)
    refusal = stage.tokenizer.refused[5]
    assert refusal.status == 429
    assert refusal.retry_after >= 1
    assert 0 < refusal.hold_s <= 0.2, "others would be told the same"
    stage.start_worker()
    await stage.tokenizer.all_ended([1, 2, 3, 4])


async def test_a_request_that_can_never_fit_is_refused_with_both_numbers(stage):
    stage.start_worker(pages=8)
    stage.start_scheduler()
    stage.submit(1, [1] * 30, 10)
    await stage.tokenizer.until(lambda _: 1 in stage.tokenizer.refused)
    assert stage.tokenizer.refused[1].status == 400
    assert "40 tokens" in stage.tokenizer.refused[1].message
    assert "holds 32" in stage.tokenizer.refused[1].message


async def test_draining_finishes_what_runs_and_refuses_what_is_new(stage):
    stage.start_worker()
    stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 50)
    await stage.tokenizer.until(lambda _: 1 in stage.tokenizer.tokens)
    stage.send("scheduler", Drain())
    stage.submit(2, [1, 2, 3], 50)
    await stage.tokenizer.all_ended([1, 2])
    assert stage.tokenizer.refused[2].status == 503
    assert len(stage.tokenizer.tokens[1]) == 50
    await stage.supervisor.until(lambda messages: any(isinstance(m, Drained) for m in messages))


async def test_a_lower_priority_number_goes_first(stage):
    stage.start_scheduler()
    for request in range(1, 5):
        stage.submit(request, [request], 1, priority=-request)
    stage.start_worker(pages=1)
    await stage.tokenizer.all_ended(range(1, 5))
    assert list(stage.tokenizer.ends) == [4, 3, 2, 1]


@DRAFTING
async def test_more_requests_than_pages_are_all_served_by_preemption(stage):
    stage.start_worker(pages=12)
    stage.start_scheduler()
    for request in range(1, 13):
        stage.submit(request, [request] * 5, 30)
    await stage.tokenizer.all_ended(range(1, 13))
    assert stage.tokenizer.tokens == {request: expected(request, 30) for request in range(1, 13)}
    assert sum(end.preemptions for end in stage.tokenizer.ends.values()) > 0


def poisoned(stage: Stage, poison: int, by_itself: bool, at: int = 3) -> tuple[list[int], Callable]:
    """A way to start workers that die in the step in which the request `poison` would emit its token number `at`; and their deaths."""
    deaths: list[int] = []

    def fail(worker):
        step = worker._runner.step

        def spoiled(rows):
            if any(row.sequence.request == poison and row.emits and row.sequence.emitted == at for row in rows):
                deaths.append(len(rows))
                asyncio.get_running_loop().call_soon(die)
                raise Dying
            return step(rows)

        worker._runner.step = spoiled

    def die():
        stage.kill("worker-0", by_itself)
        stage.start_worker(spoil=fail)

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    return deaths, lambda: stage.start_worker(spoil=fail)


class Dying(Exception):
    """A worker's end in the middle of a step."""


@pytest.mark.parametrize(("by_itself", "most"), [(True, 2), (False, 4)], ids=["crash", "kill"])
async def test_a_request_that_kills_workers_ends_alone(stage, by_itself, most):
    deaths, start_worker = poisoned(stage, 3, by_itself)
    start_worker()
    scheduler = stage.start_scheduler()
    for request in range(1, 7):
        stage.submit(request, [request] * 7, 20)
    await stage.tokenizer.all_ended(range(1, 7))
    assert len(deaths) == most
    refused = stage.tokenizer.refused
    assert list(refused) == [3]
    assert (refused[3].status, refused[3].code) == (500, "quarantined")
    assert stage.tokenizer.tokens == {request: expected(request, 20 if request != 3 else 3) for request in range(1, 7)}
    assert scheduler._meters.quarantines.value == 1
    assert scheduler._epoch.ledger.available == 64


async def test_a_request_whose_time_is_up_ends_with_an_error_and_others_go_on(stage):
    scheduler = stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 4, deadline=time.monotonic() + 0.05)
    stage.submit(2, [1, 2, 3], 4)
    await stage.tokenizer.until(lambda _: 1 in stage.tokenizer.refused)
    assert stage.tokenizer.refused[1].status == 504
    assert "before its first token" in stage.tokenizer.refused[1].message
    stage.start_worker()
    await stage.tokenizer.all_ended([2])
    stage.submit(3, [1, 2, 3], 200, deadline=time.monotonic() + 60)
    stage.submit(4, [4, 4, 4], 200, deadline=time.monotonic() - 1)
    await stage.tokenizer.all_ended([3, 4])
    assert stage.tokenizer.refused.keys() == {1, 4}
    assert scheduler._epoch.ledger.available == 64


@pytest.mark.parametrize("stage", [{"max_waiting_tokens": 1000, "max_step_tokens": 256}], indirect=True)
async def test_a_queue_is_full_of_tokens_too(stage):
    stage.start_scheduler()
    stage.submit(1, [1] * 4000, 2)  # more than that is no reason to refuse who comes first
    stage.submit(2, [1] * 10, 2)
    await stage.tokenizer.until(lambda _: 2 in stage.tokenizer.refused)
    assert stage.tokenizer.refused[2].status == 429
    assert "4000 prompt tokens are waiting" in stage.tokenizer.refused[2].message
    assert stage.tokenizer.refused[2].hold_s == 0, "a shorter one may fit"


@pytest.mark.parametrize(
    ("stage", "most"), [({}, 20), ({"max_step_tokens": 30}, 30)], indirect=["stage"], ids=["the workers' own", "a setting"]
)
async def test_steps_have_the_tokens_that_suit_the_workers_if_nobody_says_otherwise(stage, most):
    lengths: list[int] = []

    def note(worker) -> None:
        step = worker._runner.step
        worker._runner.step = lambda rows: lengths.append(sum(row.length for row in rows)) or step(rows)

    stage.start_worker(step_tokens=20, spoil=note)
    stage.start_scheduler()
    stage.submit(1, list(range(100)), 2)
    await stage.tokenizer.all_ended([1])
    assert max(lengths) == most


async def test_the_request_log_tells_what_became_of_each(stage, tmp_path):
    stage.config = msgspec.structs.replace(stage.config, request_log=str(tmp_path / "log"))
    stage.start_worker(pages=16)
    stage.start_scheduler()
    stage.submit(1, list(range(30)), 8)
    await stage.tokenizer.all_ended([1])
    stage.submit(2, list(range(30)), 200)
    await stage.tokenizer.until(lambda _: 2 in stage.tokenizer.refused)
    stage.submit(3, list(range(30)), 4)
    await stage.tokenizer.all_ended([3])
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["request"], line["ended"]) for line in lines] == [
        ("0000000000000001", "length"),
        ("0000000000000002", "context_length_exceeded"),
        ("0000000000000003", "length"),
    ]
    assert lines[0]["emitted_tokens"] == 8
    assert 0 <= lines[0]["queue_s"] <= lines[0]["first_token_s"] <= lines[0]["total_s"]
    assert lines[1]["first_token_s"] is None
    assert (lines[0]["cached_tokens"], lines[2]["cached_tokens"]) == (0, 28)


async def test_an_id_that_is_submitted_again_right_after_it_was_cancelled_is_a_request_of_its_own(stage):
    stage.start_worker(pages=1000)
    stage.start_scheduler()
    told = stage.tokenizer.messages
    stage.tokenizer.receive = told.append
    for round in range(40):
        seed = 2 * round
        stage.send("scheduler", Submit(1, "tokenizer-0", [1] * 5, Sampling(max_tokens=500, ignore_eos=True), seed=seed))
        await stage.tokenizer.until(lambda messages: any(isinstance(message, Tokens) and message.tokens for message in messages))
        stage.send("scheduler", Cancel((1,), "abort"))
        stage.send("scheduler", Submit(1, "tokenizer-0", [1] * 5, Sampling(max_tokens=3, ignore_eos=True), seed=seed + 1))
        ends = lambda messages: [end.reason for one in messages if isinstance(one, Tokens) for end in one.ends]  # noqa: E731
        await stage.tokenizer.until(lambda messages, ends=ends: len(ends(messages)) == 2)
        assert ends(told) == ["abort", "length"]
        tokens = [token for message in told if isinstance(message, Tokens) for token in message.tokens]
        assert tokens[-3:] == [fake_token(seed + 1, place, MODEL.vocab_size) for place in range(3)]
        told.clear()
