"""How long chunks may be, on machines whose speed is known."""

import pytest

from headrace.engine.scheduler.speed import LEAST, READ, STRETCH, Speed

DECODES, ALONE = 16, 0.028


def seconds(tokens: int, context: int, token: float, place: float) -> float:
    """A step with a chunk on such a machine."""
    return ALONE + token * tokens + place * ((tokens + READ) * context + tokens * tokens / 2)


def pauses(speed: Speed, token: float, place: float, until: int) -> list[float]:
    """Of the decodes, while a prompt of `until` tokens is computed beside them."""
    found, context = [], 0
    while context < until:
        chunk = speed.chunk(DECODES, 0, 256, context)
        found.append(seconds(chunk, context, token, place))
        speed.observe(DECODES, lambda: 0, [(chunk, context)], found[-1])
        context += chunk
    return found


@pytest.mark.parametrize(("token", "place"), [(8e-4, 1e-7), (2e-4, 4e-8), (5e-3, 0.0)])
def test_pauses_keep_to_the_target_however_deep_in_a_prompt(token, place):
    speed = Speed(0.05)
    speed.observe(DECODES, lambda: 0, [], ALONE)
    speed.observe(0, lambda: 0, [(256, 0)], seconds(256, 0, token, place) - ALONE)
    allowed = max(0.05, STRETCH * ALONE)
    found = pauses(speed, token, place, 8000)
    late = found[20:]
    assert max(late) < 1.15 * max(allowed, seconds(LEAST, 8000, token, place))
    assert sum(late) / len(late) > 0.7 * min(allowed, seconds(LEAST, 4000, token, place)), "nor are they shorter than they may be"


def test_a_short_prompt_after_a_long_one_is_not_taken_for_as_slow():
    speed = Speed(0.05)
    speed.observe(DECODES, lambda: 0, [], ALONE)
    speed.observe(0, lambda: 0, [(256, 0)], 0.25)
    pauses(speed, 8e-4, 1e-7, 8000)
    assert speed.chunk(DECODES, 0, 256, 8000) < 16
    assert speed.chunk(DECODES, 0, 256, 0) >= 20


@pytest.mark.parametrize(("step", "decode"), [(0.006, 0.002), (0.001, 0.0003), (0.03, 0.004), (0.2, 0.01), (0.1, 0.0002)])
def test_the_decodes_that_the_target_allows_are_found_from_far_too_many_and_from_too_few(step, decode):
    right = (max(0.05, 2 * step) - step) / decode
    for first in (256, 1):
        speed = Speed(0.05)
        assert speed.decodes(1.0) > 1000, "nothing is known"
        speed.observe(first, lambda: 0, [], step + decode * first)
        for _ in range(60):
            number = min(256, speed.decodes(1.0))
            speed.observe(number, lambda: 0, [], step + decode * number)
        assert 0.85 * right - 1 <= speed.decodes(1.0) <= 1.15 * right + 1


def test_when_the_machine_gets_faster_more_decodes_are_tried():
    speed = Speed(0.05)
    for decode in (0.01, 0.001):
        for _ in range(600):
            number = min(256, speed.decodes(1.0))
            speed.observe(number, lambda: 0, [], decode * number)
    assert 40 <= speed.decodes(1.0) <= 55


def test_decodes_that_see_more_and_more_are_known_to_take_longer():
    """While a long prompt is computed no step of decodes alone is measured; yet each has a place more behind it after every step."""
    token, place = 8e-4, 1e-7
    speed = Speed(0.0)
    speed.observe(DECODES, lambda: 0, [], ALONE)
    speed.observe(0, lambda: 0, [(256, 0)], seconds(256, 0, token, place) - ALONE)
    context = step = 0
    found = []
    while context < 8000:
        seen = DECODES * step
        alone = ALONE + place * (1 + READ) * seen
        chunk = speed.chunk(DECODES, seen, 256, context)
        took = alone - ALONE + seconds(chunk, context, token, place)
        speed.observe(DECODES, lambda seen=seen: seen, [(chunk, context)], took)
        found.append(took / alone)
        context += chunk
        step += 1
    assert step > 200
    assert max(found[20:]) < 1.1 * STRETCH
    assert min(found[20:]) > 0.8 * STRETCH, "nor are the pauses shorter than they may be"


def test_a_chunk_outweighed_by_fewer_decodes_than_known_upsets_nothing():
    speed = Speed(0.05)
    speed.observe(28, lambda: 0, [], 0.04)
    speed.observe(0, lambda: 0, [(256, 0)], 0.256)
    before = speed.chunk(28, 0, 256, 1000)
    # Four tokens come and four decodes are gone: whatever this step took says next to nothing of a token or a place.
    speed.observe(24, lambda: 0, [(4, 0)], 0.06)
    assert before - 2 <= speed.chunk(28, 0, 256, 1000) <= before
