"""Which ranks are up: what is said of their lives and deaths comes in any order."""

from headrace.engine.messages.steps import WorkerUp
from headrace.engine.scheduler.ranks import Ranks


def up(rank: int, incarnation: int) -> WorkerUp:
    return WorkerUp(rank, incarnation, pages=8, page_size=4)


def test_all_ranks_must_be_up():
    ranks = Ranks(["worker-0", "worker-1"])
    assert ranks.arrive(up(0, 3)) and not ranks.ready
    assert ranks.arrive(up(1, 4)) and ranks.ready
    assert not ranks.arrive(up(1, 4)), "it said so before"
    assert ranks.leave("worker-0", 3) and not ranks.ready


def test_a_death_that_is_heard_of_after_the_successor_takes_nobody_away():
    ranks = Ranks(["worker-0"])
    ranks.arrive(up(0, 3))
    assert ranks.arrive(up(0, 7))
    assert not ranks.leave("worker-0", 3)
    assert ranks.ready


def test_the_last_words_of_a_dead_rank_do_not_bring_it_back():
    ranks = Ranks(["worker-0"])
    assert ranks.leave("worker-0", 3)
    assert not ranks.arrive(up(0, 3)) and not ranks.ready
    assert ranks.arrive(up(0, 7))
    assert not ranks.arrive(up(0, 3)) and ranks.ready


def test_other_processes_are_no_ranks():
    assert not Ranks(["worker-0"]).leave("tokenizer-0", 9)
