"""What operators ask for, through real processes: draining, resuming, and another model without a connection lost."""

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from headrace.client import Client
from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from tests.serving import REAL, Served

TITLE = b"Smollm2 135M 8k Lc100K Mix1 Ep2"
PICKY = "tests.e2e.picky"
OPERATOR = {"Authorization": "Bearer turn the wheel"}
LONG = {"prompt": "a long one", "max_tokens": 150, "seed": 1}
SHORT = {"prompt": "a short one", "max_tokens": 5, "seed": 2}


def serve(worker: str = PICKY, **settings) -> Served:
    return Served(worker, admin_key="turn the wheel", **settings)


@pytest.fixture
def served():
    with serve() as served:
        yield served


@pytest.fixture
def named(tmp_path):
    """The default model, whose file gives it another name."""

    def copy(name: str) -> str:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(Path(resolve(Config()).path).read_bytes().replace(TITLE, name.ljust(len(TITLE)).encode(), 1))
        return str(path)

    return copy


def order(served: Served, what: str, body: dict | None = None) -> tuple[int, dict]:
    return served.ask(f"/admin/{what}", body, OPERATOR, method="POST")


def complete(served: Served, body: dict) -> tuple[int, dict]:
    return served.ask("/v1/completions", body)


def stream(served: Served, body: dict) -> str:
    with Client(served.url) as client, client.complete_stream(**body) as chunks:
        return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def test_only_who_has_the_operators_key_may_ask(served):
    assert served.ask("/admin/drain", method="POST")[0] == 401
    assert served.ask("/admin/drain", None, {"Authorization": "Bearer turn the wheels"}, method="POST")[0] == 401
    assert complete(served, SHORT)[0] == 200
    with Served(PICKY, api_key="secret") as other:
        status, body = other.ask("/admin/drain", None, {"Authorization": "Bearer secret"}, method="POST")
        assert (status, body["error"]["code"]) == (403, "no_admin_key")


def test_what_runs_ends_while_the_engine_drains_and_it_takes_requests_again_when_told(served):
    right = complete(served, LONG)[1]["choices"][0]["text"]
    with ThreadPoolExecutor() as pool:
        running = pool.submit(stream, served, LONG)
        served.until_running(1)
        assert order(served, "drain") == (202, {"status": "draining", "model": served.model})
        status, body = complete(served, SHORT)
        assert (status, body["error"]["code"]) == (503, "draining")
        assert order(served, "drain")[0] == 202
        assert running.result() == right
    served.until_state("drained")
    assert order(served, "reload", {})[0] == 409
    # Who is born meanwhile keeps the doors closed too.
    served.kill("scheduler")
    served.until_line("scheduler is back", 0)
    assert complete(served, SHORT)[0] == 503
    assert order(served, "resume") == (200, {"status": "ready", "model": served.model})
    assert order(served, "resume")[0] == 200
    assert complete(served, LONG)[1]["choices"][0]["text"] == right
    served.until_empty()


def test_servers_let_nobody_in_before_the_scheduler_takes_requests_again(served):
    assert order(served, "drain")[0] == 202
    served.until_state("drained")
    scheduler = served.pids()["scheduler"]
    with ThreadPoolExecutor() as pool:
        os.kill(scheduler, signal.SIGSTOP)
        try:
            resumed = pool.submit(order, served, "resume")
            for _ in range(100):
                assert served.ask("/health/ready")[1]["status"] == "drained"
            assert complete(served, SHORT)[0] == 503
        finally:
            os.kill(scheduler, signal.SIGCONT)
        assert resumed.result() == (200, {"status": "ready", "model": served.model})
    assert complete(served, SHORT)[0] == 200


def test_draining_can_be_taken_back_before_it_is_done(served):
    with ThreadPoolExecutor() as pool:
        running = pool.submit(complete, served, LONG)
        served.until_running(1)
        assert order(served, "drain")[0] == 202
        assert order(served, "resume")[0] == 200
        assert complete(served, SHORT)[0] == 200
        assert running.result()[0] == 200


def test_another_model_takes_over_and_no_connection_is_lost(served, named):
    right = {name: complete(served, body)[1]["choices"][0]["text"] for name, body in (("long", LONG), ("short", SHORT))}
    before = served.pids()
    address = urlsplit(served.url)
    kept = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    kept.request("GET", "/v1/models")
    assert json.loads(kept.getresponse().read())["data"][0]["id"] == served.model
    with ThreadPoolExecutor() as pool:
        running = pool.submit(stream, served, LONG)
        served.until_running(1)
        reloading = pool.submit(order, served, "reload", {"model": named("other")})
        served.until_state("reloading")
        # It comes while the old model still answers, waits, and gets the new one.
        kept.request("POST", "/v1/completions", json.dumps(SHORT), {"Content-Type": "application/json"})
        assert order(served, "drain")[0] == 409
        assert running.result() == right["long"]
        assert reloading.result() == (200, {"status": "ready", "model": "other"})
    answer = kept.getresponse()
    assert answer.status == 200
    body = json.loads(answer.read())
    assert (body["model"], body["choices"][0]["text"]) == ("other", right["short"])
    kept.close()
    after = served.pids()
    assert {name for name in before if before[name] == after[name]} == {"server-0"}
    assert complete(served, SHORT | {"model": served.model})[0] == 404
    assert complete(served, SHORT | {"model": "other"})[0] == 200
    assert served.metric("headrace_restarts_total", process="worker-0") == 0
    # Whoever dies from now on comes back with the new model too.
    for name in ("server-0", "worker-0"):
        since = len(served.lines)
        served.kill(name)
        served.until_line(f"{name} is back", since)
        served.until_state("ready")
        assert complete(served, SHORT | {"model": "other"})[0] == 200
    served.until_empty()


@pytest.mark.parametrize(("name", "why"), [("refused", "not to my taste"), ("crashing", "worker-0 ended with status 7")])
def test_a_model_that_cannot_be_served_leaves_the_present_one(served, named, name, why):
    right = complete(served, SHORT)[1]["choices"][0]["text"]
    with ThreadPoolExecutor() as pool:
        reloading = pool.submit(order, served, "reload", {"model": named(name)})
        served.until_state("reloading")
        waiting = pool.submit(complete, served, SHORT)
        status, body = reloading.result()
        assert status == 422
        assert why in body["error"]["message"]
        status, body = waiting.result()
        assert (status, body["model"], body["choices"][0]["text"]) == (200, served.model, right)
    assert served.metric("headrace_restarts_total", process="worker-0") == 0


def test_a_model_that_is_not_there_changes_nothing(served):
    before = served.pids()
    status, body = order(served, "reload", {"model": "/nowhere/model.gguf"})
    assert (status, body["error"]["param"]) == (400, "model")
    assert order(served, "reload", {"modell": "x"})[0] == 400
    assert order(served, "reload", {"revision": "x"})[0] == 400
    assert served.pids() == before
    assert complete(served, SHORT)[0] == 200


def test_requests_that_do_not_end_in_time_keep_their_model():
    with serve(drain_timeout=0.3) as served:
        right = complete(served, LONG)[1]["choices"][0]["text"]
        with ThreadPoolExecutor() as pool:
            running = pool.submit(stream, served, LONG)
            served.until_running(1)
            status, body = order(served, "reload", {})
            assert status == 504
            assert "--drain-timeout" in body["error"]["message"]
            assert complete(served, SHORT)[0] == 200
            assert running.result() == right


def test_a_worker_that_dies_while_its_last_requests_run_changes_nothing_about_them(served):
    right = complete(served, LONG)[1]["choices"][0]["text"]
    with ThreadPoolExecutor() as pool:
        running = pool.submit(stream, served, LONG)
        served.until_running(1)
        reloading = pool.submit(order, served, "reload", {})
        served.until_state("reloading")
        served.kill("worker-0")
        assert running.result() == right
        assert reloading.result()[0] == 200
    assert complete(served, SHORT)[0] == 200


def test_the_real_model_is_read_anew(named):
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    with serve(REAL, threads=2) as served:
        right = complete(served, body)[1]["choices"][0]["text"]
        begun = time.monotonic()
        assert order(served, "reload", {"model": named("again")})[0] == 200
        print(f"another model after {time.monotonic() - begun:.2f} s")
        assert complete(served, body | {"model": "again"})[1]["choices"][0]["text"] == right
        assert order(served, "reload")[0] == 200
