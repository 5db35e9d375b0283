"""Headrace's own clients against its own engine with the real model: library, direct client, load generator, terminal."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from headrace.client import AsyncClient, BadRequest, Client, NotFound
from headrace.client.bench.report import Report
from headrace.client.direct import CallError, DirectClient
from headrace.engine.messages.frontend import Accepted, ChatPrompt, End, Failed, Generate, PromptScores, Scores, TextPrompt
from headrace.engine.messages.sampling import Sampling
from tests.client.test_chat import Terminal
from tests.serving import ROOT

TOKYO = [{"role": "user", "content": "What is the capital of Japan?"}]
ANSWER = "The capital of Japan is Tokyo."


# The library over HTTP


def test_the_client_asks_and_streams_the_same(served):
    with Client(served.url) as client:
        assert client.health().status == "ok"
        assert client.default_model() == served.model
        whole = client.chat(TOKYO, temperature=0, max_tokens=32)
        assert whole.choices[0].message.content == ANSWER
        with client.chat_stream(TOKYO, temperature=0, max_tokens=32, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        ids = client.tokenize("Grüße aus 東京")
        assert client.detokenize(ids) == "Grüße aus 東京"
        with pytest.raises(BadRequest, match="temperature=3 is out of range") as refused:
            client.chat(TOKYO, temperature=3)
        assert refused.value.param == "temperature"
        with pytest.raises(NotFound, match="does not exist"):
            client.chat(TOKYO, model="gpt-7")


async def test_the_asynchronous_client_asks_many_at_once(served):
    async with AsyncClient(served.url) as client:
        chat, plain, stream = await asyncio.gather(
            client.chat(TOKYO, temperature=0, max_tokens=32),
            client.complete(["One, two,", "Monday, Tuesday,"], temperature=0, max_tokens=4, logprobs=1),
            client.complete_stream("One, two,", temperature=0, max_tokens=4),
        )
        assert chat.choices[0].message.content == ANSWER
        assert [choice.index for choice in plain.choices] == [0, 1]
        assert all(len(choice.logprobs.token_logprobs) == 4 for choice in plain.choices)
        assert "".join([choice.text async for chunk in stream for choice in chunk.choices]) == plain.choices[0].text


# Without HTTP


class Kept:
    """A `Sink` that keeps everything and knows when it is over."""

    def __init__(self) -> None:
        self.heard: list[Accepted | PromptScores | Failed | End] = []
        self.said = ""
        self.count = 0
        self.over = asyncio.get_running_loop().create_future()

    def accepted(self, message: Accepted) -> None:
        self.heard.append(message)

    def prompt_scores(self, message: PromptScores) -> None:
        self.heard.append(message)

    def text(self, text: str, count: int, scores: Scores | None, now: float) -> None:
        assert not self.over.done()
        self.said += text
        self.count += count

    def end(self, message: End, now: float) -> None:
        self.heard.append(message)
        self.over.set_result(message)

    def failed(self, message: Failed) -> None:
        self.heard.append(message)
        self.over.set_result(message)


@pytest.fixture
async def direct(served):
    with contextlib.closing(DirectClient(served.run_dir(), ["tokenizer-0"])) as direct:
        yield direct


async def test_the_direct_client_needs_no_server_in_between(served, direct):
    card = await direct.describe()
    assert (card.name, card.context, card.has_chat_template) == (served.model, 8192, True)
    found = await direct.tokenize(TextPrompt("Hello there"), True, True)
    assert len(found.token_strs) == len(found.ids) == 2
    assert (await direct.detokenize(tuple(found.ids))).text == "Hello there"
    with pytest.raises(CallError, match="1073741824"):
        await direct.detokenize((1 << 30,))
    ids = direct.new_ids(2)
    sinks = [Kept(), Kept()]
    prompt = ChatPrompt(msgspec.json.encode(TOKYO))
    direct.generate(Generate(ids, (1, 2), prompt, Sampling(max_tokens=32, temperature=0.0)), sinks)
    for sink in sinks:
        end = await asyncio.wait_for(sink.over, 30)
        assert (sink.said, end.reason, end.completion_tokens) == (ANSWER, "stop", sink.count)
        assert [type(one) for one in sink.heard] == [Accepted, End]
    assert direct.live == 0


async def test_a_direct_request_that_is_aborted_hears_nothing_more(served, direct):
    ids = direct.new_ids(1)
    kept = Kept()
    direct.generate(Generate(ids, (1,), TextPrompt("On and on"), Sampling(max_tokens=4000, ignore_eos=True)), [kept])
    async with asyncio.timeout(20):
        while not kept.count:
            await direct.describe()
    direct.abort(ids)
    count = kept.count
    await asyncio.to_thread(served.until_empty, 5)
    assert (kept.count, kept.over.done(), direct.live) == (count, False, 0)


# The commands


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "headrace.engine.cli", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=ROOT, **options)


def test_bench_reports_what_the_server_did(served, tmp_path):
    before = {name: served.metric(f"headrace_{name}_total") for name in ("generated_tokens", "prompt_tokens")}
    path = tmp_path / "report.json"
    work = ("--concurrency", "4", "--requests", "8", "--prompt-tokens", "20-30", "--output-tokens", "6", "--warmup", "1", "--seed", "5")
    ended = command("bench", "--url", served.url, *work, "--json", str(path))
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "TTFT ms" in ended.stdout and "output" in ended.stdout
    report = msgspec.json.decode(path.read_bytes(), type=Report)
    assert (report.schema, report.url, report.model) == ("headrace-bench/1", served.url, served.model)
    assert (report.requests, report.completed, report.errors) == (8, 8, {})
    assert (report.tokens.output, report.tokens.counted_by) == (48, "usage")
    assert 20 <= report.tokens.prompt_least <= report.tokens.prompt_most <= 30
    made, read = (served.metric(f"headrace_{name}_total") - before[name] for name in ("generated_tokens", "prompt_tokens"))
    assert made >= 48 and read >= report.tokens.prompt
    assert report.output_tok_s == pytest.approx(48 / report.wall_s)
    assert report.requests_s == pytest.approx(8 / report.wall_s)
    for spread, count in ((report.ttft_ms, 8), (report.tpot_ms, 8), (report.itl_ms, 40), (report.e2e_ms, 8)):
        assert spread is not None
        assert 0 <= spread.least <= spread.p50 <= spread.p90 <= spread.p99 <= spread.most
        assert spread.count <= count
    assert report.ttft_ms.most <= report.e2e_ms.most <= report.wall_s * 1000
    assert report.ttft_ms.mean + 5 * report.tpot_ms.mean <= report.e2e_ms.mean * 1.1


def test_bench_against_nobody_is_one_line():
    ended = command("bench", "--url", "http://127.0.0.1:9")
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1 and "127.0.0.1:9" in ended.stderr


def test_chat_in_a_terminal_answers_stops_and_leaves(served, tmp_path):
    terminal = Terminal(tmp_path, "--url", served.url, "--temperature", "0")
    try:
        terminal.say("What is the capital of Japan?\n")
        terminal.wait_for(ANSWER)
        terminal.say("Tell me a very long story about the sea.\n")
        terminal.wait_for("sea")
        terminal.wait_for("the")
        terminal.type("\x03")
        terminal.wait_for("stopped")
        served.until_empty(5)
        assert terminal.leave() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.main)


def test_chat_through_a_pipe_is_one_answer_a_line(served):
    ended = command("chat", "--url", served.url, "--temperature", "0", input=TOKYO[0]["content"] + "\n")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, ANSWER + "\n", "")


def test_curl_as_the_readme_shows_it(served):
    body = {"messages": [{"role": "user", "content": "Name three rivers."}], "stream": True, "temperature": 0, "max_tokens": 8}
    words = ["curl", "-sN", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    try:
        shown = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
    except FileNotFoundError:
        pytest.skip("no curl here")
    events = [line.removeprefix("data: ") for line in shown.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
