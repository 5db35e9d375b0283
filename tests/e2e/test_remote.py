"""Direct clients on other machines, over TCP: the same answers, whatever dies, each tenant for itself, and nobody else.

The worker is the paced one, whose every token follows from all before it, so that a token lost, doubled or moved changes the text.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import time

import pytest
import zmq

from headrace.client import ClientError, RemoteClient, Unauthorized, Unreachable
from headrace.client.direct import CallError, DirectClient, Piece, RequestFailed
from headrace.engine.messages.frontend import Abort, Accepted, ChatPrompt, Describe, End, Failed, Generate, TextPrompt
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.wire import encode
from headrace.engine.names import port_of
from tests.e2e import hostile
from tests.guests import Keys, Listening

PACED = "tests.e2e.paced"
PROMPTS = [TextPrompt("hello"), TextPrompt("Once upon a time, " * 20), ChatPrompt(b'[{"role": "user", "content": "hello"}]')]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return Keys(tmp_path_factory.mktemp("keys"), "alice", "bob")


@pytest.fixture(scope="module")
def engine(keys):
    with Listening(keys, PACED, tokenizers=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Keys that the engine does not know."""
    return Keys(tmp_path_factory.mktemp("strange"), "mallory")


async def read(client: DirectClient, seed: int, tokens: int, progress: list[int]) -> tuple[str, int, str, int]:
    """One stream: its text, how many tokens came, why it ended, and what that counts."""
    text, count = "", 0
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    async for event in client.stream(PROMPTS[seed % len(PROMPTS)], sampling, ["never to be seen"] if seed % 2 else (), seed):
        if isinstance(event, Piece):
            text += event.text
            count += event.tokens
            progress.extend([seed] * event.tokens)
        elif isinstance(event, End):
            return text, count, event.reason, event.completion_tokens
    raise AssertionError("a stream ended without its last word")


async def read_all(client: DirectClient, count: int, tokens: int, progress: list[int] | None = None) -> list[tuple[str, int, str, int]]:
    heard = [] if progress is None else progress
    return list(await asyncio.gather(*(read(client, seed, tokens + seed, heard) for seed in range(count))))


async def read_locally(engine: Listening, count: int, tokens: int) -> list[tuple[str, int, str, int]]:
    with contextlib.closing(DirectClient(engine.run_dir(), ["tokenizer-0", "tokenizer-1"])) as local:
        return await read_all(local, count, tokens)


async def until(condition, seconds: float = 30.0) -> None:
    """Give others their turn until something is so."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def refused(engine: Listening) -> float:
    return sum(engine.metric("headrace_rejected_connections_total", process=f"tokenizer-{place}") for place in range(2))


async def until_refused(engine: Listening, more_than: float) -> None:
    async with asyncio.timeout(20):
        while await asyncio.to_thread(refused, engine) <= more_than:
            await asyncio.sleep(0.05)


async def test_a_stream_is_token_for_token_what_it_is_on_the_engines_own_machine(engine):
    expected = await read_locally(engine, 6, 40)
    assert [(count, reason) for _, count, reason, _ in expected] == [(40 + seed, "length") for seed in range(6)]
    with contextlib.closing(await engine.guest("alice")) as client:
        assert len(client._visits) == 2
        assert await read_all(client, 6, 40) == expected
        assert (await client.describe()).name == engine.model
        ids = (await client.tokenize(TextPrompt("Hello there"))).ids
        assert (await client.detokenize(tuple(ids))).text == "Hello there"
    engine.until_empty()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_streams_go_on_where_they_were_when_their_tokenizer_dies(keys, number):
    with Listening(keys, PACED, tokenizers=2, hang_timeout=2.0) as engine:
        expected = await read_locally(engine, 12, 300)
        before = engine.addresses()
        with contextlib.closing(await engine.guest("alice")) as client:
            progress: list[int] = []
            reading = asyncio.create_task(read_all(client, 12, 300, progress))
            await until(lambda: len(progress) > 600)
            victim = (await asyncio.to_thread(engine.pids))["tokenizer-0"]
            os.kill(victim, number)
            assert await asyncio.wait_for(reading, 60) == expected
            await asyncio.to_thread(engine.until, "tokenizer-0 is back")
            assert engine.addresses() == before
            assert engine.metric("headrace_restarts_total", process="tokenizer-0") == 1
            # Its successor, at the same port, serves as well.
            await until(lambda: all(line.up for line in client._lines.values()))
            assert await read_all(client, 4, 300) == expected[:4]
        engine.until_empty()


async def test_a_connection_that_breaks_while_its_tokenizer_lives_costs_nothing(engine):
    expected = await read_locally(engine, 4, 200)
    with contextlib.closing(await engine.guest("alice")) as client:
        progress: list[int] = []
        reading = asyncio.create_task(read_all(client, 4, 200, progress))
        for pieces in (100, 300, 500):
            await until(lambda pieces=pieces: len(progress) > pieces or reading.done())
            assert not reading.done(), reading.exception()
            for name in client._visits:
                client._happened(name, zmq.EVENT_DISCONNECTED)
        assert await asyncio.wait_for(reading, 60) == expected
    engine.until_empty()


async def test_a_client_that_is_gone_leaves_nothing_behind(engine):
    client = await engine.guest("alice")
    progress: list[int] = []
    reading = asyncio.create_task(read_all(client, 4, 4000, progress))
    await until(lambda: len(progress) > 8)
    reading.cancel()
    client._context.destroy(linger=0)
    await asyncio.to_thread(engine.until_empty, 20)
    with contextlib.suppress(asyncio.CancelledError, zmq.ZMQError):
        await reading
    for line in client._lines.values():
        line.timer and line.timer.cancel()


async def test_a_key_that_the_engine_does_not_know_is_refused_at_once(engine, keys, stranger):
    before = refused(engine)
    began = time.monotonic()
    with pytest.raises(Unauthorized, match="does not let this key in"):
        await RemoteClient.connect(engine.addresses()[0], stranger.of("mallory"), keys.server, 60)
    assert time.monotonic() - began < 30
    await until_refused(engine, before)


async def test_another_servers_key_is_an_error_within_the_clients_patience(engine, keys, stranger):
    before = refused(engine)
    with pytest.raises(Unreachable, match="does not prove that it has the server key"):
        await RemoteClient.connect(engine.addresses()[0], keys.of("alice"), stranger.server, 1.0)
    await until_refused(engine, before)


async def test_an_address_where_nobody_listens_is_an_error_within_the_clients_patience(keys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="cannot be reached"):
            await RemoteClient.connect(f"tcp://127.0.0.1:{taken.getsockname()[1]}", keys.of("alice"), keys.server, 1.0)


@pytest.mark.parametrize("address", ["127.0.0.1:5700", "tcp://127.0.0.1", "ipc:///tmp/x", "tcp://a b:1"])
async def test_what_is_no_address_is_an_error_at_once(keys, address):
    with pytest.raises(ClientError, match="write tcp://HOST:PORT"):
        await RemoteClient.connect(address, keys.of("alice"), keys.server)


async def test_a_key_can_be_added_and_taken_away_while_the_engine_runs(engine, keys, stranger):
    added = keys.folder / "clients" / "mallory.key"
    shutil.copy(stranger.folder / "clients" / "mallory.key", added)
    client = await RemoteClient.connect(engine.addresses()[0], stranger.of("mallory"), keys.server)
    with contextlib.closing(client):
        assert (await read(client, 1, 5, []))[1] == 5
        added.unlink()
        rejected = engine.metric("headrace_rejected_frames_total", process="tokenizer-0")
        # The connection stands, but nothing that comes by it is listened to.
        with pytest.raises(CallError, match="does not let this key in") as gone:
            await client._ask(Describe(client._new_id()), engine.addresses()[0])
        assert gone.value.failure.status == 401
        assert engine.metric("headrace_rejected_frames_total", process="tokenizer-0") > rejected
        # Nor is it let in again, or by the other desk.
        with pytest.raises(RequestFailed, match="does not let this key in") as failed:
            await read(client, 1, 5, [])
        assert failed.value.failure.status == 401
        shutil.copy(stranger.folder / "clients" / "mallory.key", added)
        await until(lambda: all(line.up for line in client._lines.values()))
        assert (await read(client, 1, 5, []))[1] == 5
    added.unlink()


class Heard:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def accepted(self, message) -> None:
        self.events.append(message)

    prompt_scores = failed = accepted

    def text(self, text, count, scores, now) -> None:
        self.events.extend([text] * count)

    def end(self, message, now) -> None:
        self.events.append(message)


async def test_no_client_can_claim_to_be_another_tenant_or_have_what_is_anothers(engine):
    sampling = Sampling(max_tokens=1500, ignore_eos=True)
    with contextlib.closing(await engine.guest("alice")) as alice, contextlib.closing(await engine.guest("bob")) as bob:
        ids, one, other = alice.new_ids(1), Heard(), Heard()
        alice.generate(Generate(ids, (1,), TextPrompt("hello"), sampling, answer="a", notes=b"n"), [one])
        await until(lambda: len(one.events) > 5)
        # Another's request id, asked for at the same desk and at the other one, under every name that a tenant may have.
        tenant = f"curve:{alice._pair.public.decode()}"
        for desk in bob._visits:
            for claimed in ("", tenant):
                heard = Heard()
                bob._least_loaded = lambda desk=desk: desk
                stolen = Generate(ids, (1,), TextPrompt("hello"), sampling, tenant=claimed, emitted=((),), attempt=9)
                bob.generate(stolen, [heard])
                await until(lambda heard=heard: any(isinstance(event, Failed) for event in heard.events))
                assert [type(event) for event in heard.events if not isinstance(event, Accepted)] == [Failed]
        assert await bob.recall("a", tenant) == []
        for visit in bob._visits.values():
            visit.send(Abort(ids))
        # Its owner hears on, and has what it left.
        so_far = len(one.events)
        await until(lambda: len(one.events) > so_far + 20)
        bob.generate(
            Generate(bob.new_ids(1), (2,), TextPrompt("hello"), Sampling(max_tokens=3), tenant=tenant, answer="b", notes=b"n"), [other]
        )
        await until(lambda: any(isinstance(event, End) for event in other.events))
        alice.abort(ids)
        async with asyncio.timeout(20):
            while not (kept := await alice.recall("a")):
                await asyncio.sleep(0.01)
        assert {one.generate.tenant for one in kept} == {tenant}
        assert await alice.recall("b") == []
        assert {one.generate.tenant for one in await bob.recall("b")} == {f"curve:{bob._pair.public.decode()}"}
    engine.until_empty(20)


async def test_a_deadline_is_counted_from_when_the_engine_hears_of_it(engine):
    with contextlib.closing(await engine.guest("alice")) as client:
        heard = Heard()
        sampling, deadline = Sampling(max_tokens=5000, ignore_eos=True), time.monotonic() + 0.5
        client.generate(Generate(client.new_ids(1), (1,), TextPrompt("hello"), sampling, deadline=deadline), [heard])
        await until(lambda: any(isinstance(event, End | Failed) for event in heard.events))
        assert len(heard.events) > 2 and "timeout" in repr(heard.events[-1])


def plain_socket(engine: Listening, **options) -> zmq.Socket:
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    for name, value in options.items():
        setattr(peer, name, value)
    peer.connect(engine.addresses()[0])
    return peer


async def test_who_shows_no_key_is_not_let_in(engine):
    """Neither in plain, nor by a user's name and password."""
    before, rejected = refused(engine), engine.metric("headrace_rejected_frames_total", process="tokenizer-0")
    for options in ({}, {"plain_username": b"alice", "plain_password": b"alice"}):
        counted = refused(engine)
        with plain_socket(engine, **options) as peer:
            peer.send(encode(Describe(1)))
            await until_refused(engine, counted)
            assert not peer.poll(200)
    assert refused(engine) > before
    assert engine.metric("headrace_rejected_frames_total", process="tokenizer-0") == rejected


@pytest.mark.parametrize("what", hostile.BEFORE_ZMTP)
async def test_who_does_not_speak_the_protocol_is_hung_up_on(engine, what):
    pids = engine.pids()
    for address in engine.addresses():
        with socket.create_connection(("127.0.0.1", port_of(address)), timeout=20) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(hostile.BEFORE_ZMTP[what])
            while await asyncio.to_thread(raw.recv, 65536):
                pass
    assert engine.pids() == pids
    with contextlib.closing(await engine.guest("alice")) as client:
        assert (await read(client, 3, 5, []))[1] == 5
