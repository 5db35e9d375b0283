"""Both HTTP clients against a server that answers, refuses and breaks on demand.

Every behaviour is tested once for both: `run` calls the synchronous client as it is, and the asynchronous one on a loop.
"""

import asyncio
import inspect
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from headrace import client as library
from headrace.client import AsyncClient, Client
from headrace.client.errors import error_from, error_from_event
from headrace.client.parameters import ChatParameters, CompletionParameters
from headrace.engine.messages.openai import requests
from tests.client.fake_server import MODEL, Behaviour, FakeServer, serving

QUESTION = [{"role": "user", "content": "one two three"}]


class Twin:
    """One of the two clients behind the same blocking calls."""

    def __init__(self, kind: str, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop() if kind == "async" else None
        self.client: Any = AsyncClient(url, **options) if kind == "async" else Client(url, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *given, **named: self.wait(getattr(self.client, name)(*given, **named))

    def wait(self, result: Any) -> Any:
        if self._loop and inspect.isawaitable(result):
            return self._loop.run_until_complete(self._as_coroutine(result))
        return result

    async def _as_coroutine(self, result: Awaitable[Any]) -> Any:
        return await result

    def next(self, stream: Any) -> Any:
        return self.wait(stream.__anext__()) if self._loop else next(stream)

    def texts(self, stream: Any) -> list[str]:
        texts: list[str] = []
        try:
            while True:
                chunk = self.next(stream)
                texts += [choice.delta.content if hasattr(choice, "delta") else choice.text for choice in chunk.choices]
        except (StopIteration, StopAsyncIteration):
            return [text for text in texts if text]

    def stop(self) -> None:
        self.wait(self.client.close())
        if self._loop:
            self._loop.close()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest):
    """Makes a client for a server; all are closed at the end."""
    made: list[Twin] = []

    def make(server: FakeServer | str, **options: Any) -> Twin:
        made.append(Twin(request.param, server if isinstance(server, str) else server.url, **options))
        return made[-1]

    yield make
    for twin in made:
        twin.stop()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_an_answer_comes_whole(connect) -> None:
    with serving() as server:
        answer = connect(server).chat(QUESTION, max_tokens=3, temperature=0.5)
        assert server.requests == [{"model": MODEL, "messages": QUESTION, "max_tokens": 3, "temperature": 0.5}]
    assert answer.choices[0].message.content == " w0 w1 w2"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_a_continuation_comes_whole(connect) -> None:
    with serving() as server:
        answer = connect(server).complete([5, 6, 7], max_tokens=2)
        assert server.requests[0]["prompt"] == [5, 6, 7]
    assert answer.choices[0].text == " w0 w1"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_stream_gives_the_text_as_it_comes_and_the_usage_last(connect, line_end: bytes) -> None:
    with serving(Behaviour(line_end=line_end)) as server:
        twin = connect(server)
        stream = twin.chat_stream(QUESTION, max_tokens=3, stream_options={"include_usage": True})
        chunks = []
        with pytest.raises((StopIteration, StopAsyncIteration)):
            while True:
                chunks.append(twin.next(stream))
        assert twin.texts(twin.complete_stream("a b", max_tokens=4)) == [" w0", " w1", " w2", " w3"]
    assert [chunk.choices[0].delta.content for chunk in chunks[1:4]] == [" w0", " w1", " w2"]
    assert chunks[-1].usage.completion_tokens == 3 and chunks[-1].choices == []


def test_a_server_that_closes_the_connection_after_each_stream_is_asked_again_on_a_new_one(connect) -> None:
    with serving(Behaviour(hang_up=True)) as server:
        twin = connect(server)
        for _ in range(2):
            assert twin.texts(twin.complete_stream("a b", max_tokens=2)) == [" w0", " w1"]


def test_a_stream_shows_each_chunk_before_the_next_is_made(connect) -> None:
    with serving(Behaviour(token_delay_s=30)) as server:
        twin = connect(server)
        stream = twin.complete_stream("a b", max_tokens=2)
        assert twin.next(stream).choices[0].text == " w0"
        stream.close()


def test_closing_a_stream_stops_the_server(connect) -> None:
    with serving(Behaviour(token_delay_s=0.02)) as server:
        twin = connect(server)
        stream = twin.chat_stream(QUESTION, max_tokens=100_000)
        twin.next(stream)
        stream.close()
        if twin._loop:
            twin.wait(asyncio.sleep(0))
        assert server.disconnects.acquire(timeout=10)
        with pytest.raises((StopIteration, StopAsyncIteration)):
            twin.next(stream)


def test_a_forgotten_stream_stops_the_server() -> None:
    with serving(Behaviour(token_delay_s=0.02)) as server, Client(server.url) as client:
        for _ in client.chat_stream(QUESTION, max_tokens=100_000):
            break
        assert server.disconnects.acquire(timeout=10)


@pytest.mark.parametrize(
    "behaviour",
    [Behaviour(break_after=2, token_delay_s=0.05), Behaviour(end_without_done=True, stops_after=2)],
    ids=["broken", "no end mark"],
)
def test_a_stream_that_ends_without_its_end_mark_is_an_error(connect, behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        twin = connect(server)
        stream = twin.complete_stream("a b", max_tokens=5)
        assert [twin.next(stream).choices[0].text for _ in range(2)] == [" w0", " w1"]
        with pytest.raises(library.Disconnected):
            twin.next(stream)
        with pytest.raises((StopIteration, StopAsyncIteration)):
            twin.next(stream)


def test_an_error_within_a_stream_comes_after_the_text_before_it(connect) -> None:
    with serving(Behaviour(error_after=2)) as server:
        twin = connect(server)
        stream = twin.complete_stream("a b", max_tokens=5)
        assert [twin.next(stream).choices[0].text for _ in range(2)] == [" w0", " w1"]
        with pytest.raises(library.ServerError, match="the worker died"):
            twin.next(stream)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, library.BadRequest),
        (401, library.Unauthorized),
        (404, library.NotFound),
        (413, library.BadRequest),
        (418, library.APIError),
        (500, library.ServerError),
        (502, library.ServerError),
    ],
)
def test_every_status_has_its_error_and_is_not_tried_again(connect, status: int, kind: type[library.APIError]) -> None:
    with serving(Behaviour(failures=[(status, {})])) as server:
        with pytest.raises(kind) as raised:
            connect(server).chat(QUESTION)
        assert type(raised.value) is kind
        assert (raised.value.status, raised.value.code, str(raised.value)) == (status, f"code_{status}", f"refused with {status}")
        assert len(server.requests) == 1


def test_an_error_names_the_parameter(connect) -> None:
    with serving() as server, pytest.raises(library.NotFound) as raised:
        connect(server).chat(QUESTION, model="other")
    assert raised.value.param == "model"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_busy_server_is_asked_again_after_the_time_it_names(connect, status: int, streamed: bool) -> None:
    with serving(Behaviour(failures=[(status, {"Retry-After": "0.1"}), (status, {})])) as server:
        twin = connect(server)
        twin.models()
        start = time.monotonic()
        if streamed:
            assert twin.texts(twin.complete_stream("a", max_tokens=1)) == [" w0"]
        else:
            assert twin.complete("a", max_tokens=1).choices[0].text == " w0"
        # 0.1 s as asked, then the second wait of our own, 0.5 s.
        assert 0.6 <= time.monotonic() - start < 3
        assert len(server.requests) == 3


def test_a_busy_server_is_asked_only_so_often(connect) -> None:
    with serving(Behaviour(failures=[(429, {"Retry-After": "0.01"})] * 9)) as server:
        with pytest.raises(library.RateLimited) as raised:
            connect(server, retries=3).chat(QUESTION)
        assert raised.value.retry_after == 0.01
        assert len(server.requests) == 4


def test_a_server_that_asks_for_too_long_a_wait_gets_none(connect) -> None:
    with serving(Behaviour(failures=[(503, {"Retry-After": "3600"})])) as server:
        with pytest.raises(library.Unavailable):
            connect(server).chat(QUESTION)
        assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_unreachable(connect) -> None:
    with pytest.raises(library.Unreachable):
        connect(f"http://127.0.0.1:{free_port()}", retries=0).health()


def test_a_refused_connection_is_tried_again_until_someone_listens(connect) -> None:
    port = free_port()
    answered = threading.Event()

    def listen_late() -> None:
        # The first try has failed when this begins to listen: 0.25 s is the client's first wait.
        with socket.create_server(("127.0.0.1", port)) as listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                body = b'{"object":"list","data":[]}'
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
                answered.set()

    timer = threading.Timer(0.1, listen_late)
    timer.start()
    assert connect(f"http://127.0.0.1:{port}").models() == []
    timer.join(10)
    assert answered.is_set()


def test_a_silent_server_times_out(connect) -> None:
    with serving(Behaviour(silent=True)) as server, pytest.raises(library.Timeout, match=r"0\.2 s"):
        connect(server, timeout=0.2).chat(QUESTION)


def test_a_slow_stream_does_not_time_out_while_it_goes_on(connect) -> None:
    with serving(Behaviour(token_delay_s=0.1)) as server:
        twin = connect(server, timeout=0.5)
        assert len(twin.texts(twin.complete_stream("a", max_tokens=8))) == 8


def test_a_server_that_accepts_and_hangs_up_is_disconnected_and_not_asked_twice(connect) -> None:
    accepted = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            nonlocal accepted
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                accepted += 1
                connection.recv(65536)
                connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        with pytest.raises(library.Disconnected):
            connect(f"http://127.0.0.1:{listener.getsockname()[1]}").complete("a", model="m")
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert accepted == 1


def test_a_connection_serves_many_calls() -> None:
    with serving() as server, Client(server.url) as client:
        for _ in range(3):
            client.complete("a", max_tokens=1)
            assert len(list(client.complete_stream("a", max_tokens=1))) == 2
        assert len(client._idle) == 1


def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    with serving() as server:
        client = Client(server.url)
        client.complete("a", max_tokens=1)
        port = server.port
    with socket.create_server(("127.0.0.1", port)), pytest.raises(library.Timeout):
        # Another server took the place: the call must have gone to it.
        client._timeout = 0.2
        client.complete("a", max_tokens=1)
    client.close()


def test_the_key_is_sent(connect) -> None:
    with serving(Behaviour(api_key="secret")) as server:
        assert connect(server, api_key="secret").complete("a", max_tokens=1)
        with pytest.raises(library.Unauthorized):
            connect(server).complete("a")


def test_models_tokens_and_health_can_be_asked_for(connect) -> None:
    with serving() as server:
        twin = connect(server.url + "/v1")
        assert [model.id for model in twin.models()] == [MODEL]
        ids = twin.tokenize("red green red")
        assert ids[0] == ids[2] != ids[1]
        assert twin.detokenize(ids) == "red green red"
        assert len(twin.tokenize(QUESTION)) == 13
        assert twin.health()


def test_a_server_that_is_not_ready_says_so_at_once(connect) -> None:
    with serving(Behaviour(health=(503, {"status": "starting"}))) as server, pytest.raises(library.Unavailable, match="starting"):
        connect(server, retries=5).health()


@pytest.mark.parametrize(
    ("named", "request_type"), [(ChatParameters, requests.Chat), (CompletionParameters, requests.Completion)], ids=["chat", "completions"]
)
def test_the_named_parameters_are_those_of_the_endpoint(named: type, request_type: type) -> None:
    assert named.__annotations__.keys() <= {field.name for field in msgspec.structs.fields(request_type)}


def test_an_answer_that_is_no_answer_is_disconnected(connect) -> None:
    wrong = Behaviour(models={"object": "list", "data": "none"})
    with serving(wrong) as server, pytest.raises(library.Disconnected, match="not what was expected"):
        connect(server).models()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_is_none_is_named(kind: type) -> None:
    with pytest.raises(ValueError, match="ftp://x"):
        kind("ftp://x")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"message":"m","code":"c","param":"p"}}', "m"),
        (b'{"error":"just text"}', "just text"),
        (b'{"message":"flat"}', "flat"),
        (b"<html>  bad\n gateway</html>", "<html> bad gateway</html>"),
        (b"", "the server answered with status 502"),
        (b"[1]", "[1]"),
    ],
)
def test_an_error_body_of_any_form_gives_a_message(body: bytes, message: str) -> None:
    assert str(error_from(502, body)) == message


def test_text_that_speaks_of_errors_is_no_error() -> None:
    assert error_from_event(b'{"choices":[{"text":"{\\"error\\": 1}"}]}') is None
    assert error_from_event(b'{"error":null,"choices":[]}') is None
    assert isinstance(error_from_event(b'{"error":{"message":"m","code":429}}'), library.RateLimited)


def test_importing_the_library_loads_neither_torch_nor_a_web_server() -> None:
    code = "import sys, headrace.client as c; c.AsyncClient();"
    code += "print([m for m in ('torch', 'aiohttp', 'aiohttp.web', 'zmq') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_async_client_loads_only_aiohttps_client_half() -> None:
    code = (
        "import sys, asyncio, headrace.client as c\n"
        "async def main():\n"
        "    async with c.AsyncClient('http://127.0.0.1:1', retries=0) as client:\n"
        "        try: await client.health()\n"
        "        except c.Unreachable: print('aiohttp.web' in sys.modules, 'torch' in sys.modules)\n"
        "asyncio.run(main())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False False"
