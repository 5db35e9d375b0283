"""Whatever comes to a socket of the engine: nothing ends, nothing grows, and who is served goes on being served the same."""

import asyncio
import time
from pathlib import Path

import pytest
import zmq

from headrace.engine.actor import endpoint
from tests.e2e import hostile
from tests.e2e.streams import Streams, differences, run
from tests.serving import Served

REQUESTS = [{"prompt": f"number {place}", "seed": place, "max_tokens": 400, "extra_body": {"ignore_eos": True}} for place in range(8)]
GROWTH = 48 << 20
"""Bytes by which a process may still grow when it has seen some of everything: what waits at once differs from flood to flood."""


@pytest.fixture(scope="module")
def engine():
    with Served() as engine:
        yield engine


def resident(pids: dict[str, int]) -> dict[str, int]:
    """Bytes of memory in use, by process."""
    pages = {name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for name, pid in pids.items()}
    return {name: 4096 * count for name, count in pages.items()}


def rejected(engine: Served) -> dict[str, float]:
    """Dropped messages by process. A desk's are its tokenizer's."""
    return {
        name.removesuffix(".desk"): engine.metric("headrace_rejected_frames_total", process=name)
        for name in hostile.SOCKETS
        if "." not in name
    }


def flood(engine: Served, seed: int, count: int) -> None:
    """Send `count` hostile messages to every socket, and wait until each process has dropped those that it must."""
    before, run_dir = rejected(engine), engine.run_dir()
    due = dict.fromkeys(before, 0)
    with zmq.Context() as context:
        for name in hostile.SOCKETS:
            frames = hostile.Frames(name, seed)
            with context.socket(zmq.DEALER if name.endswith(".desk") else zmq.PUSH) as peer:
                peer.setsockopt(zmq.LINGER, 10_000)
                peer.setsockopt(zmq.SNDTIMEO, 10_000)
                peer.connect(endpoint(run_dir, name))
                for _ in range(count):
                    peer.send_multipart(frames.next())
            due[name.removesuffix(".desk")] += frames.rejected
    deadline = time.monotonic() + 30
    while missing := {name: due[name] - (now - before[name]) for name, now in rejected(engine).items() if now - before[name] < due[name]}:
        assert time.monotonic() < deadline, f"messages that were not counted as dropped: {missing}"


def test_every_socket_of_the_run_directory_is_among_those_that_are_tried(engine):
    bound = {path.name for path in engine.run_dir().iterdir() if path.is_socket()}
    assert bound == set(hostile.SOCKETS)


def test_every_message_is_among_those_that_are_damaged():
    tried = {type(message) for message in hostile.samples()}
    assert set.union(*map(hostile.takes, hostile.SOCKETS)) <= tried


@pytest.mark.parametrize("what", hostile.BEFORE_ZMTP)
def test_a_peer_that_does_not_speak_the_protocol_is_hung_up_on(engine, what):
    before = engine.pids()
    for name in hostile.SOCKETS:
        assert hostile.hung_up_on(engine.run_dir() / name, hostile.BEFORE_ZMTP[what])
    assert engine.pids() == before


def flooded(engine: Served, rounds: int, count: int) -> None:
    pids = engine.pids()
    pids["supervisor"] = engine.process.pid
    expected = asyncio.run(run(engine.url, engine.model, REQUESTS))
    flood(engine, 0, count)
    sizes = [resident(pids)]
    for seed in range(1, rounds + 1):

        async def streams_beside(seed: int = seed) -> None:
            async with Streams(engine.url, engine.model, REQUESTS) as streams:
                await streams.until(1)
                flooding = asyncio.create_task(asyncio.to_thread(flood, engine, seed, count))
                got = await streams.ended()
                await flooding
            assert differences(got, expected) == {}

        asyncio.run(streams_beside())
        sizes.append(resident(pids))
    assert {name: pid for name, pid in pids.items() if name != "supervisor"} == engine.pids()
    settled = {name: max(size[name] for size in sizes[: len(sizes) // 2]) for name in pids}
    grown = {name: size - settled[name] for name, size in sizes[-1].items() if size > settled[name] + GROWTH}
    assert not grown, f"bytes by which processes grew: {grown}"
    assert all(engine.metric("headrace_restarts_total", process=name) == 0 for name in engine.pids())


def test_hostile_frames_are_dropped_and_counted_and_hurt_nobody(engine):
    flooded(engine, 1, 1500)
    engine.until_empty(30)


@pytest.mark.slow
def test_many_hostile_frames_make_nothing_grow(engine):
    flooded(engine, 6, 4000)
    engine.until_empty(30)
