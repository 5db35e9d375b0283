"""Streams of every kind, while processes die and hang at random: each ends as if nothing had happened. `scripts/chaos` has the options."""

import pytest

from tests.e2e import chaos


def run(*arguments: str) -> chaos.Chaos:
    outcome = chaos.main(list(arguments))
    print(outcome.table())
    assert outcome.wrong == []
    return outcome


def test_no_stream_is_lost_or_changed_while_processes_are_killed_and_stopped():
    outcome = run("--kills", "10", "--every", "1", "3", "--streams", "64", "--pool", "48", "--tokens", "80", "--seed", "3")
    assert len(outcome.blows) == 10


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_nor_with_drafts_or_when_servers_die_too_and_the_client_resumes(draft):
    run("--kills", "60", "--every", "1", "3", "--servers", "--draft", draft, "--seed", "7")


@pytest.mark.slow
def test_nor_in_two_hundred_deaths():
    assert len(run("--kills", "200", "--every", "1", "2").blows) == 200


@pytest.mark.slow
def test_nor_with_the_real_model():
    run(
        "--kills",
        "12",
        "--every",
        "3",
        "6",
        "--streams",
        "16",
        "--pool",
        "24",
        "--tokens",
        "40",
        "--real",
        "--hang-timeout",
        "20",
        "--stops",
        "0",
    )
