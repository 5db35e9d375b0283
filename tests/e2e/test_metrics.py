"""What the engine measures of its own misfortunes, and a dashboard that shows what is really exported."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import headrace.server
from tests.guests import Keys, Listening
from tests.serving import Served

DASHBOARD = json.loads((Path(headrace.server.__file__).parent / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
NAME = re.compile(r"headrace_[a-z_]+")


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """An engine to which everything has happened that is counted."""
    keys = Keys(tmp_path_factory.mktemp("keys"))
    with Listening(keys, "tests.e2e.paced", admin_key="operator", request_timeout=60, max_waiting=1, max_running=4) as served:
        body = {"prompt": "one two three", "max_tokens": 4}
        for streamed in (False, True):
            served.ask("/v1/completions", body | {"stream": streamed})
        assert served.ask("/v1/completions", body | {"max_tokens": 1000, "timeout": 0.01})[0] == 504
        assert served.ask("/v1/completions", body | {"prompt": "word " * 20000})[0] == 400
        assert served.ask("/admin/reload", {}, {"Authorization": "Bearer operator"})[0] == 200
        since = len(served.lines)
        served.kill("worker-0")
        served.until_line("worker-0 is back", since)
        assert served.ask("/v1/completions", body)[0] == 200
        yield served


def families(page: str) -> dict[str, str]:
    """The metrics of a page, and their types."""
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))


def family(name: str, known: dict[str, str]) -> str:
    stem = re.sub("_(bucket|sum|count)$", "", name)
    return stem if known.get(stem) == "histogram" else name


def test_the_dashboard_asks_for_nothing_that_is_not_exported_and_shows_all_that_is(eventful):
    exported = families(eventful.ask("/metrics")[1])
    asked = {family(name, exported) for expression in EXPRESSIONS for name in NAME.findall(expression)}
    # A refusal by the scheduler needs a full queue: it is counted in a test of its own.
    assert asked - {"headrace_requests_refused_total"} == set(exported) - {"headrace_requests_refused_total"}


def test_the_dashboard_takes_rates_of_counters_and_quantiles_of_histograms_and_nothing_else(eventful):
    exported = families(eventful.ask("/metrics")[1]) | {"headrace_requests_refused_total": "counter"}
    for expression in EXPRESSIONS:
        for call, name in re.findall(r"(rate|increase)?\(?\s*(headrace_[a-z_]+)\{", expression):
            kind = exported[family(name, exported)]
            assert bool(call) == (kind in ("counter", "histogram")), expression
            if kind == "histogram":
                assert name.endswith("_bucket") == ("histogram_quantile" in expression), expression


def test_panels_do_not_overlap_and_have_a_unit_and_a_title():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken
        assert all(0 <= x < 24 for x, _ in cells)
        taken |= cells
        assert panel["title"]
        assert panel["type"] == "row" or (panel["fieldConfig"]["defaults"]["unit"] and panel["targets"])


def test_deaths_are_counted_and_timed_and_what_operators_do_is_not_a_death(eventful):
    assert eventful.metric("headrace_restarts_total", process="worker-0") == 1
    assert eventful.metric("headrace_recovery_seconds_count", process="worker-0") == 1
    assert 0 < eventful.metric("headrace_recovery_seconds_sum", process="worker-0") < 60
    assert not eventful.has_metric("headrace_recovery_seconds_count", process="scheduler")
    assert eventful.metric("headrace_reloads_total", outcome="done") == 1


def test_what_is_refused_is_counted_by_cause():
    with Served("tests.e2e.paced", max_waiting=1, max_running=1) as served:
        # What is asked for before the tokenizer has heard of the scheduler is submitted once more when it does.
        assert served.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: served.ask("/v1/completions", {"prompt": "a", "max_tokens": 200}), range(8)))
        refused = [body["error"]["code"] for status, body in answers if status == 429]
        assert refused
        assert set(refused) == {"overloaded"}
        assert served.metric("headrace_requests_refused_total", cause="overloaded") == len(refused)
