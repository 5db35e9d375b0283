"""What a client says that comes without the HTTP endpoint's checks: each request still gets its one last word."""

import math

import pytest

from headrace.engine.messages.frontend import Failed, TokenPrompt
from headrace.engine.messages.tokens import Submit
from headrace.tokenizer_proc.prompts import MOST_CONTINUATIONS, RANGES
from tests.tokenizer_proc.stage import Stage


@pytest.fixture
async def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    await stage.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -2e9])
@pytest.mark.parametrize("name", sorted(RANGES))
async def test_a_parameter_out_of_range_is_refused_by_name(stage, name, bad):
    whole = name in ("max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "top_k")
    value = (int(bad) if math.isfinite(bad) else -1) if whole else bad
    stage.frontend.generate(1, **{name: value})
    (failed,) = await stage.frontend.ended(1)
    assert isinstance(failed, Failed)
    assert (failed.status, failed.param, failed.code) == (400, name, "out_of_range")
    assert stage.forgotten()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": ((5, math.nan),)}, "logit_bias"),
        ({"seeds": (-1,)}, "seed"),
        ({"deadline": math.inf}, "deadline"),
        ({"deadline": math.nan}, "deadline"),
        ({"priority": 1 << 40}, "priority"),
        ({"prompt": TokenPrompt((1 << 62,))}, "prompt"),
    ],
)
async def test_a_number_that_no_timer_or_worker_takes_is_refused_by_name(stage, fields, param):
    stage.frontend.generate(1, **fields)
    (failed,) = await stage.frontend.ended(1)
    assert isinstance(failed, Failed)
    assert (failed.status, failed.param) == (400, param)


async def test_an_id_that_stands_twice_in_one_request_is_refused_and_leaves_nothing_behind(stage):
    stage.frontend.generate(1, 1)
    (failed,) = await stage.frontend.ended(1)
    assert isinstance(failed, Failed) and failed.param == "n"
    assert stage.forgotten()


async def test_an_id_of_another_tenants_request_is_refused_and_that_request_runs_on(stage):
    stage.frontend.generate(1, tenant="a")
    await stage.scheduler.next(Submit)
    other = stage.visit(b"other")
    other.generate(1, 2, tenant="b", seeds=(1, 2))
    (failed,) = await other.ended(1)
    assert isinstance(failed, Failed) and (failed.status, failed.code) == (409, "id_in_use")
    submitted = await stage.scheduler.next(Submit, 2)
    assert [(one.request, one.tenant) for one in submitted] == [(1, "a"), (2, "b")]
    assert 1 not in stage.frontend.last_words


async def test_too_many_continuations_at_once_are_refused(stage):
    stage.frontend.generate(*range(MOST_CONTINUATIONS + 1))
    for failed in await stage.frontend.ended(*range(MOST_CONTINUATIONS + 1)):
        assert isinstance(failed, Failed) and (failed.status, failed.param) == (400, "n")
    assert stage.forgotten()
