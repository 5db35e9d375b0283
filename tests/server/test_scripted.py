"""The endpoint in front of a tokenizer that says what the test tells it to: what a healthy engine never shows."""

import asyncio
import json
from hmac import compare_digest
from types import SimpleNamespace

import pytest

from headrace.engine.messages.frontend import Abort, Accepted, Failed, Generate, PromptScores, Scores, Text, TokenScore
from headrace.engine.messages.lifecycle import Drain, Drained, EngineState, Histogram, Progress, Series, Status
from tests.server.scripted import PATIENCE, Stage, ended


@pytest.fixture
async def open_stage():
    stages = []

    async def start(state: str = "ready", **settings) -> Stage:
        stage = Stage(state, settings)
        stages.append(stage)
        await stage.open()
        return stage

    yield start
    for stage in stages:
        await stage.close()


@pytest.fixture
async def stage(open_stage):
    return await open_stage()


def events(body: str) -> list[dict | str]:
    """What an event stream says: the JSON of each event, "[DONE]" as it stands."""
    data = [line[6:] for line in body.split("\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def text_of(body: str) -> str:
    return "".join(choice["text"] for event in events(body) if isinstance(event, dict) for choice in event.get("choices", []))


# Failures


@pytest.mark.parametrize("ask", [Stage.complete, Stage.stream])
@pytest.mark.parametrize(("status", "retry_after", "header"), [(429, 1.2, "2"), (503, None, "1"), (429, None, "1"), (400, None, None)])
async def test_a_failure_before_the_first_byte_is_a_status(stage, ask, status, retry_after, header):
    answer = ask(stage)
    (request,) = (await stage.desk.next(Generate)).requests
    stage.desk.send(Failed(request, status, "some_code", "it will not do", "prompt", retry_after))
    got, body, response = await answer
    error = (json.loads(body) if isinstance(body, str) else body)["error"]
    assert got == status
    assert response.headers.get("Retry-After") == header
    assert (error["message"], error["param"], error["code"]) == ("it will not do", "prompt", "some_code")
    assert error["type"] == {429: "rate_limit_error", 503: "server_error", 400: "invalid_request_error"}[status]


async def test_a_failure_in_the_middle_of_a_stream_is_an_event_and_a_clean_end(stage):
    answer = stage.stream()
    (request,) = (await stage.desk.accept()).requests
    stage.desk.say(request, "so far")
    stage.desk.send(Failed(request, 500, "invalid_logits", "the model failed"))
    status, body, _ = await answer
    assert status == 200
    assert text_of(body) == "so far"
    assert events(body)[-1] == {"error": {"message": "the model failed", "type": "server_error", "param": None, "code": "invalid_logits"}}
    assert await stage.complete_and_finish() == "fine"


@pytest.mark.parametrize("ask", [Stage.complete, Stage.stream])
async def test_when_one_of_several_choices_fails_the_others_are_aborted(stage, ask):
    answer = ask(stage, n=3)
    requests = (await stage.desk.accept()).requests
    stage.desk.say(requests[0], "a", end=ended(requests[0]))
    stage.desk.send(Failed(requests[1], 500, "invalid_logits", "the model failed"))
    # All at once, so that what the others say arrives behind the failure.
    stage.desk.send(*(Text([requests[2]], ["late"], [1], [], [], [9]) for _ in range(50)))
    _, body, _ = await answer
    assert (await stage.desk.next(Abort)).requests == (requests[2],)
    if isinstance(body, str):
        last = events(body)[-1]
        assert isinstance(last, dict) and last["error"]["code"] == "invalid_logits"
    else:
        assert body["error"]["code"] == "invalid_logits"
    assert await stage.complete_and_finish() == "fine", "the connection can be used again"


async def test_nothing_follows_a_failure_even_when_the_client_was_behind(stage):
    reader, writer = await stage.connect(limit=1024)
    body = b'{"prompt":"x","stream":true,"n":2}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    first, second = (await stage.desk.accept()).requests
    stage.desk.say(first, "little")
    await reader.readuntil(b"\r\n\r\n")
    for _ in range(200):
        stage.desk.say(first, "much " * 20_000)
    stage.desk.send(Failed(first, 500, "invalid_logits", "the model failed"))
    await stage.delivered()
    for _ in range(10):
        stage.desk.say(second, "late")
    await stage.delivered()
    said = b""
    while not said.endswith(b"0\r\n\r\n"):
        said = (said + await asyncio.wait_for(reader.read(1 << 20), PATIENCE))[-10_000:]
    assert b"invalid_logits" in said
    assert b"late" not in said
    writer.close()


@pytest.mark.parametrize(("status", "code"), [(429, "overloaded"), (504, "timeout")])
async def test_a_stream_that_fails_before_it_has_begun_is_answered_by_a_status(stage, status, code):
    answer = stage.stream(n=2)
    first, _ = (await stage.desk.accept()).requests
    stage.desk.send(Failed(first, status, code, "no room", None, 3.0))
    found, said, response = await answer
    assert found == status
    assert code in said
    assert response.headers["Retry-After"] == "3"


async def test_while_the_queue_is_known_to_be_full_new_requests_are_refused_by_the_server_itself(stage, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("headrace.server.state.time", SimpleNamespace(monotonic=lambda: now))
    answer = stage.stream()
    (first,) = (await stage.desk.accept()).requests
    stage.desk.send(Failed(first, 429, "overloaded", "9 requests are waiting already", None, 3.0, hold_s=0.2))
    assert (await answer)[0] == 429
    for ask in (stage.complete, stage.stream):
        status, said, response = await ask()
        assert status == 429
        assert "9 requests are waiting" in str(said)
        assert response.headers["Retry-After"] == "3"
    refused = [one for one in stage.process.metrics.snapshot() if one.name == "headrace_requests_refused_total"]
    assert [(one.labels, one.value) for one in refused] == [((("cause", "overloaded"),), 2)]
    await stage.delivered()  # what needs no place in the queue is answered
    now += 0.3
    assert await stage.complete_and_finish() == "fine"


async def test_when_one_of_several_prompts_is_refused_nothing_of_the_others_runs_on(stage):
    answer = stage.complete(prompt=["a", "b", "c"])
    generates = [await stage.desk.next(Generate) for _ in range(3)]
    (first,), (second,), (third,) = (one.requests for one in generates)
    stage.desk.send(Accepted(first, 5), Failed(second, 400, "context_length_exceeded", "too long", "prompt"))
    assert (await answer)[0] == 400
    assert (await stage.desk.next(Abort)).requests == (first, third)


async def test_an_exception_of_ours_is_a_500_that_tells_no_secrets(stage, monkeypatch):
    def broken(*_):
        raise RuntimeError("a secret")

    monkeypatch.setattr("headrace.server.openai.routes.completion_prompts", broken)
    status, body, _ = await stage.complete()
    assert status == 500
    assert "secret" not in str(body)
    assert body["error"]["code"] == "internal_error"


# Streams


async def test_an_events_text_is_escaped_as_json(stage):
    said = ['"quotes"', "back\\slash", "line\nbreak\r\n\n", "\x00\x1f", "東京 🙂", "\u2028", "data: [DONE]"]
    answer = stage.stream()
    (request,) = (await stage.desk.accept()).requests
    for text in said:
        stage.desk.say(request, text)
    stage.desk.say(request, "", [], ended(request))
    _, body, _ = await answer
    assert text_of(body) == "".join(said)
    assert events(body)[-1] == "[DONE]"


async def test_tokens_without_text_make_no_events_but_are_counted(stage):
    answer = stage.stream(stream_options={"include_usage": True})
    (request,) = (await stage.desk.accept()).requests
    for _ in range(5):
        stage.desk.say(request, "")
    stage.desk.say(request, "é", [1, 2], ended(request, completion=7))
    _, body, _ = await answer
    spoken = events(body)
    assert [event["choices"][0]["text"] for event in spoken[:-2]] == ["é", ""]
    assert spoken[-2]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_stream_goes_on_when_its_tokenizer_dies(stage):
    answer = stage.stream(echo=True, logprobs=0)
    (request,) = (await stage.desk.accept(prompt_text="xy")).requests
    scores = PromptScores(request, (None, score("y")))
    stage.desk.send(scores, scored(request, "a", 1))
    await stage.delivered()
    stage.tokenizer_dies()
    assert (await stage.desk.accept(prompt_text="xy")).emitted == ((1,),)
    stage.desk.send(scores, scored(request, "b", 2))
    stage.desk.say(request, "", [], ended(request))
    _, body, _ = await answer
    assert text_of(body) == "xyab"
    tokens = [token for event in events(body)[:-1] for token in ((event["choices"][0]["logprobs"] or {}).get("tokens", []))]
    assert tokens == ["x", "y", "a", "b"]


def score(text: str) -> TokenScore:
    return TokenScore(3, text, text.encode(), -1.0)


def scored(request: int, text: str, token: int) -> Text:
    return Text([request], [text], [1], [], [Scores(request, (score(text),))], [token])


async def test_offsets_of_streamed_scores_are_those_of_the_whole_answer(stage):
    # The first token's text is held back, as it might begin a stop string; its score comes at once.
    def tell(request: int) -> list:
        held = Text([request], [""], [1], [], [Scores(request, (score("a"),))], [1])
        rest = Text([request], ["ab"], [1], [], [Scores(request, (score("b"),))], [2])
        return [PromptScores(request, (None, score("y"))), held, rest]

    got = []
    for ask in (stage.complete, stage.stream):
        answer = ask(echo=True, logprobs=0)
        (request,) = (await stage.desk.accept(prompt_text="xy")).requests
        for message in tell(request):
            stage.desk.send(message)
            await stage.delivered()
        stage.desk.say(request, "", [], ended(request, completion=2))
        _, body, _ = await answer
        pieces = [body] if isinstance(body, dict) else events(body)[:-1]
        parts = [piece["choices"][0]["logprobs"] for piece in pieces if piece["choices"][0]["logprobs"]]
        got.append([(token, at) for part in parts for token, at in zip(part["tokens"], part["text_offset"], strict=True)])
    assert got[0] == got[1] == [("x", 0), ("y", 1), ("a", 2), ("b", 3)]


# State


@pytest.mark.parametrize(("state", "code"), [("starting", "starting"), ("draining", "draining")])
async def test_no_new_request_comes_in_while_the_engine_is(open_stage, state, code):
    stage = await open_stage(state)
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        status, body, response = await stage.post(path)
        assert (status, body["error"]["code"]) == (503, code)
        assert int(response.headers["Retry-After"]) >= 1
    assert stage.desk.hears_nothing()


async def test_while_the_engine_recovers_requests_wait(open_stage):
    stage = await open_stage("recovering")
    assert await stage.complete_and_finish() == "fine"


async def test_draining_refuses_what_is_new_finishes_what_runs_and_then_says_so(stage):
    answer = stage.stream()
    (request,) = (await stage.desk.accept()).requests
    stage.desk.say(request, "before ")
    stage.server.receive(Drain())
    assert (await stage.complete())[0] == 503
    assert stage.told.empty()
    stage.desk.say(request, "after", [7], ended(request))
    assert text_of((await answer)[1]) == "before after"
    assert await asyncio.wait_for(stage.told.get(), PATIENCE) == Drained("server-0")


async def test_readiness_follows_the_engines_state(stage):
    for state, status in (("ready", 200), ("recovering", 503), ("draining", 503), ("ready", 200)):
        stage.server.receive(EngineState(state))
        async with stage.http.get("/health/ready") as response:
            assert response.status == status
            assert await response.json() == {"status": state}
        async with stage.http.get("/health/live") as response:
            assert response.status == 200


@pytest.mark.parametrize(
    ("running", "age", "word"), [(0, None, "ok"), (0, 1e6, "ok"), (3, 0.1, "ok"), (3, 61.0, "stalled"), (3, None, "ok")]
)
async def test_health_is_progress(stage, running, age, word):
    stage.status = Status(0, "ready", [], [], Progress(running, 0, True, age, 5))
    async with stage.http.get("/health") as response:
        body = await response.json()
        assert body["status"] == word
        assert response.status == (200 if word == "ok" else 503)
        assert body["running"] == running


async def test_a_supervisor_that_does_not_answer_is_not_waited_for(stage, monkeypatch):
    monkeypatch.setattr("headrace.server.state.STATUS_TIMEOUT", 0.05)
    stage.status = None
    async with stage.http.get("/health") as response:
        assert (response.status, (await response.json())["status"]) == (503, "stalled")
    async with stage.http.get("/metrics") as response:
        assert response.status == 503


async def test_metrics_are_summed_over_processes_and_escaped(stage):
    bounds = (0.1, 1.0)
    stage.status = Status(
        0,
        "ready",
        [],
        [
            Series("headrace_b_total", "counter", "Bees.", (("of", 'a"b\\c\nd'),), 2.0),
            Series("headrace_b_total", "counter", "Bees.", (("of", 'a"b\\c\nd'),), 3.0),
            Series("headrace_a_seconds", "histogram", "Time.", (), Histogram(bounds, [1, 2, 3], 4.5)),
            Series("headrace_a_seconds", "histogram", "Time.", (), Histogram(bounds, [1, 0, 1], 2.0)),
        ],
        None,
    )
    async with stage.http.get("/metrics") as response:
        assert response.content_type == "text/plain"
        lines = (await response.text()).splitlines()
    assert lines == [
        "# HELP headrace_a_seconds Time.",
        "# TYPE headrace_a_seconds histogram",
        'headrace_a_seconds_bucket{le="0.1"} 2',
        'headrace_a_seconds_bucket{le="1"} 4',
        'headrace_a_seconds_bucket{le="+Inf"} 8',
        "headrace_a_seconds_sum 6.5",
        "headrace_a_seconds_count 8",
        "# HELP headrace_b_total Bees.",
        "# TYPE headrace_b_total counter",
        'headrace_b_total{of="a\\"b\\\\c\\nd"} 5',
    ]


# The way in


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic c2VjcmV0", "secret", "Bearer secre", "Bearer secrets", "Bearer sécret"])
async def test_without_the_right_key_nothing_but_health_and_metrics_is_told(open_stage, header):
    stage = await open_stage(api_key="secret")
    headers = {"Authorization": header} if header else {}
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1//completions"),
        ("GET", "/v1/models"),
        ("GET", "/%761/models"),
        ("POST", "/tokenize"),
        ("GET", "/nowhere"),
    ):
        async with stage.http.request(method, path, headers=headers) as response:
            assert response.status == 401, path
            assert (await response.json())["error"]["type"] == "authentication_error"
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        async with stage.http.get(path, headers=headers) as response:
            assert response.status == 200, path
    async with stage.http.get("/v1/models", headers={"Authorization": "bearer  secret "}) as response:
        assert response.status == 200


async def test_every_key_is_compared_and_in_a_time_that_tells_nothing(open_stage, monkeypatch):
    compared = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return compare_digest(given, key)

    monkeypatch.setattr("hmac.compare_digest", compare)
    stage = await open_stage(api_key="one,two,three")
    for key, status in (("one", 200), ("three", 200), ("onx", 401)):
        compared.clear()
        async with stage.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
            assert response.status == status
        assert compared == [b"one", b"two", b"three"]


@pytest.mark.parametrize(
    "head",
    [b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n", b"GET /v1/models/\xff\xfe HTTP/1.1\r\nHost: x\r\n"],
    ids=["key", "path"],
)
async def test_bytes_that_are_no_text_are_an_error_of_the_client(open_stage, head):
    stage = await open_stage(**{"api_key": "secret"} if b"Auth" in head else {})
    assert 400 <= await stage.raw_status(head + b"Connection: close\r\n\r\n") < 500


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/completions HT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"],
    ids=["nothing", "half a head", "half a body"],
)
async def test_a_client_that_never_finishes_its_request_is_hung_up_on(open_stage, monkeypatch, sent):
    monkeypatch.setattr("headrace.server.server.IDLE_TIMEOUT", 0.2)
    monkeypatch.setattr("headrace.server.server.LINGER_TIMEOUT", 0.2)
    monkeypatch.setattr("headrace.server.openai.routes.BODY_TIMEOUT", 0.2)
    stage = await open_stage()
    reader, writer = await stage.connect()
    writer.write(sent)
    said = await asyncio.wait_for(reader.read(), PATIENCE)
    if b"{" in sent:
        assert said.startswith(b"HTTP/1.1 408")
        assert b'"request_timeout"' in said
    writer.close()


async def test_every_answer_bears_a_request_id(stage):
    ids = set()
    for path in ("/", "/health/live", "/v1/models", "/nowhere", "/v1/completions"):
        async with stage.http.get(path) as response:
            ids.add(response.headers["x-request-id"])
    assert len(ids) == 5


async def test_a_wrong_method_is_told_which_are_right(stage):
    async with stage.http.get("/v1/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"


async def test_the_greeting_says_what_this_is_and_where_to_go(stage):
    async with stage.http.get("/") as response:
        text = await response.text()
    assert "headrace" in text and "scripted" in text and "/v1/chat/completions" in text


async def test_a_client_that_stops_reading_for_good_is_hung_up_on(open_stage, monkeypatch):
    monkeypatch.setattr("headrace.server.sse.STALL_TIMEOUT", 0.2)
    stage = await open_stage()
    _, writer = await stage.connect(limit=1024)
    body = b'{"prompt":"x","stream":true}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    (request,) = (await stage.desk.accept()).requests
    for _ in range(100):
        stage.desk.say(request, "much " * 20_000)
    assert (await stage.desk.next(Abort)).requests == (request,)
    writer.close()
