"""Spans of requests arrive at a collector, as the SDK sends them."""

import queue
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headrace.engine.errors import UserError
from headrace.engine.scheduler.traces import Traces, wanted
from tests.serving import Served

trace_service_pb2 = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra otel is not installed"
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PATIENCE = 20.0


@pytest.fixture
def collector(monkeypatch) -> Iterator[queue.Queue]:
    """A collector on loopback, to which the environment points; gives what is posted to /v1/traces."""
    posted: queue.Queue = queue.Queue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            posted.put(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield posted
        server.shutdown()
        thread.join()


def spans(posted: queue.Queue, count: int) -> list:
    """The next spans, `count` of them."""
    found: list = []
    while len(found) < count:
        for resource in posted.get(timeout=PATIENCE).resource_spans:
            assert any(one.key == "service.name" and one.value.string_value == "headrace" for one in resource.resource.attributes)
            found += [span for scope in resource.scope_spans for span in scope.spans]
    return found


def attributes(span) -> dict:
    values = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        values[one.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return values


def test_a_request_is_a_span_with_its_phases_below_that_of_the_client(collector):
    with Served() as served:
        status, _ = served.ask(
            "/v1/completions",
            {"prompt": "one two three", "max_tokens": 9, "seed": 1},
            {"traceparent": PARENT, "x-request-id": "my-own"},
        )
        assert status == 200
        by_name = {span.name: span for span in spans(collector, 4)}
        whole = by_name[f"text_completion {served.model}"]
        assert whole.trace_id.hex() == PARENT.split("-")[1]
        assert whole.parent_span_id.hex() == PARENT.split("-")[2]
        said = attributes(whole)
        assert said["gen_ai.response.id"] == "my-own"
        assert (said["gen_ai.usage.output_tokens"], said["gen_ai.response.finish_reasons"]) == (9, ["length"])
        assert said["gen_ai.usage.input_tokens"] > 0
        moments = [whole.start_time_unix_nano]
        for name in ("queue", "prefill", "decode"):
            span = by_name[name]
            assert (span.trace_id, span.parent_span_id) == (whole.trace_id, whole.span_id)
            assert span.start_time_unix_nano == moments[-1]
            moments.append(span.end_time_unix_nano)
        assert moments == sorted(moments)
        assert moments[-1] == whole.end_time_unix_nano


def test_a_request_without_a_parent_begins_a_trace_and_one_that_fails_says_so(collector):
    with Served() as served:
        body = {"prompt": "one", "max_tokens": 1000, "timeout": 0.001}
        status, _ = served.ask("/v1/completions", body, {"traceparent": "no such thing"})
        assert status == 504
        whole = next(span for span in spans(collector, 2) if span.name.startswith("text_completion"))
        assert whole.parent_span_id == b""
        assert attributes(whole)["error.type"] == "timeout"
        assert whole.status.code == 2


def test_without_a_place_for_spans_the_sdk_is_not_even_imported():
    assert not wanted({})
    assert not wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"})
    assert not wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"})
    Traces("m", {}).close()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "OTEL_TRACES_EXPORTER=jaeger"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "port 4318"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(environ, message):
    with pytest.raises(UserError, match=message):
        Traces("m", environ)


def test_a_missing_package_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r'pip install "headrace\[otel\]"'):
        Traces("m", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"})
