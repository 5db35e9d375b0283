"""What the server measures of requests: latencies as a client sees them, up to the socket."""

from headrace.engine.messages.frontend import End
from headrace.engine.metrics import REFUSED, REFUSED_HELP, Metrics

_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class RequestMeters:
    """Shared by all requests of one server."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.first_token = metrics.histogram("headrace_time_to_first_token_seconds", "From the arrival of a request to its first token.")
        self.token_gap = metrics.histogram("headrace_inter_token_latency_seconds", "Between two steps of one request.", _TOKEN_SECONDS)
        self.per_token = metrics.histogram(
            "headrace_time_per_output_token_seconds", "Mean time a token after the first, of requests that ended.", _TOKEN_SECONDS
        )
        self.whole = metrics.histogram("headrace_request_seconds", "From the arrival of a request to its end.")
        self.disconnects = metrics.counter("headrace_disconnects_total", "Requests whose client went away before the end.")

    def refused(self, code: str) -> None:
        """Count a request that went no farther than the server, as those that the scheduler refuses."""
        self._metrics.counter(REFUSED, REFUSED_HELP, labels=(("cause", code),)).add()

    def answered(self, route: str, status: int) -> None:
        """Count one HTTP answer."""
        labels = (("route", route), ("status", str(status)))
        self._metrics.counter("headrace_http_requests_total", "HTTP requests by route and status.", labels=labels).add()


class Timing:
    """The moments of one request."""

    __slots__ = ("_first", "_last", "_meters", "_start")

    def __init__(self, meters: RequestMeters, start: float) -> None:
        self._meters = meters
        self._start = start
        self._first = 0.0
        self._last = 0.0

    def tokens(self, now: float) -> None:
        """One or more tokens came."""
        if self._first:
            self._meters.token_gap.observe(now - self._last)
        else:
            self._first = now
            self._meters.first_token.observe(now - self._start)
        self._last = now

    def end(self, end: End, now: float) -> None:
        self._meters.whole.observe(now - self._start)
        if end.completion_tokens > 1:
            self._meters.per_token.observe((self._last - self._first) / (end.completion_tokens - 1))
