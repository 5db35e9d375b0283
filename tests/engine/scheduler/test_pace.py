"""How many drafts a request asks for, as they prove right or wrong."""

from headrace.engine.scheduler.pace import FIRST, MOST, REST, Pace


def test_right_drafts_lead_to_more_of_them_up_to_a_limit():
    pace = Pace()
    seen = []
    for _ in range(5):
        seen.append(pace.lookahead)
        pace.verified(pace.lookahead, pace.lookahead)
    assert seen[0] == FIRST and seen[-1] == MOST
    assert seen == sorted(seen)


def test_half_right_drafts_lead_to_one_more_than_were_right():
    pace = Pace()
    pace.verified(3, 1)
    assert pace.lookahead == 2


def test_wrong_drafts_end_in_a_pause_and_then_a_probe():
    pace = Pace()
    steps = 0
    while pace.lookahead:
        pace.verified(pace.lookahead, 0)
        steps += 1
        assert steps < 10
    for _ in range(REST):
        assert pace.lookahead == 0
        pace.verified(0, 0)
    assert pace.lookahead == 1
    pace.verified(1, 0)
    assert pace.lookahead == 0, "a probe that fails is the end of it for a while"
    for _ in range(REST):
        pace.verified(0, 0)
    for _ in range(4):
        pace.verified(pace.lookahead, pace.lookahead)
    assert pace.lookahead > 1


def test_steps_for_which_nothing_was_drafted_change_nothing():
    pace = Pace()
    for _ in range(100):
        pace.verified(0, 0)
    assert pace.lookahead == FIRST
