"""Whatever is sent, the answer is an error that names the value and the way out, and nobody else notices."""

import socket

import pytest

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return CHAT, {"messages": USER} | fields


def completion(**fields):
    return COMPLETION, {"prompt": "hi"} | fields


CASES = {
    "malformed JSON": ((CHAT, b'{"messages": ['), 400, None, "not valid JSON"),
    "an empty body": ((CHAT, b""), 400, None, "not valid JSON"),
    "NaN": ((CHAT, b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}'), 400, None, "not valid JSON"),
    "invalid UTF-8": ((COMPLETION, b'{"prompt":"\xff\xfe"}'), 400, None, "UTF-8"),
    "half a surrogate": ((COMPLETION, b'{"prompt":"\\ud800"}'), 400, None, "not valid JSON"),
    "a list for an object": ((CHAT, b"[]"), 400, None, "must be a JSON object"),
    "an unknown parameter": (chat(temprature=1), 400, "temprature", "not a known parameter"),
    "an unknown nested parameter": (chat(stream=True, stream_options={"x": 1}), 400, "stream_options.x", "not a known parameter"),
    "no messages": ((CHAT, {}), 400, "messages", "is missing"),
    "empty messages": (chat(messages=[]), 400, "messages", "is empty"),
    "a message without a role": (chat(messages=[{"content": "x"}]), 400, "messages", "no role"),
    "a message without content": (chat(messages=[{"role": "user"}]), 400, "messages", "must be a string"),
    "an image": (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages", "only text"),
    "no prompt": ((COMPLETION, {}), 400, "prompt", "is missing"),
    "an empty list of prompts": (completion(prompt=[]), 400, "prompt", "empty list"),
    "an empty prompt": (completion(prompt=""), 400, "prompt", "no tokens"),
    "mixed prompts": (completion(prompt=["a", 1]), 400, "prompt", "must be a string"),
    "a negative id": (completion(prompt=[-1]), 400, "prompt", "must be a string"),
    "an id beyond the vocabulary": (completion(prompt=[49152]), 400, "prompt", "49152"),
    "text for a number": (chat(max_tokens="7"), 400, "max_tokens", "expected `int"),
    "a fraction for a whole number": (chat(max_tokens=1.5), 400, "max_tokens", "expected `int"),
    "temperature too high": (chat(temperature=2.5), 400, "temperature", "from 0 to 2"),
    "a negative temperature": (chat(temperature=-0.1), 400, "temperature", "from 0 to 2"),
    "an infinite temperature": ((CHAT, b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}'), 400, None, ""),
    "top_p zero": (chat(top_p=0), 400, "top_p", "above 0"),
    "top_p over one": (chat(top_p=1.01), 400, "top_p", "at most 1"),
    "min_p over one": (chat(min_p=1.5), 400, "min_p", "from 0 to 1"),
    "top_k minus two": (chat(top_k=-2), 400, "top_k", "at least -1"),
    "presence_penalty": (chat(presence_penalty=3), 400, "presence_penalty", "from -2 to 2"),
    "frequency_penalty": (chat(frequency_penalty=-3), 400, "frequency_penalty", "from -2 to 2"),
    "repetition_penalty": (chat(repetition_penalty=0), 400, "repetition_penalty", "above 0"),
    "n zero": (chat(n=0), 400, "n", "from 1 to 128"),
    "n too large": (chat(n=1000), 400, "n", "from 1 to 128"),
    "no tokens wanted": (chat(max_tokens=0), 400, "max_tokens", "at least 1"),
    "no tokens wanted and no echo": (completion(max_tokens=0), 400, "max_tokens", "echo"),
    "min_tokens over max_tokens": (chat(max_tokens=2, min_tokens=3), 400, "min_tokens", "exceeds max_tokens=2"),
    "five stop strings": (chat(stop=list("abcde")), 400, "stop", "at most 4"),
    "an empty stop string": (chat(stop=""), 400, "stop", "empty"),
    "a stop token beyond the vocabulary": (chat(stop_token_ids=[49152]), 400, "stop_token_ids", "49152"),
    "a word as logit_bias key": (chat(logit_bias={"the": 1}), 400, "logit_bias", "token ids"),
    "logit_bias too large": (chat(logit_bias={"5": 101}), 400, "logit_bias", "from -100 to 100"),
    "logit_bias beyond the vocabulary": (chat(logit_bias={"49152": 1}), 400, "logit_bias", "49152"),
    "top_logprobs alone": (chat(top_logprobs=2), 400, "top_logprobs", "logprobs=true"),
    "too many logprobs": (completion(logprobs=21), 400, "logprobs", "from 0 to 20"),
    "stream_options without stream": (chat(stream_options={"include_usage": True}), 400, "stream_options", "stream=true"),
    "a suffix": (completion(suffix="x"), 400, "suffix", "not supported"),
    "best_of": (completion(best_of=3), 400, "best_of", "unless it equals n"),
    "tools": (chat(tools=[{"type": "function"}]), 400, "tools", "not supported"),
    "a JSON answer": (chat(response_format={"type": "json_object"}), 400, "response_format", "not supported"),
    "two different limits": (chat(max_tokens=1, max_completion_tokens=2), 400, "max_tokens", "differ"),
    "a seed of a hundred digits": (
        (CHAT, b'{"messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 100 + b"}"),
        400,
        "seed",
        "out of range",
    ),
    "a limit of a hundred digits": ((COMPLETION, b'{"prompt":"x","max_tokens":' + b"9" * 100 + b"}"), 400, "max_tokens", "out of range"),
    "an unknown model": (chat(model="gpt-7"), 404, "model", "gpt-7"),
    "max_tokens beyond the context": (completion(max_tokens=9000), 400, "max_tokens", "exceeds the context of 8192"),
    "a prompt beyond the context": (completion(prompt=[5] * 9000), 400, "prompt", "exceeds the context of 8192"),
    "ten megabytes": ((COMPLETION, b'{"prompt":"' + b"a" * (10 << 20) + b'"}'), 413, None, "larger than"),
    "tokens of no vocabulary": (("/detokenize", {"tokens": [1 << 30]}), 400, "tokens", "1073741824"),
    "an unknown path": (("/v1/engines", {}), 404, None, "does not exist"),
    "a wrong method": (("/v1/models", {}), 405, None, "does not take POST"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_name(served, case):
    (path, body), status, param, words = CASES[case]
    got, answer = served.ask(path, body)
    assert got == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    if param:
        assert error["param"] == param
    assert len(error["message"]) < 400


def test_after_all_that_the_engine_serves_as_before(served):
    status, answer = served.ask(CHAT, chat(max_tokens=3, seed=1)[1])
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 3
    assert served.until_idle()["status"] == "ok"


def test_parameters_without_effect_are_taken(served):
    status, _ = served.ask(*chat(user="me", metadata={"a": "b"}, store=False, service_tier="auto", max_tokens=1))
    assert status == 200


def test_rubbish_instead_of_http_is_answered_or_dropped_and_hurts_nobody(served):
    host, port = served.url.removeprefix("http://").split(":")
    for rubbish in (b"\x00" * 100, b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"\x16\x03\x01\x02\x00"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(rubbish)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert served.ask("/health/live") == (200, {"status": "ok"})
