"""Processes die, clients leave, the engine is told to stop: what was accepted still ends right, and nothing is left behind.

The worker is the paced one, whose every token follows from all before it, so that a token lost, doubled or moved changes the text.
The last test does the same to the real model.
"""

import asyncio
import json
import os
import signal
import socket
import time
from typing import Any

import pytest

from headrace.client import AsyncClient, Client, RateLimited, Unavailable
from tests.e2e.streams import Streams, differences, run
from tests.serving import REAL, Served, Watch

PACED = "tests.e2e.paced"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served():
    with Served(PACED) as served:
        yield served


def mixed(count: int, tokens: int) -> list[dict[str, Any]]:
    """Requests of several kinds and lengths, told apart by their seeds."""
    requests: list[dict[str, Any]] = []
    for seed in range(count):
        request: dict[str, Any] = {"seed": seed, "max_tokens": tokens + seed % 7}
        match seed % 4:
            case 0:
                request |= {"messages": HELLO}
            case 1:
                request |= {"prompt": f"Once upon a time, {seed} years ago, " * (1 + seed % 5)}
            case 2:
                request |= {"messages": [*HELLO, {"role": "assistant", "content": "hi"}, *HELLO], "logprobs": True}
            case 3:
                request |= {"prompt": [300 + seed] * 40, "logprobs": 0, "stop": ["never to be seen", "nor this"]}
        requests.append(request)
    return requests


async def undisturbed_then_killed(served: Served, names: tuple[str, ...], count: int, tokens: int, at_once: bool = False) -> None:
    """The same streams twice; the second time each of `names` is killed while they run, in turn or all at once. Both give the same."""
    requests = mixed(count, tokens)
    calm = await run(served.url, served.model, requests, ours=True)
    assert [one.error for one in calm] == [None] * count
    assert [one.completion_tokens for one in calm] == [request["max_tokens"] for request in requests]
    pieces = sum(one.pieces for one in calm)
    async with Streams(served.url, served.model, requests, ours=True) as streams:
        blows = [names] if at_once else [(name,) for name in names]
        for place, victims in enumerate(blows, 1):
            await streams.until(pieces * place // (len(blows) + 2))
            health = (await asyncio.to_thread(served.ask, "/health"))[1]
            assert health["running"] == count, f"all streams were to be running still: {health}"
            pids = {child["name"]: child["pid"] for child in health["processes"]}
            for name in victims:
                os.kill(pids[name], signal.SIGKILL)
            if not at_once:
                await asyncio.to_thread(served.until, f"{victims[0]} is back")
        killed = await streams.ended()
    assert differences(killed, calm) == {}
    served.until_state("ready")
    served.until_empty()


@pytest.mark.parametrize("name", ["worker-0", "scheduler", "tokenizer-0"])
async def test_streams_go_on_where_they_were_when_a_process_is_killed(served, name):
    await undisturbed_then_killed(served, (name,), 32, 160)
    assert served.metric("headrace_restarts_total", process=name) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worker-0", "scheduler", "tokenizer-0"])
async def test_64_streams_go_on_where_they_were_when_a_process_is_killed(name):
    with Served(PACED) as served:
        await undisturbed_then_killed(served, (name,), 64, 250)


@pytest.mark.slow
async def test_streams_survive_the_death_of_every_process_behind_the_server_in_turn():
    with Served(PACED) as served:
        await undisturbed_then_killed(served, ("worker-0", "tokenizer-0", "scheduler", "worker-0"), 16, 1200)


@pytest.mark.parametrize(("draft", "tokens"), [("none", 120), ("ngram", 600)])
async def test_streams_survive_the_death_of_every_process_behind_the_server_at_once(draft, tokens):
    with Served(PACED, tokenizers=2, draft=draft) as served:
        await undisturbed_then_killed(served, ("worker-0", "tokenizer-0", "tokenizer-1", "scheduler"), 16, tokens, at_once=True)
        assert (served.metric("headrace_accepted_draft_tokens_total") > 0) == (draft == "ngram")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("scheduler", "tokenizer-0"),
        ("tokenizer-0", "scheduler"),
        ("worker-0", "scheduler"),
        ("scheduler", "worker-0"),
        ("worker-0", "tokenizer-1"),
        ("tokenizer-0", "tokenizer-1"),
        ("tokenizer-1",),
    ],
    ids="+".join,
)
async def test_streams_survive_the_death_of_several_processes_at_once(names):
    with Served(PACED, tokenizers=2) as served:
        await undisturbed_then_killed(served, names, 24, 160, at_once=True)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["tokenizer-0", "scheduler", "worker-0"])
async def test_nothing_runs_on_for_clients_of_a_server_that_died_with_another_process(other):
    with Served(PACED) as served:
        async with Streams(served.url, served.model, mixed(8, 6000)) as streams:
            await streams.until(40)
            pids = served.pids()
            for name in ("server-0", other):
                os.kill(pids[name], signal.SIGKILL)
            assert all(one.error is not None for one in await streams.ended())
        served.until_state("ready")
        served.until_empty()


async def test_a_killed_server_costs_its_clients_an_error_and_nothing_else(served):
    async with Streams(served.url, served.model, mixed(16, 2000)) as streams:
        await streams.until(100)
        await asyncio.to_thread(served.kill, "server-0")
        got = await streams.ended()
    assert all(one.error is not None for one in got)
    served.until("server-0 is back")
    served.until_state("ready")
    served.until_empty()
    (after,) = await run(served.url, served.model, mixed(1, 5))
    assert after.completion_tokens == 5


async def test_our_own_clients_streams_go_on_after_the_death_of_their_server(served):
    before = served.metric("headrace_restarts_total", process="server-0")
    await undisturbed_then_killed(served, ("server-0",), 32, 160)
    assert served.metric("headrace_restarts_total", process="server-0") == before + 1


async def test_a_server_on_a_port_of_its_own_choice_comes_back_to_it():
    with Served(PACED) as served:
        served.kill("server-0")
        served.until("server-0 is back")
        served.until_state("ready")


async def test_too_many_deaths_end_the_engine_with_a_message():
    with Served(PACED) as served:
        watch = Watch(served.pids())
        for _ in range(5):
            served.kill("tokenizer-0")
            served.until("tokenizer-0 is back")
        served.kill("tokenizer-0")
        assert served.finish() == 1
        watch.all_gone(2)
        assert any("6 deaths of processes within 60 s" in line for line in served.lines)


# Clients that leave


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "waiting"])
def test_a_client_that_leaves_has_its_request_aborted(served, route, stream):
    served.until_idle()
    before = served.metric("headrace_disconnects_total")
    with post(served, route, {"stream": stream, "max_tokens": 5000, "n": 3} | asked(route)) as connection:
        if stream:
            assert b"200 OK" in connection.recv(1000)
        running(served, 3)
    left = time.monotonic()
    served.until_empty(3)
    assert time.monotonic() - left < 3
    assert served.metric("headrace_disconnects_total") == before + 1


def asked(route: str) -> dict[str, Any]:
    return {"messages": HELLO} if "chat" in route else {"prompt": "hello"}


def post(served: Served, route: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent and nothing was read."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    content = json.dumps(body).encode()
    connection.sendall(f"POST {route} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def running(served: Served, count: int) -> None:
    until_health(served, "running", count)


def until_health(served: Served, field: str, count: int) -> None:
    """Ask for the health until so many requests run or wait."""
    deadline = time.monotonic() + 10
    while served.ask("/health")[1][field] != count:
        assert time.monotonic() < deadline, served.ask("/health")


async def test_our_own_client_stops_the_answer_when_its_stream_is_closed(served):
    async with AsyncClient(served.url) as client:
        stream = await client.chat_stream(HELLO, max_tokens=5000)
        await anext(stream)
        stream.close()
    served.until_empty(3)


def test_a_client_that_reads_nothing_stops_nobody_else(served):
    with post(served, "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 5000, "n": 8}):
        running(served, 8)
        for _ in range(3):
            assert served.ask("/v1/completions", {"prompt": "y", "max_tokens": 3})[0] == 200
    served.until_empty(3)


def test_a_client_that_leaves_the_queue_is_forgotten():
    with Served(PACED, max_running=2) as narrow, post(narrow, "/v1/completions", {"prompt": "x", "max_tokens": 5000, "n": 2}):
        running(narrow, 2)
        with post(narrow, "/v1/completions", {"prompt": "y", "max_tokens": 5}):
            until_health(narrow, "waiting", 1)
        until_health(narrow, "waiting", 0)
        assert narrow.ask("/health")[1]["running"] == 2


async def test_beyond_the_queue_requests_are_refused_with_a_time_to_come_back():
    with Served(PACED, max_running=1, max_waiting=1) as narrow, post(narrow, "/v1/completions", {"prompt": "x", "max_tokens": 5000}):
        running(narrow, 1)
        with post(narrow, "/v1/completions", {"prompt": "y", "max_tokens": 5}), Client(narrow.url, retries=0) as client:
            until_health(narrow, "waiting", 1)
            with pytest.raises(RateLimited, match="1 requests are waiting already") as refused:
                client.chat(HELLO, max_tokens=1)
            assert refused.value.retry_after
            with pytest.raises(RateLimited, match="1 requests are waiting already") as refused:
                client.chat_stream(HELLO, max_tokens=1)
            assert refused.value.retry_after


# Being told to stop


async def test_sigterm_lets_running_streams_finish_and_refuses_new_ones():
    with Served(PACED) as served:
        watch = Watch(served.pids())
        requests = mixed(8, 150)
        async with Streams(served.url, served.model, requests) as streams:
            await streams.until(100)
            served.process.send_signal(signal.SIGTERM)
            served.until_state("draining")
            with pytest.raises(Unavailable, match="draining") as refused:
                Client(served.url, retries=0).chat(HELLO, model=served.model)
            assert refused.value.code == "draining"
            assert refused.value.retry_after
            got = await streams.ended()
        assert [(one.error, one.completion_tokens) for one in got] == [(None, request["max_tokens"]) for request in requests]
        assert served.finish() == 0
        watch.all_gone(1)


async def test_a_drain_waits_for_a_worker_that_comes_back():
    with Served(PACED) as served:
        requests = mixed(4, 150)
        async with Streams(served.url, served.model, requests) as streams:
            await streams.until(20)
            await asyncio.to_thread(served.kill, "worker-0")
            await asyncio.to_thread(served.until, "starting it again")
            served.process.send_signal(signal.SIGTERM)
            got = await streams.ended()
        assert [(one.error, one.completion_tokens) for one in got] == [(None, request["max_tokens"]) for request in requests]
        assert served.finish() == 0


async def test_a_drain_has_a_limit():
    with Served(PACED, drain_timeout=0.5) as served:
        async with Streams(served.url, served.model, mixed(4, 4000)) as streams:
            await streams.until(50)
            served.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(served.finish, 4) == 0
            assert all(one.error is not None for one in await streams.ended())


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_while_draining_ends_at_once(second):
    with Served(PACED) as served:
        watch = Watch(served.pids())
        async with Streams(served.url, served.model, mixed(4, 4000)) as streams:
            await streams.until(50)
            served.process.send_signal(signal.SIGTERM)
            served.until_state("draining")
            served.process.send_signal(second)
            assert await asyncio.to_thread(served.finish, 2) == 0
        watch.all_gone(1)


@pytest.mark.parametrize("times", [1, 2])
async def test_ctrl_c_ends_everything_within_two_seconds(times):
    with Served(PACED) as served:
        watch, run_dir = Watch(served.pids()), served.run_dir()
        async with Streams(served.url, served.model, mixed(16, 4000)) as streams:
            await streams.until(100)
            for _ in range(times):
                served.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(served.finish, 2) == 0
            watch.all_gone(0.1)
        assert not run_dir.exists()
        assert not [line for line in served.lines if "Traceback" in line or "ERROR" in line]


def test_a_supervisor_killed_outright_leaves_nobody_behind():
    with Served(PACED) as served:
        watch, run_dir = Watch(served.pids()), served.run_dir()
        os.kill(served.process.pid, signal.SIGKILL)
        watch.all_gone(2)
        assert not run_dir.exists()
        assert served.finish() == -signal.SIGKILL


# The real model


async def test_the_real_model_goes_on_with_the_same_tokens_after_its_worker_was_killed():
    requests: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Tell me about the sea."}], "max_tokens": 24, "temperature": 0, "logprobs": True},
        {"prompt": "The three laws of robotics are", "max_tokens": 24, "temperature": 0, "logprobs": 2},
        {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.9, "seed": 7, "presence_penalty": 0.5},
        {"prompt": "1, 2, 3, 4,", "max_tokens": 24, "temperature": 1.0, "top_p": 0.9, "seed": 8},
    ]
    with Served(REAL, threads=2) as served:
        calm = await run(served.url, served.model, requests)
        async with Streams(served.url, served.model, requests) as streams:
            await streams.until(24)
            served.kill("worker-0")
            killed = await streams.ended()
        assert differences(killed, calm) == {}
        served.until_state("ready")
        served.until_empty()
