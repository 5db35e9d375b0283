"""The event parser: any split of the same bytes gives the same events."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import sse
from headrace.client.sse import Event, EventTooLong, Parser

line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
values = st.text(st.characters(blacklist_characters="\r\n\0", blacklist_categories=["Cs"]), max_size=20).map(str.encode)
lines = st.one_of(
    values.map(lambda value: b"data: " + value),
    values.map(lambda value: b"data:" + value),
    values.map(lambda value: b": " + value),
    values.map(lambda value: b"event: " + value),
    values.map(lambda value: b"id: " + value),
    values.map(lambda value: b"unknown: " + value),
    st.sampled_from([b"data", b"", b"", b"retry: 250", b"retry: soon"]),
)
streams = st.lists(st.tuples(lines, line_ends), max_size=20).map(lambda parts: b"".join(line + end for line, end in parts))


def parse(pieces: list[bytes]) -> list[Event]:
    parser = Parser()
    return [event for piece in pieces for event in parser.feed(piece)]


@given(streams, st.data())
def test_the_events_do_not_depend_on_where_the_bytes_are_split(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[start:stop] for start, stop in pairwise([0, *cuts, len(stream)])]
    assert parse(pieces) == parse([stream])


@given(streams)
def test_one_byte_at_a_time_gives_the_same_events(stream: bytes) -> None:
    assert parse([stream[i : i + 1] for i in range(len(stream))]) == parse([stream])


@given(st.lists(st.lists(values, min_size=1, max_size=4), max_size=6), line_ends)
def test_what_a_writer_sends_is_what_a_reader_gets(events: list[list[bytes]], end: bytes) -> None:
    stream = b"".join(b"".join(b"data: " + line + end for line in event) + end for event in events)
    assert [event.data for event in parse([stream])] == [b"\n".join(event) for event in events]


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail(stream: bytes) -> None:
    parse([stream])


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b": a comment\n\ndata: x\n\n", [Event(b"x")]),
        (b"\xef\xbb\xbfdata: x\n\n", [Event(b"x")]),
        (b"event: add\nid: 7\ndata: x\n\ndata: y\n\n", [Event(b"x", "add", "7"), Event(b"y", "message", "7")]),
        (b"id: a\0b\ndata: x\n\n", [Event(b"x")]),
        (b"data\n\n", [Event(b"")]),
        (b"data:  two spaces\n\n", [Event(b" two spaces")]),
        (b"event: only\n\ndata: x\n\n", [Event(b"x")]),
        (b"data: left open\n", []),
    ],
)
def test_it_follows_the_standard(stream: bytes, events: list[Event]) -> None:
    assert parse([stream]) == events


def test_it_keeps_the_reconnection_time() -> None:
    parser = Parser()
    parser.feed(b"retry: 1500\n\n")
    assert parser.retry_ms == 1500


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    parser = Parser()
    with pytest.raises(EventTooLong):
        for _ in range(100):
            parser.feed(b"x" * 100)


def test_comments_do_not_count_towards_an_events_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    parser = Parser()
    for _ in range(100):
        assert parser.feed(b": still here, still here\n") == []
