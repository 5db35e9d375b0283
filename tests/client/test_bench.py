"""The load generator against a server whose every answer is known."""

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import bench
from headrace.client.bench.options import WORKLOADS, Options, from_arguments
from headrace.client.bench.report import Report, spread
from headrace.client.bench.wire import Connection, Pool, Sample, request_bytes
from headrace.client.calls import Server
from headrace.engine.errors import UserError
from tests.client.fake_server import TEMPLATE_TOKENS, Behaviour, serving


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def measured(server, **more) -> Report:
    return bench.bench(msgspec.structs.replace(Options(url=server.url, requests=6, output_tokens=5, prompt_tokens=(20, 30)), **more))


def test_tokens_and_times_are_those_the_server_gave() -> None:
    with serving(Behaviour(first_delay_s=0.05, token_delay_s=0.02)) as server:
        report = measured(server, requests=4, concurrency=2)
    assert (report.completed, report.errors) == (4, {})
    assert (report.tokens.output, report.tokens.chunks, report.tokens.counted_by) == (20, 20, "usage")
    assert 50 <= report.ttft_ms.p50 < 150
    # The first chunk may come late, and the others are then nearer to it.
    assert 15 <= report.tpot_ms.p50 < 60
    assert 18 <= report.itl_ms.p50 < 60 and report.itl_ms.count == 16
    assert 130 <= report.e2e_ms.p50 < 400
    assert report.output_tok_s == pytest.approx(20 / report.wall_s)


@pytest.mark.parametrize(
    ("behaviour", "endpoint", "how"),
    [
        (Behaviour(), "completions", "token ids, exact"),
        (Behaviour(tokenize="content"), "completions", "token ids, exact"),
        (Behaviour(takes_ids=False), "completions", "text, exact"),
        (Behaviour(), "chat", "text, exact"),
        (Behaviour(tokenize="content"), "chat", "text, exact"),
        (Behaviour(tokenize=None), "completions", "text, approximate"),
    ],
)
def test_prompts_have_the_wanted_length_as_exactly_as_the_server_allows(behaviour: Behaviour, endpoint: str, how: str) -> None:
    with serving(behaviour) as server:
        report = measured(server, endpoint=endpoint, requests=12)
        lengths = [server.count(body) for body in server.requests[-12:]]
    assert report.prompts == how
    assert all(20 <= length <= 30 for length in lengths)
    assert report.tokens.prompt == sum(lengths)
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("behaviour", [Behaviour(), Behaviour(takes_ids=False), Behaviour(tokenize=None)])
def test_no_prompt_begins_like_another(behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        measured(server, requests=20)
        prompts = [body["prompt"] for body in server.requests]
    starts = [tuple((prompt.split() if isinstance(prompt, str) else prompt)[:2]) for prompt in prompts[-21:]]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("behaviour", [Behaviour(), Behaviour(takes_ids=False)])
def test_a_shared_prefix_is_shared_by_all_and_first_seen_when_the_clock_runs(behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        measured(server, requests=5, shared_prefix=40, warmup=2, prompt_tokens=(10, 10))
        prompts = [p.split() if isinstance(p, str) else p for p in (body["prompt"] for body in server.requests)]
    assert {len(prompt) for prompt in prompts[-5:]} == {50}
    assert len({tuple(prompt[:40]) for prompt in prompts[-5:]}) == 1
    assert all(prompt[:40] != prompts[-1][:40] for prompt in prompts[:-5])


def test_a_warm_prefix_is_sent_before_the_clock_runs() -> None:
    with serving() as server:
        measured(server, requests=5, shared_prefix=40, warm=True)
        assert server.requests[-6]["prompt"] == server.requests[-1]["prompt"][:40]


def test_the_same_seed_sends_the_same_prompts() -> None:
    with serving() as server:
        measured(server, seed=7)
        first = server.requests[-6:]
        measured(server, seed=7)
        assert server.requests[-6:] == first
        measured(server, seed=8)
        assert server.requests[-6:] != first


def test_extensions_that_a_server_refuses_are_left_out() -> None:
    with serving(Behaviour(takes_ignore_eos=False, takes_stream_options=False)) as server:
        report = measured(server)
        assert not {"ignore_eos", "stream_options"} & server.requests[-1].keys()
    assert report.tokens.counted_by == "chunks" and report.tokens.output == 30
    assert any("ignore_eos" in note for note in report.notes)


def test_chunks_of_several_tokens_are_noticed() -> None:
    with serving(Behaviour(tokens_per_chunk=4)) as server:
        report = measured(server, output_tokens=8)
    assert (report.tokens.output, report.tokens.chunks) == (48, 12)
    assert any("2.00" not in note and "4.00 tokens" in note for note in report.notes)


def test_answers_that_end_early_are_noticed() -> None:
    with serving(Behaviour(stops_after=3)) as server:
        report = measured(server)
    assert report.tokens.output == 18
    assert any("6 of 6 requests ended before 5 tokens" in note for note in report.notes)


def test_streams_with_crlf_lines_are_read() -> None:
    with serving(Behaviour(line_end=b"\r\n")) as server:
        report = measured(server, endpoint="chat")
    assert (report.completed, report.tokens.output, report.tokens.chunks) == (6, 30, 30)


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(break_after=2), "disconnected"),
        (Behaviour(end_without_done=True), "incomplete stream"),
        (Behaviour(error_after=2), "error event"),
    ],
)
def test_broken_streams_are_errors_by_kind_and_count_nowhere_else(behaviour: Behaviour, kind: str) -> None:
    with serving(behaviour) as server:
        report = measured(server, warmup=0)
    assert report.errors == {kind: 6}
    assert (report.completed, report.tokens.output, report.ttft_ms) == (0, 0, None)


def test_refusals_are_errors_with_the_servers_words() -> None:
    with serving() as server:
        server.behaviour.busy_above = 1
        report = measured(server, warmup=0)
    assert report.errors == {"http 429": 6}
    assert report.error_example == "refused with 429"


def test_a_server_that_is_not_there_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="no server answers"):
        bench.bench(Options(url=f"http://127.0.0.1:{port}"))


def test_a_wrong_key_is_one_line_that_says_what_to_give() -> None:
    with serving(Behaviour(api_key="secret")) as server:
        with pytest.raises(UserError, match="--api-key"):
            measured(server, api_key="guess")
        assert measured(server, api_key="secret").completed == 6


def test_a_silent_server_is_a_timeout() -> None:
    with serving() as server:
        options = Options(url=server.url, requests=2, output_tokens=50, prompt_tokens=(20, 20), warmup=0, timeout=0.2)
        server.behaviour.token_delay_s = 0.05
        report = bench.bench(options)
    assert report.errors == {"timeout": 2}


def test_a_request_that_is_given_up_closes_its_connection() -> None:
    hung_up = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        assert await reader.read() == b""
        hung_up.set()
        writer.close()

    async def give_up() -> None:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        server = Server.parse(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", None)
        pool, sample = Pool(server, 60.0), Sample()
        request = asyncio.create_task(pool.send(request_bytes(server, "GET", "/"), sample))
        await asyncio.wait_for(asked.wait(), 10)
        request.cancel()
        await asyncio.wait_for(hung_up.wait(), 10)
        assert sample.error == "cancelled"
        listening.close()

    asked = asyncio.Event()
    asyncio.run(give_up())


def test_ctrl_c_is_one_line_and_saves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    code = "import argparse, sys; from headrace.client import bench; parser = argparse.ArgumentParser(); bench.add_arguments(parser);"
    code += "sys.exit(bench.run(parser.parse_args()))"
    with serving(Behaviour(token_delay_s=0.01)) as server:
        words = ["--url", server.url, "--output-tokens", "100000", "--warmup", "0", "--json", str(file)]
        process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
        assert server.busy.acquire(timeout=20)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr
        with process.stderr:
            assert process.stderr.read().splitlines()[-1] == "headrace bench: interrupted, nothing saved"
        assert server.disconnects.acquire(timeout=10)
    assert not file.exists()


def test_a_duration_ends_and_counts_what_it_started() -> None:
    with serving(Behaviour(token_delay_s=0.005)) as server:
        report = measured(server, requests=None, duration=0.4, concurrency=3)
    assert 0.4 <= report.wall_s < 2
    assert report.completed == report.requests > 3


def test_requests_arrive_at_the_wanted_rate() -> None:
    with serving(Behaviour(first_delay_s=0.3)) as server:
        report = measured(server, concurrency=None, request_rate=60.0, requests=60, output_tokens=1)
    # An open loop does not wait for answers: 60 arrivals at 60/s take about a second, then 0.3 s for the last answer.
    assert 0.8 < report.wall_s < 2.5
    assert report.completed == 60


def test_cached_tokens_are_reported_and_unexpected_ones_noted() -> None:
    with serving(Behaviour(cached=16)) as server:
        report = measured(server)
    assert report.tokens.cached == 96
    assert any("cache" in note for note in report.notes)


def test_the_saved_report_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    with serving() as server:
        status = bench.run(
            parse("--url", server.url + "/v1", "--requests", "3", "--output-tokens", "4", "--seed", "1", "--json", str(file))
        )
    assert status == 0
    report = msgspec.json.decode(file.read_bytes(), type=Report, strict=True)
    assert report.schema == "headrace-bench/1" and report.completed == 3 and report.options.seed == 1
    assert report.machine.cores >= 1 and report.generator.cpu_s > 0
    out = capsys.readouterr().out
    assert "TTFT ms" in out and "12 tokens by usage" in out


def test_a_key_is_never_saved(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with serving(Behaviour(api_key="secret")) as server:
        bench.run(parse("--url", server.url, "--requests", "1", "--output-tokens", "1", "--api-key", "secret", "--json", str(file)))
    assert "secret" not in file.read_text()


def test_two_servers_are_measured_in_turn_with_the_same_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "comparison.json"
    with serving(Behaviour(token_delay_s=0.002)) as fast, serving(Behaviour(token_delay_s=0.02)) as slow:
        words = ("--url", fast.url, "--compare", slow.url, "--rounds", "2", "--requests", "2", "--output-tokens", "6")
        assert bench.run(parse(*words, "--seed", "3", "--json", str(file))) == 0
        assert fast.requests[-2:] == slow.requests[-2:]
        assert fast.requests[-2:] != fast.requests[1:3]
    saved = json.loads(file.read_text())
    assert saved["schema"] == "headrace-bench-compare/1" and len(saved["rounds"]) == 2
    ratios = {row["metric"]: row for row in saved["ratios"]}
    assert ratios["output tok/s"]["ratio"] > 2 and ratios["TPOT p50 ms"]["ratio"] < 0.5
    assert "A better" in capsys.readouterr().out


def test_a_dataset_gives_the_prompts(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i}" for i in range(1000)))
    with serving(Behaviour(tokenize=None)) as server:
        measured(server, dataset=str(file))
        assert server.requests[-1]["prompt"].startswith("word")
        file.write_text("too short")
        with pytest.raises(UserError, match="2 words"):
            measured(server, dataset=str(file))


@pytest.mark.parametrize("work", sorted(WORKLOADS))
def test_a_workload_fills_in_only_what_is_left_open(work: str) -> None:
    assert from_arguments(parse("--work", work)).requests == WORKLOADS[work]["requests"]
    assert from_arguments(parse("--work", work, "--requests", "7")).requests == 7
    assert from_arguments(parse("--work", work, "--requests", "7")).output_tokens == WORKLOADS[work]["output_tokens"]
    assert from_arguments(parse("--work", work, "--request-rate", "2")).concurrency is None


@pytest.mark.parametrize("words", [("--warm",), ("--rounds", "3"), ("--compare-model", "x"), ("--prompt-tokens", "2")])
def test_an_option_that_would_do_nothing_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError):
        from_arguments(parse(*words))


@pytest.mark.parametrize("words", [("--requests", "0"), ("--prompt-tokens", "9-3"), ("--prompt-tokens", "x"), ("--temperature", "nan")])
def test_a_value_out_of_range_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_percentiles_are_values_that_were_seen(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert {found.p50, found.p90, found.p99} <= set(values)
    assert found.least <= found.p50 <= found.p90 <= found.p99 <= found.most
    assert sum(value <= found.p90 for value in values) >= 0.9 * len(values)


class _Wire:
    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


EVENTS = b"".join(b'data: {"choices":[{"text":" w%d","finish_reason":null}]}\n\n' % i for i in range(5)) + (
    b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\ndata: {"usage":{"completion_tokens":5}}\n\ndata: [DONE]\n\n'
)


@given(st.lists(st.integers(1, len(EVENTS)), max_size=8), st.data())
def test_a_response_reads_the_same_however_it_is_cut(chunk_ends: list[int], data: st.DataObject) -> None:
    import asyncio

    ends = sorted({*chunk_ends, len(EVENTS)})
    chunks = [EVENTS[start:stop] for start, stop in pairwise([0, *ends])]
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    wire = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))

    async def read() -> Sample:
        connection, sample = Connection(), Sample()
        connection.connection_made(_Wire())  # type: ignore[arg-type]
        waiter = connection.exchange(b"", sample)
        for start, stop in pairwise([0, *cuts, len(wire)]):
            if start < stop:
                connection.data_received(wire[start:stop])
        await asyncio.wait_for(waiter, 1)
        assert connection.usable
        return sample

    sample = asyncio.run(read())
    assert sample.error is None and sample.done and sample.finish_reason == "length"
    assert len(sample.times) == 5


@pytest.mark.parametrize("url", ["ftp://x", "http://", "://"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        Server.parse(url, None)


def test_the_chat_template_counts_towards_the_length() -> None:
    with serving() as server, pytest.raises(UserError, match="cannot be had"):
        measured(server, endpoint="chat", prompt_tokens=(TEMPLATE_TOKENS, TEMPLATE_TOKENS))
