"""Clients that send slowly, never read, come in crowds or speak no HTTP: each is answered or hung up on, and nobody else waits."""

import asyncio
import json

import pytest

from headrace.engine.messages.frontend import Abort
from tests.server.scripted import PATIENCE, Stage, ended

BODY = b'{"prompt":"x"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
async def open_stage():
    stages = []

    async def start(**settings) -> Stage:
        stage = Stage("ready", settings)
        stages.append(stage)
        await stage.open()
        return stage

    yield start
    for stage in stages:
        await stage.close()


async def answer_to(stage: Stage, *pieces: bytes) -> tuple[int, dict[str, str], dict]:
    """Status, headers and JSON body of the answer to raw bytes; the server must close after it."""
    reader, writer = await stage.connect()
    for piece in pieces:
        writer.write(piece)
    said = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    head, _, body = said.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    return int(status.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "malformed_http"),
        (b"GET\r\n\r\n", 400, "malformed_http"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400, "malformed_http"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "malformed_http"),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400, "malformed_http"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 5000 + b"\r\n", 400, "malformed_http"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9000000\r\n\r\n" + b" " * 9_000_000,
            413,
            "body_too_large",
        ),
    ],
    ids=["TLS", "no path", "a negative length", "two lengths", "no colon", "a long path", "a long header", "many headers", "a large body"],
)
async def test_what_is_no_request_or_too_large_is_told_so_in_openais_shape(open_stage, sent, status, code):
    stage = await open_stage()
    got, headers, body = await answer_to(stage, sent)
    assert (got, body["error"]["code"]) == (status, code)
    assert headers["content-type"].startswith("application/json")
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"] and len(body["error"]["message"]) < 300


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, content: bytes) -> bytes:
    """Send a byte whenever the server has been silent for a moment; what it says before it hangs up."""
    said = b""
    for place in range(len(content)):
        writer.write(content[place : place + 1])
        try:
            piece = await asyncio.wait_for(reader.read(65536), 0.02)
        except TimeoutError:
            continue
        if not piece:
            return said
        said += piece
    raise AssertionError("the server waits for a client that sends a byte now and then")


@pytest.mark.parametrize("part", ["head", "body"])
async def test_bytes_that_trickle_in_do_not_keep_a_connection_open(open_stage, monkeypatch, part):
    monkeypatch.setattr("headrace.server.server.IDLE_TIMEOUT", 0.3)
    monkeypatch.setattr("headrace.server.server.LINGER_TIMEOUT", 0.1)
    monkeypatch.setattr("headrace.server.openai.routes.BODY_TIMEOUT", 0.3)
    stage = await open_stage()
    reader, writer = await stage.connect()
    head = HEAD % 100_000
    if part == "body":
        writer.write(head)
    said = await trickle(reader, writer, (head if part == "head" else b"") + b" " * 1000)
    writer.close()
    if part == "body":
        assert b"408" in said.partition(b"\r\n")[0] and b'"request_timeout"' in said
    assert await stage.complete_and_finish() == "fine"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_nobody_reads_is_given_up(open_stage, monkeypatch, stream):
    monkeypatch.setattr("headrace.server.sse.STALL_TIMEOUT", 0.2)
    stage = await open_stage()
    reader, writer = await stage.connect(limit=1024)
    body = b'{"prompt":"x","stream":%b}' % (b"true" if stream else b"false")
    writer.write(HEAD % len(body) + body)
    (request,) = (await stage.desk.accept()).requests
    gone = asyncio.create_task(closed(stage))
    stage.desk.say(request, "much " * 4_000_000, [7], ended(request))
    await asyncio.wait_for(gone, PATIENCE)
    assert await stage.complete_and_finish() == "fine"
    writer.close()
    del reader


async def closed(stage: Stage) -> None:
    """Wait until the server has no connection left."""
    while stage.server._runner.server.connections:
        await asyncio.sleep(0)


async def test_a_crowd_that_reads_nothing_holds_up_nobody_else(open_stage, monkeypatch):
    monkeypatch.setattr("headrace.server.sse.STALL_TIMEOUT", 0.5)
    stage = await open_stage()
    body = b'{"prompt":"x","stream":true}'
    writers = []
    for _ in range(5):
        _, writer = await stage.connect(limit=1024)
        writer.write(HEAD % len(body) + body)
        writers.append(writer)
    requests = {request for _ in writers for request in (await stage.desk.accept()).requests}
    for request in requests:
        for _ in range(100):
            stage.desk.say(request, "much " * 20_000)
    assert await stage.complete_and_finish() == "fine"
    given_up = set()
    while given_up != requests:
        given_up |= set((await stage.desk.next(Abort)).requests)
    for writer in writers:
        writer.close()


async def test_connections_beyond_the_limit_are_refused_until_others_end(open_stage, monkeypatch):
    monkeypatch.setattr("headrace.server.connections.MOST_CONNECTIONS", 3)
    stage = await open_stage()
    held = [await stage.connect() for _ in range(3)]
    for reader, writer in held:
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await asyncio.wait_for(reader.readline(), PATIENCE)
    status, headers, body = await answer_to(stage, b"")
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")
    assert "3 connections" in body["error"]["message"]
    assert {one.name: one.value for one in stage.process.metrics.snapshot()}["headrace_connections_refused_total"] == 1
    for _, writer in held:
        writer.close()
    await asyncio.wait_for(closed(stage), PATIENCE)
    assert await stage.complete_and_finish() == "fine"


def test_no_more_connections_are_taken_than_files_can_be_opened(monkeypatch):
    from headrace.server import connections

    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    assert connections.most_connections() == 1024 - connections.SPARE_FILES
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    assert connections.most_connections() == connections.MOST_CONNECTIONS
