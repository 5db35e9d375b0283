"""The direct client against desks that say what the test tells them to."""

import asyncio
import contextlib
import select
import shutil

import pytest
import zmq

from headrace.client.direct import CallError, DirectClient, Piece, RequestFailed
from headrace.engine.messages.frontend import (
    Abort,
    Accepted,
    CallFailed,
    Describe,
    Detokenize,
    Detokenized,
    Failed,
    Generate,
    ModelCard,
    Text,
    TextPrompt,
    Tokenize,
    Tokenized,
)
from headrace.engine.messages.sampling import Sampling
from tests.server.scripted import PATIENCE, ScriptedDesk, ended, short_folder


class Heard:
    """A sink that writes down what happened."""

    def __init__(self) -> None:
        self.text_so_far = ""
        self.tokens = 0
        self.events: list[object] = []
        self._news = asyncio.Event()

    def accepted(self, message) -> None:
        self._note(message)

    def prompt_scores(self, message) -> None:
        self._note(message)

    def text(self, text, count, scores, now) -> None:
        self.text_so_far += text
        self.tokens += count
        self._note(text)

    def end(self, message, now) -> None:
        self._note(message)

    def failed(self, message) -> None:
        self._note(message)

    def _note(self, event) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, count: int) -> list[object]:
        """Wait for as many events."""
        async with asyncio.timeout(PATIENCE):
            while len(self.events) < count:
                self._news.clear()
                await self._news.wait()
        return self.events


class Scene:
    def __init__(self, tokenizers: int) -> None:
        self.run_dir = short_folder()
        self.names = [f"tokenizer-{place}" for place in range(tokenizers)]
        self.desks = [ScriptedDesk(self.run_dir, name) for name in self.names]
        self.client = DirectClient(self.run_dir, self.names)

    def generate(self, count: int = 1) -> tuple[tuple[int, ...], list[Heard]]:
        ids, sinks = self.client.new_ids(count), [Heard() for _ in range(count)]
        self.client.generate(Generate(ids, tuple(range(count)), TextPrompt("hi"), Sampling()), sinks)
        return ids, sinks

    def revive(self, place: int) -> ScriptedDesk:
        """A desk dies, and its successor stands where it stood."""
        self.desks[place].close()
        self.client.tokenizer_died(self.names[place])
        self.desks[place] = ScriptedDesk(self.run_dir, self.names[place])
        return self.desks[place]

    async def close(self) -> None:
        self.client.close()
        for desk in self.desks:
            desk.close()
        shutil.rmtree(self.run_dir)


@pytest.fixture
async def open_scene():
    scenes = []

    def start(tokenizers: int = 1) -> Scene:
        scenes.append(Scene(tokenizers))
        return scenes[-1]

    yield start
    for scene in scenes:
        await scene.close()


@pytest.fixture
async def scene(open_scene):
    return open_scene()


async def test_each_thing_that_happens_reaches_the_requests_own_sink_in_order(scene):
    (first, second), (one, two) = scene.generate(2)
    desk = scene.desks[0]
    await desk.accept()
    desk.send(Text([first, second], ["a", "bc"], [1, 2], [], [], [4, 5, 6]))
    desk.send(Text([second], ["d"], [1], [ended(second), ended(first)], [], [7]))
    assert await one.until(3) == [Accepted(first, 5), "a", ended(first)]
    assert await two.until(4) == [Accepted(second, 5), "bc", "d", ended(second)]
    assert two.tokens == 3
    assert scene.client.live == 0


async def test_ids_are_unique_over_clients_and_fit_64_bits(open_scene):
    ids = [request for _ in range(3) for request in open_scene().client.new_ids(100)]
    assert len(set(ids)) == 300
    assert all(0 < request < 2**64 for request in ids)


async def test_requests_go_to_the_tokenizer_with_the_fewest(open_scene):
    scene = open_scene(2)
    scene.generate(2)
    (lonely,), (sink,) = scene.generate()
    scene.generate()
    assert len((await scene.desks[0].next(Generate)).requests) == 2
    assert (await scene.desks[1].accept()).requests == (lonely,)
    await scene.desks[1].next(Generate)
    scene.desks[1].say(lonely, "", [], ended(lonely))
    await sink.until(2)
    scene.generate()
    await scene.desks[1].next(Generate)


async def test_a_failed_request_has_that_as_its_last_word(scene):
    (request,), (sink,) = scene.generate()
    await scene.desks[0].next(Generate)
    failed = Failed(request, 429, "queue_full", "too many wait", retry_after=2.0)
    scene.desks[0].send(failed, Accepted(request, 5))
    assert await sink.until(1) == [failed]
    await asyncio.wait_for(asyncio.gather(scene.client.describe(), answer_describe(scene.desks[0])), PATIENCE)
    assert sink.events == [failed]


async def answer_describe(desk: ScriptedDesk) -> None:
    asked = await desk.next(Describe)
    desk.send(ModelCard(asked.call, "m", 10, 20, True, 0))


async def test_an_aborted_request_is_told_to_its_tokenizer_and_heard_of_no_more(open_scene):
    scene = open_scene(2)
    (first,), (sink,) = scene.generate()
    (second,), _ = scene.generate()
    await scene.desks[0].accept()
    await scene.desks[1].accept()
    await sink.until(1)
    scene.client.abort((first, second))
    scene.client.abort((first, second))
    assert (await scene.desks[0].next(Abort)).requests == (first,)
    assert (await scene.desks[1].next(Abort)).requests == (second,)
    scene.desks[0].say(first, "late", [1], ended(first))
    await asyncio.wait_for(asyncio.gather(scene.client.describe(), answer_describe(scene.desks[0])), PATIENCE)
    assert len(sink.events) == 1
    assert scene.client.live == 0
    assert scene.desks[0].hears_nothing() and scene.desks[1].hears_nothing()


async def test_when_its_tokenizer_dies_a_request_moves_to_another_with_the_tokens_it_has(open_scene):
    scene = open_scene(2)
    (first, second), (one, two) = scene.generate(2)
    generate = await scene.desks[0].accept()
    scene.desks[0].send(Text([first, second], ["a", "bc"], [1, 2], [], [], [4, 5, 6]))
    await one.until(2)
    await two.until(2)
    scene.client.tokenizer_died("tokenizer-0")
    again = [await scene.desks[1].accept() for _ in range(2)]
    assert [(one.requests, one.seeds, one.emitted, one.attempt) for one in again] == [
        ((first,), (0,), ((4,),), 1),
        ((second,), (1,), ((5, 6),), 1),
    ]
    assert all(one.prompt == generate.prompt and one.sampling == generate.sampling for one in again)
    scene.desks[1].say(second, "d", [7], ended(second))
    await two.until(5)
    assert two.text_so_far == "bcd"


async def test_the_only_tokenizers_successor_gets_its_requests(scene):
    (request,), (sink,) = scene.generate()
    await scene.desks[0].accept()
    scene.desks[0].say(request, "a", [4])
    await sink.until(2)
    successor = scene.revive(0)
    assert (await successor.accept()).emitted == ((4,),)
    successor.say(request, "b", [5], ended(request))
    await sink.until(5)
    assert sink.text_so_far == "ab"


async def test_what_a_dead_tokenizer_said_last_is_not_delivered_twice(open_scene):
    scene = open_scene(2)
    (request,), (sink,) = scene.generate()
    await scene.desks[0].accept()
    scene.desks[0].say(request, "a", [4])
    await sink.until(2)
    # It says one more thing, and the client hears of the death before it has read that.
    scene.desks[0].say(request, "b", [5])
    incoming = scene.client._visits["tokenizer-0"]._socket.getsockopt(zmq.FD)
    assert select.select([incoming], [], [], PATIENCE)[0]
    scene.desks[0].close()
    scene.client.tokenizer_died("tokenizer-0")
    again = await scene.desks[1].accept()
    told = [4, 5, 6, 7][len(again.emitted[0]) :]
    for token in told:
        scene.desks[1].say(request, "xxxxabcd"[token], [token], ended(request) if token == 7 else None)
    async with asyncio.timeout(PATIENCE):
        while scene.client.live:
            await sink.until(len(sink.events) + 1)
    assert sink.text_so_far == "abcd"
    assert sink.tokens == 4


async def test_calls_are_answered_each_by_its_own_answer(scene):
    desk = scene.desks[0]
    tokenized = asyncio.create_task(scene.client.tokenize(TextPrompt("a b")))
    detokenized = asyncio.create_task(scene.client.detokenize((1, 2)))
    first, second = await desk.next(Tokenize), await desk.next(Detokenize)
    desk.send(Detokenized(second.call, "ab"), Tokenized(first.call, [3, 4], None, 10))
    assert (await detokenized).text == "ab"
    assert (await tokenized).ids == [3, 4]


async def test_a_call_that_cannot_be_served_says_why(scene):
    call = asyncio.create_task(scene.client.detokenize((99,)))
    asked = await scene.desks[0].next(Detokenize)
    scene.desks[0].send(CallFailed(asked.call, 400, "invalid_value", "tokens holds 99", "tokens"))
    with pytest.raises(CallError, match="tokens holds 99") as caught:
        await call
    assert caught.value.failure.status == 400


async def test_a_call_survives_the_death_of_its_tokenizer(scene):
    call = asyncio.create_task(scene.client.detokenize((1, 2)))
    await scene.desks[0].next(Detokenize)
    successor = scene.revive(0)
    asked = await successor.next(Detokenize)
    successor.send(Detokenized(asked.call, "ab"))
    assert (await call).text == "ab"


async def test_a_request_that_cannot_even_be_sent_fails_at_once(scene, monkeypatch):
    monkeypatch.setattr("headrace.client.direct.Visit.send", lambda visit, message: False)
    _, (one, two) = scene.generate(2)
    for sink in (one, two):
        (failed,) = await sink.until(1)
        assert failed.status == 503 and failed.retry_after
    assert scene.client.live == 0
    with pytest.raises(CallError, match="does not answer"):
        await scene.client.describe()


async def test_a_client_that_closes_aborts_what_is_live(scene):
    ids, _ = scene.generate(2)
    await scene.desks[0].accept()
    scene.client.close()
    assert (await scene.desks[0].next(Abort)).requests == ids


async def test_a_stream_is_what_happened_in_order(scene):
    async def read() -> list:
        return [event async for event in scene.client.stream(TextPrompt("hi"), Sampling(max_tokens=4), ["stop"], seed=9)]

    reading = asyncio.create_task(read())
    generate = await scene.desks[0].accept()
    (request,) = generate.requests
    assert (generate.seeds, generate.stop, generate.sampling.max_tokens) == ((9,), ("stop",), 4)
    scene.desks[0].say(request, "a")
    scene.desks[0].say(request, "bc", [1, 2], ended(request))
    assert await reading == [Accepted(request, 5), Piece("a", 1, ()), Piece("bc", 2, ()), ended(request)]
    assert scene.client.live == 0
    assert scene.desks[0].hears_nothing()


async def test_a_stream_left_early_is_aborted(scene):
    async with contextlib.aclosing(scene.client.stream(TextPrompt("hi"), Sampling())) as events:
        first = asyncio.ensure_future(anext(events))
        (request,) = (await scene.desks[0].accept()).requests
        await first
    assert (await scene.desks[0].next(Abort)).requests == (request,)


async def test_a_stream_of_a_failed_request_raises_what_went_wrong(scene):
    events = scene.client.stream(TextPrompt("hi"), Sampling())
    first = asyncio.ensure_future(anext(events))
    (request,) = (await scene.desks[0].next(Generate)).requests
    scene.desks[0].send(Failed(request, 400, "invalid_value", "no such thing", "prompt"))
    with pytest.raises(RequestFailed, match="no such thing") as caught:
        await first
    assert caught.value.failure.param == "prompt"
