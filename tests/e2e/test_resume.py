"""Streams that broke go on from the last event that came: over plain HTTP, from every event, with every kind of answer."""

import json
import time
import urllib.request
from typing import Any

import pytest

from tests.serving import Served

PACED = "tests.e2e.paced"
KEYS = "one,two"


@pytest.fixture(scope="module")
def served():
    with Served(PACED, tokenizers=2, api_key=KEYS) as served:
        yield served


Event = tuple[str, str]
"""The id and the data."""


def events(served: Served, path: str, body: dict[str, Any] | None = None, key: str = "one", **headers: str) -> list[Event]:
    """All events of a stream."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    found: list[Event] = []
    with urllib.request.urlopen(urllib.request.Request(served.url + path, data, headers), timeout=60) as response:
        last = ""
        for line in response.read().decode().split("\n"):
            if line.startswith("id: "):
                last = line[4:]
            elif line.startswith("data: "):
                found.append((last, line[6:]))
    return found


def outcome(found: list[Event]) -> dict[str, Any]:
    """What a client makes of the events: by choice, and the usage."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    assert found[-1][1] == "[DONE]"
    for _, data in found[:-1]:
        chunk = json.loads(data)
        usage = chunk.get("usage") or usage
        for one in chunk["choices"]:
            choice = choices.setdefault(one["index"], {"roles": 0, "text": "", "logprobs": [], "offsets": [], "finish": []})
            delta = one.get("delta", {})
            choice["roles"] += "role" in delta
            choice["text"] += delta.get("content", "") or one.get("text", "")
            if one["logprobs"]:
                choice["logprobs"] += one["logprobs"].get("content") or one["logprobs"]["token_logprobs"]
                choice["offsets"] += one["logprobs"].get("text_offset", [])
            choice["finish"] += [one["finish_reason"]] if one["finish_reason"] else []
    if usage:
        usage.pop("prompt_tokens_details", None)  # the cache knows more by now
    return {"choices": choices, "usage": usage}


ANSWERS = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}),
    "chat with logprobs": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 7, "logprobs": True, "n": 2},
    ),
    "three choices": ("/v1/completions", {"prompt": "once", "max_tokens": 6, "n": 3}),
    "two prompts": ("/v1/completions", {"prompt": ["once", "upon a time"], "max_tokens": 5, "n": 2}),
    "logprobs": ("/v1/completions", {"prompt": "once", "max_tokens": 8, "logprobs": 0, "n": 2}),
    "echo": ("/v1/completions", {"prompt": "once upon", "max_tokens": 6, "echo": True}),
    "a stop string": ("/v1/completions", {"prompt": "once", "max_tokens": 40, "stop": ["e"]}),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_from_every_event_on_the_rest_is_what_was_missing(served, kind):
    path, body = ANSWERS[kind]
    body = body | {"stream": True, "seed": 5, "stream_options": {"include_usage": True}}
    whole = events(served, path, body, x_request_id=f"cut-{kind.replace(' ', '-')}")
    right = outcome(whole)
    assert right["usage"]["completion_tokens"] > 0
    assert all(len(choice["finish"]) == 1 for choice in right["choices"].values())
    for cut in range(len(whole) - 1):
        last = whole[cut - 1][0] if cut else None
        rest = events(served, f"/v1/streams/cut-{kind.replace(' ', '-')}", **({"Last-Event-ID": last} if last else {}))
        assert outcome(whole[:cut] + rest) == right, f"cut before event {cut}, after id {last}"


def refused(served: Served, name: str, status: int, key: str = "one", **headers: str) -> dict[str, Any]:
    got, body = served.ask(f"/v1/streams/{name}", headers={"Authorization": f"Bearer {key}"} | headers)
    assert got == status, body
    return body["error"]


def test_a_stream_is_its_tenants_own(served):
    events(served, "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 3}, x_request_id="mine")
    assert events(served, "/v1/streams/mine")[-1][1] == "[DONE]"
    assert refused(served, "mine", 404, key="two")["code"] == "stream_not_found"
    assert served.ask("/v1/streams/mine")[0] == 401


def test_what_cannot_be_gone_on_with_is_said_so(served):
    events(served, "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 3, "n": 2}, x_request_id="two")
    assert refused(served, "never-heard-of", 404)["code"] == "stream_not_found"
    assert "Last-Event-ID has the part 'x'" in refused(served, "two", 400, **{"Last-Event-ID": "x,1"})["message"]
    assert "is of 1 choices, the answer has 2" in refused(served, "two", 400, **{"Last-Event-ID": "1"})["message"]
    assert "names 99 tokens, there were 3" in refused(served, "two", 400, **{"Last-Event-ID": "99,1"})["message"]
    status, _ = served.ask("/v1/completions", {"prompt": "x", "max_tokens": 3}, {"Authorization": "Bearer one", "x-request-id": "whole"})
    assert status == 200
    assert refused(served, "whole", 404)["code"] == "stream_not_found"


def test_a_stream_that_is_asked_for_twice_goes_on_where_it_was_asked_for_last(served):
    body = {"prompt": "x", "stream": True, "max_tokens": 400, "seed": 3}
    request = urllib.request.Request(
        served.url + "/v1/completions", json.dumps(body).encode(), {"Authorization": "Bearer one", "x-request-id": "twice"}
    )
    with urllib.request.urlopen(request, timeout=60) as first:
        seen = b""
        while seen.count(b"data: ") < 5:
            seen += first.readline()
        last = [line[4:] for line in seen.decode().split("\n") if line.startswith("id: ")][-1]
        rest = events(served, "/v1/streams/twice", **{"Last-Event-ID": last})
        left = first.read().decode()
    assert '"code":"taken_over"' in left
    assert rest[-1][1] == "[DONE]"
    assert json.loads(rest[-2][1])["choices"][0]["finish_reason"] == "length"


def test_the_answer_bears_the_id_that_its_client_chose(served):
    body = {"prompt": "x", "max_tokens": 1}
    for given, taken in (("my-id.7", True), ("not an id", False)):
        headers = {"Authorization": "Bearer one", "x-request-id": given}
        request = urllib.request.Request(served.url + "/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            assert (response.headers["x-request-id"] == given) == taken
            assert json.load(response)["id"] == response.headers["x-request-id"]


def test_a_request_ends_when_its_time_is_up(served):
    begun = time.monotonic()
    status, body = served.ask("/v1/completions", {"prompt": "x", "max_tokens": 3000, "timeout": 0.2}, {"Authorization": "Bearer one"})
    assert (status, body["error"]["code"]) == (504, "timeout")
    assert 0.2 <= time.monotonic() - begun < 5
    status, body = served.ask("/v1/completions", {"prompt": "x", "timeout": 0}, {"Authorization": "Bearer one"})
    assert (status, body["error"]["param"]) == (400, "timeout")


def test_more_answers_than_could_ever_wait_are_refused_at_once():
    with Served(PACED, max_running=2, max_waiting=3) as narrow:
        status, body = narrow.ask("/v1/completions", {"prompt": ["a", "b"], "n": 3, "max_tokens": 1})
        assert (status, body["error"]["param"]) == (400, "n")
        assert "ask for 6 answers at once, this server takes 5" in body["error"]["message"]
        assert narrow.ask("/v1/completions", {"prompt": "a", "n": 5, "max_tokens": 1})[0] == 200
