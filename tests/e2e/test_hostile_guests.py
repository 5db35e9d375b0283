"""Whatever a client on another machine sends that may connect, and whatever comes from one that may not: nothing ends, nothing grows, and
who is served goes on being served the same."""

import asyncio
import contextlib
import random
import secrets
import socket

import pytest
import zmq

from headrace.client.direct import Piece
from headrace.engine.curve import IDENTITY_BYTES, LARGEST_GUEST_FRAME, secure_client
from headrace.engine.keys import read_pair, read_public
from headrace.engine.messages.frontend import Describe, FromGuest, TextPrompt
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.wire import encode
from headrace.engine.names import port_of
from tests.e2e import hostile
from tests.e2e.test_hostile_frames import GROWTH, resident
from tests.guests import Keys, Listening

REJECTED, REFUSED = "headrace_rejected_frames_total", "headrace_rejected_connections_total"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Listening(Keys(tmp_path_factory.mktemp("keys"), "alice", "bob")) as engine:
        yield engine


def count(engine: Listening, name: str) -> float:
    return engine.metric(name, process="tokenizer-0")


async def until_counted(engine: Listening, name: str, least: float) -> None:
    async with asyncio.timeout(60):
        while await asyncio.to_thread(count, engine, name) < least:
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def authorized(engine: Listening, name: str, identity: bytes | None = None):
    """A bare socket with the pair of a client."""
    address = engine.addresses()[0]
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 10_000)
        peer.setsockopt(zmq.SNDTIMEO, 10_000)
        peer.setsockopt(zmq.IDENTITY, secrets.token_bytes(IDENTITY_BYTES) if identity is None else identity)
        secure_client(peer, address, read_pair(engine.keys.of(name)), read_public(engine.keys.server))
        peer.connect(address)
        yield peer


async def flood(engine: Listening, seed: int, frames: int) -> None:
    """Send hostile messages, and wait until those that must be dropped are counted."""
    before = count(engine, REJECTED)
    hostile_frames = hostile.Frames("tokenizer-0.desk", seed, FromGuest)
    with authorized(engine, "bob") as peer:
        for _ in range(frames):
            await asyncio.to_thread(peer.send_multipart, hostile_frames.next())
        await until_counted(engine, REJECTED, before + hostile_frames.rejected)


async def read(engine: Listening, rounds: int) -> list[str]:
    texts = []
    with contextlib.closing(await engine.guest("alice")) as client:
        for _ in range(rounds):
            sampling = Sampling(max_tokens=400, ignore_eos=True)
            events = [event async for event in client.stream(TextPrompt("hello"), sampling, seed=7)]
            texts.append("".join(event.text for event in events if isinstance(event, Piece)))
    return texts


async def flooded(engine: Listening, rounds: int, frames: int) -> None:
    pids = engine.pids()
    (expected,) = await read(engine, 1)
    sizes = []
    for seed in range(rounds):
        reading = asyncio.create_task(read(engine, 5))
        await flood(engine, seed, frames)
        assert set(await reading) == {expected}
        sizes.append(resident(pids))
    assert engine.pids() == pids
    grown = {name: size - sizes[0][name] for name, size in sizes[-1].items() if size > sizes[0][name] + GROWTH}
    assert not grown, f"bytes by which processes grew: {grown}"
    await asyncio.to_thread(engine.until_empty, 30)


async def test_hostile_frames_of_a_client_are_dropped_and_counted_and_hurt_nobody(engine):
    await flooded(engine, 2, 1500)


@pytest.mark.slow
async def test_many_hostile_frames_of_a_client_make_nothing_grow(engine):
    await flooded(engine, 6, 4000)


@pytest.mark.parametrize("identity", [b"short", bytes(IDENTITY_BYTES - 1)])
async def test_a_client_whose_identity_could_be_guessed_is_not_listened_to(engine, identity):
    before = count(engine, REJECTED)
    with authorized(engine, "bob", identity) as peer:
        peer.send(encode(Describe(1)))
        await until_counted(engine, REJECTED, before + 1)
        assert not peer.poll(200)


async def test_a_message_over_the_limit_ends_the_connection_and_nothing_else(engine):
    pids = engine.pids()
    before = resident(pids)["tokenizer-0"]
    with authorized(engine, "bob") as peer:
        peer.setsockopt(zmq.LINGER, 0)
        with contextlib.closing(peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)) as monitor:
            peer.send(bytes(LARGEST_GUEST_FRAME + 1))
            assert await asyncio.to_thread(monitor.poll, 20_000)
            peer.disable_monitor()
    assert engine.pids() == pids
    assert resident(pids)["tokenizer-0"] < before + GROWTH
    assert len(await read(engine, 1)) == 1


async def test_a_crowd_of_strangers_is_refused_while_a_client_is_served(engine):
    """Connections that say nothing, rubbish, or the beginning of the protocol, hundreds of them."""
    (expected,) = await read(engine, 1)
    pids, before, draw = engine.pids(), count(engine, REFUSED), random.Random(0)
    reading = asyncio.create_task(read(engine, 5))
    crowd = []
    for place in range(300):
        stranger = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port_of(engine.addresses()[0])), 20)
        crowd.append(stranger)
        with contextlib.suppress(ConnectionError):
            match place % 3:
                case 0:
                    stranger.sendall(draw.randbytes(draw.randrange(1, 2000)))
                case 1:
                    # As far as who knows the protocol comes without a key.
                    stranger.sendall(hostile.GREETING.replace(b"NULL" + bytes(16), b"CURVE" + bytes(15)) + draw.randbytes(300))
    assert set(await reading) == {expected}
    for stranger in crowd:
        stranger.close()
    await until_counted(engine, REFUSED, before + 250)
    assert engine.pids() == pids
    assert await read(engine, 1) == [expected]
