"""Mailboxes, desks and visits over real sockets, and frames that nobody should have sent."""

import asyncio
import os
import select

import msgspec
import pytest
import zmq

from headrace.engine.actor import BURST, Desk, Mailbox, Outbox, Reader, Visit, endpoint
from headrace.engine.messages.frontend import Abort, CallFailed, Describe, Detokenized, Text, ToFrontend, ToTokenizer
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.steps import Begin, Hello, Plan, StepResult, StepTimes, ToWorker, WorkerUp
from headrace.engine.messages.tokens import Submit, TokenLogprobs, Tokens
from headrace.engine.messages.wire import BadFrame, Codec, encode


class Collector:
    """An actor that keeps its messages and counts its bursts."""

    def __init__(self) -> None:
        self.messages = []
        self.bursts = 0
        self._changed = asyncio.Event()

    def receive(self, message) -> None:
        self.messages.append(message)

    def settle(self) -> None:
        self.bursts += 1
        self._changed.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.messages) < count:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


async def test_messages_arrive_in_order_and_a_burst_settles_once(context, tmp_path):
    mailbox, actor = Mailbox(context, endpoint(tmp_path, "a"), ToWorker), Collector()
    outbox = Outbox(context, endpoint(tmp_path, "a"))
    count = 3 * BURST
    for epoch in range(count):
        assert outbox.send(Begin(epoch, 1, 16, ()))
    mailbox.open(actor)
    await actor.until(count)
    assert [message.epoch for message in actor.messages] == list(range(count))
    assert actor.bursts < count


async def test_what_is_sent_before_the_peer_is_there_waits_for_it(context, tmp_path):
    outbox = Outbox(context, endpoint(tmp_path, "late"))
    outbox.send(Hello(1))
    mailbox, actor = Mailbox(context, endpoint(tmp_path, "late"), ToWorker), Collector()
    mailbox.open(actor)
    await actor.until(1)
    assert actor.messages == [Hello(1)]


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xc1", b"\x93\xa5Begin", encode(Abort((1,))), encode(Begin(1, 1, 1, ()))[:-1], b"\x91" * 5000, b"\xa5Hello", b"\x91\xa5Hallo"],
    ids=["empty", "reserved byte", "cut", "of another union", "one byte short", "deep", "no array", "unknown tag"],
)
async def test_a_hostile_frame_is_counted_and_the_next_message_still_arrives(context, tmp_path, frame):
    mailbox, actor = Mailbox(context, endpoint(tmp_path, "a"), ToWorker), Collector()
    mailbox.open(actor)
    stranger = context.socket(zmq.PUSH)
    stranger.connect(endpoint(tmp_path, "a"))
    stranger.send(frame)
    stranger.send(encode(Hello(1)))
    await actor.until(1)
    assert actor.messages == [Hello(1)]
    assert mailbox.rejected.value == 1


@pytest.mark.parametrize(
    "message",
    [
        Tokens(1, 1, [1], [0], [5]),
        StepResult(1, 1, 0, 0, [1], [1], [5], [], [], StepTimes(0, 0, 0, 0)),
        Plan(1, 1, 0, [], [], [], [1], [1]),
        TokenLogprobs(1, 0, -1.0, (5,), (-1.0,)),
        Text([1], ["x"], [1]),
    ],
    ids=lambda message: type(message).__name__,
)
def test_columns_of_different_lengths_are_a_bad_frame(message):
    codec = Codec(type(message))
    assert codec.decode(encode(message)) == message
    columns = [name for name in message.__struct_fields__ if isinstance(getattr(message, name), list | tuple) and getattr(message, name)]
    for name in columns:
        fields = msgspec.structs.asdict(message) | {name: getattr(message, name) * 2}
        with pytest.raises(BadFrame):
            codec.decode(msgspec.msgpack.encode([type(message).__name__, *fields.values()]))


@pytest.mark.parametrize(
    "message",
    [
        WorkerUp(-1, 1, 64, 16),
        WorkerUp(0, 1, 0, 16),
        WorkerUp(0, 1, 64, 0),
        Begin(1, 1 << 40, 16, ()),
        Submit(1, "tokenizer-0", [], Sampling(), 1),
        Submit(1, "tokenizer-0", [1 << 40], Sampling(), 1),
        Submit(1, "tokenizer-0", [-1], Sampling(), 1),
        Submit(1, "tokenizer-0", [1], Sampling(), 1, deadline=float("nan")),
        Submit(1, "tokenizer-0", [1], Sampling(), 1, deadline=float("inf")),
    ],
)
def test_a_number_that_no_ledger_or_timer_takes_is_a_bad_frame(message):
    with pytest.raises(BadFrame):
        Codec(type(message)).decode(encode(message))


async def test_a_message_has_one_frame(context, tmp_path):
    mailbox, actor = Mailbox(context, endpoint(tmp_path, "a"), ToWorker), Collector()
    mailbox.open(actor)
    stranger = context.socket(zmq.PUSH)
    stranger.connect(endpoint(tmp_path, "a"))
    stranger.send_multipart([b"", encode(Begin(1, 1, 1, ()))])
    stranger.send(encode(Hello(1)))
    await actor.until(1)
    assert actor.messages == [Hello(1)]
    assert mailbox.rejected.value == 1


def test_a_number_where_text_should_be_is_a_bad_frame():
    with pytest.raises(BadFrame):
        Codec(ToFrontend).decode(encode(Detokenized(1, 7)))  # type: ignore[arg-type]


class TakenBack:
    """A socket whose first message is gone between the question whether there is one and the answer."""

    closed = False

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._said = iter([zmq.POLLIN, zmq.POLLIN, zmq.POLLIN, 0])
        self._frames = iter([None, [b"later"]])

    def getsockopt(self, option: int) -> int:
        return self._descriptor if option == zmq.FD else int(next(self._said))

    def recv_multipart(self, flags: int, copy: bool) -> list[bytes]:
        frames = next(self._frames)
        if frames is None:
            raise zmq.Again
        return frames


async def test_a_message_that_is_taken_back_stops_nobody():
    reading, writing = os.pipe()
    received, settled = [], asyncio.Event()
    Reader(TakenBack(reading), received.append, settled.set)
    await asyncio.wait_for(settled.wait(), 10)
    assert received == [[b"later"]]
    asyncio.get_running_loop().remove_reader(reading)
    os.close(reading)
    os.close(writing)


async def test_what_one_visit_says_is_heard_though_another_is_gone_at_that_moment(context, tmp_path):
    heard = asyncio.Event()
    desk = Desk(context, endpoint(tmp_path, "desk"), ToTokenizer)
    desk.open(lambda identity, message: heard.set(), lambda: None)
    visit = Visit(context, endpoint(tmp_path, "desk"), b"a visit", ToFrontend)
    visit.open(lambda message: None)
    visit.send(Describe(1))
    await asyncio.wait_for(heard.wait(), 5)
    heard.clear()
    visit.send(Describe(2))
    # It has come, and the loop has not looked yet.
    assert select.select([desk._socket.getsockopt(zmq.FD)], [], [], 5)[0]
    assert not desk.send(b"somebody who is gone", CallFailed(1, 400, "", ""))
    await asyncio.wait_for(heard.wait(), 5)
    visit.close()
    desk.close()


async def test_a_desk_answers_each_visit_and_knows_when_one_is_gone(context, tmp_path):
    desk = Desk(context, endpoint(tmp_path, "d"), ToTokenizer)
    seen = []
    desk.open(lambda identity, message: seen.append((identity, desk.send(identity, CallFailed(message.call, 400, "", "")))), lambda: None)
    visits = {}
    for name in (b"one", b"two"):
        collector = visits[name] = Collector()
        visit = Visit(context, endpoint(tmp_path, "d"), name, ToFrontend)
        visit.open(collector.receive, collector.settle)
        visit.send(Describe(len(visits)))
    for index, collector in enumerate(visits.values(), 1):
        await collector.until(1)
        assert collector.messages[0].call == index
    assert sorted(seen) == [(b"one", True), (b"two", True)]
    assert desk.send(b"nobody", CallFailed(1, 400, "", "")) is False
