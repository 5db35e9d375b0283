"""Plans that are sent before the result of the step in flight: what they hold, and what comes between."""

import pytest

from headrace.engine.messages.lifecycle import Restart
from headrace.engine.messages.steps import Plan
from headrace.engine.messages.tokens import Cancel
from headrace.workers.fake import fake_token
from tests.engine.scheduler.stage import DRAFTING, MODEL, expected


def plans_of(stage) -> list[Plan]:
    """The plans that worker 0 gets from now on."""
    worker, plans = stage.actor("worker-0"), []
    step = worker._step

    def noted(plan: Plan) -> None:
        plans.append(plan)
        step(plan)

    worker._step = noted
    return plans


async def test_while_nothing_but_decoding_goes_on_plans_are_sent_ahead(stage):
    stage.start_worker()
    plans = plans_of(stage)
    stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 40)
    await stage.tokenizer.all_ended([1])
    # A plan is not ahead where two results came in one burst.
    assert any(plan.ahead for plan in plans)
    assert stage.tokenizer.tokens[1] == expected(1, 40)


@DRAFTING
async def test_a_request_that_ends_itself_is_passed_over_in_the_plan_that_was_sent_ahead(stage):
    stage.start_worker()
    plans = plans_of(stage)
    scheduler = stage.start_scheduler()
    ends = {request: 3 + 2 * request for request in range(1, 6)}
    for request, end in ends.items():
        stage.submit(request, [request] * 5, 60, sampling={"stop_token_ids": (fake_token(request, end, MODEL.vocab_size),)})
    stage.submit(9, [9] * 5, 40)
    await stage.tokenizer.all_ended([*ends, 9])
    assert stage.tokenizer.tokens == {request: expected(request, end + 1) for request, end in ends.items()} | {9: expected(9, 40)}
    assert any(plan.ahead for plan in plans)
    await stage.all_landed(scheduler)
    assert scheduler._epoch.ledger.available == 64
    assert scheduler._epoch.ledger.digest == stage.actor("worker-0")._ledger.digest
    scheduler._epoch.ledger.check()


@DRAFTING
async def test_whatever_comes_while_a_plan_is_ahead_takes_part_soon_and_disturbs_nobody(stage):
    stage.start_worker()
    plans = plans_of(stage)
    scheduler = stage.start_scheduler()
    stage.submit(1, [1] * 5, 150)
    for request in range(2, 30):
        await stage.tokenizer.until(lambda _, request=request: len(stage.tokenizer.tokens.get(1, [])) > 3 * request)
        stage.submit(request, [request] * (1 + request % 13), 40 if request % 3 else 4)
        if request % 3 == 1:
            await stage.tokenizer.until(lambda _, request=request: request in stage.tokenizer.tokens)
            stage.send("scheduler", Cancel((request,), "abort"))
    await stage.tokenizer.all_ended(range(1, 30))
    for request, tokens in stage.tokenizer.tokens.items():
        assert tokens == expected(request, len(tokens))
        assert stage.tokenizer.ends[request].reason == "abort" or len(tokens) == {1: 150}.get(request, 40 if request % 3 else 4)
    assert {plan.ahead for plan in plans} == {True, False}
    stage.submit(99, [1], 1)
    await stage.tokenizer.all_ended([99])
    assert scheduler._epoch.ledger.available == 64
    assert not any(isinstance(m, Restart) for m in stage.supervisor.messages)


@pytest.mark.parametrize("stage", [{"draft": "ngram"}], indirect=True)
async def test_requests_emit_several_tokens_a_step_and_the_meters_tell(stage):
    stage.start_worker()
    plans = plans_of(stage)
    scheduler = stage.start_scheduler()
    for request in range(1, 5):
        stage.submit(request, [request] * 5, 100)
    await stage.tokenizer.all_ended(range(1, 5))
    assert stage.tokenizer.tokens == {request: expected(request, 100) for request in range(1, 5)}
    assert any(plan.ahead and any(plan.lookahead) for plan in plans)
    plans.clear()
    stage.submit(5, [5] * 5, 100)
    await stage.tokenizer.all_ended([5])
    assert len(plans) < 90, "without drafts it takes 100"
    meters = scheduler._meters
    assert 0 < meters._accepted.value < meters._drafted.value
    assert meters.emitted_tokens.value == 500
    assert meters._acceptance.sum > sum(meters._acceptance.counts) > 0
    assert scheduler._epoch.ledger.available == 64


@pytest.mark.parametrize("stage", [{"tensor_parallel": 2}], indirect=True)
async def test_a_second_rank_whose_ledger_differs_is_found_out_while_plans_are_ahead(stage):
    def flip(worker):
        step = worker._step

        def spoiled(plan):
            if plan.step >= 6 and plan.ahead and not flipped:
                flipped.append(plan.step)
                worker._ledger._events.append(1)
            step(plan)

        worker._step = spoiled

    flipped = []
    stage.start_worker(0)
    stage.start_worker(1, spoil=flip)
    stage.start_scheduler()
    stage.submit(1, [1, 2, 3], 200)
    await stage.supervisor.until(lambda messages: any(isinstance(m, Restart) for m in messages))
    restart = next(m for m in stage.supervisor.messages if isinstance(m, Restart))
    assert "rank 1" in restart.why
    assert f"in step {flipped[0]}" in restart.why
