"""OpenTelemetry spans of requests, where the environment asks for them by the SDK's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, …).

    text_completion MODEL            from arrival to the last token; a child of the client's span if that sent a `traceparent`
    ├── queue                        until the first step
    ├── prefill                      until the first token
    └── decode

Names and attributes are those of OpenTelemetry's conventions for generative AI where there are any (gen_ai.*), headrace.* otherwise. A
request's spans are made when it is over, from the moments that its journal entry holds, so that tracing costs a token nothing.
"""

import os
import time
from collections.abc import Mapping

from headrace.engine.errors import UserError
from headrace.engine.scheduler.journal import Entry

ENDED_WELL = frozenset({"stop", "length", "abort"})
_ASKS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment names a place for spans, and does not switch them off."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER", "") == "none":
        return False
    return any(environ.get(name) for name in _ASKS)


class Traces:
    """Hands spans to the SDK, or does nothing where none are wanted. `UserError` where they are, and cannot be had."""

    def __init__(self, model: str, environ: Mapping[str, str] = os.environ) -> None:
        self._provider = None
        self._model = model
        if not wanted(environ):
            return
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            exporter = _exporter(environ)
        except ImportError as error:
            raise UserError(f'OTEL_* variables ask for traces, and {error.name} is not installed: pip install "headrace[otel]"') from None
        named = {} if environ.get("OTEL_SERVICE_NAME") else {"service.name": "headrace"}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headrace")
        self._context_of = TraceContextTextMapPropagator().extract
        self._inside = set_span_in_context
        self._kind, self._status, self._codes = SpanKind.SERVER, Status, StatusCode

    def add(self, entry: Entry, ended: str, now: float) -> None:
        """A request is over; `now` in monotonic seconds."""
        if self._provider is None:
            return
        submit = entry.submit
        later = time.time_ns() - int(time.monotonic() * 1e9)

        def at(moment: float) -> int:
            return int(moment * 1e9) + later

        whole = self._tracer.start_span(
            f"text_completion {self._model}",
            context=self._context_of({"traceparent": submit.trace}) if submit.trace else None,
            kind=self._kind,
            start_time=at(entry.arrived),
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "headrace",
                "gen_ai.request.model": self._model,
                "gen_ai.request.temperature": submit.sampling.temperature,
                "gen_ai.response.id": submit.answer,
                "gen_ai.response.finish_reasons": (ended,),
                "gen_ai.usage.input_tokens": len(submit.prompt),
                "gen_ai.usage.output_tokens": len(entry.emitted),
                "headrace.tenant": submit.tenant,
                "headrace.priority": submit.priority,
                "headrace.cached_tokens": entry.cached,
                "headrace.chunks": entry.chunks,
                "headrace.preemptions": entry.preemptions,
                "headrace.worker_deaths": entry.worker_deaths,
            },
        )
        if ended not in ENDED_WELL:
            whole.set_attribute("error.type", ended)
            whole.set_status(self._status(self._codes.ERROR, ended))
        inside = self._inside(whole)
        moments = [("queue", entry.arrived), ("prefill", entry.started), ("decode", entry.first_token)]
        known = [(name, moment) for name, moment in moments if moment is not None]
        for (name, begin), (_, end) in zip(known, [*known[1:], ("", now)], strict=True):
            self._tracer.start_span(name, context=inside, start_time=at(begin)).end(at(end))
        whole.end(at(now))

    def close(self) -> None:
        """Send what has not been sent, for as long as the SDK thinks fit."""
        if self._provider is not None:
            self._provider.shutdown()


def _exporter(environ: Mapping[str, str]):
    """Where spans go, by the SDK's variables."""
    kind = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if kind == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if kind != "otlp":
        raise UserError(f"OTEL_TRACES_EXPORTER={kind}: use otlp, console or none")
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol != "http/protobuf":
        raise UserError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: only http/protobuf is spoken; collectors listen for it on port 4318")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
