"""Counters, gauges and histograms of one process, cheap enough for once a token.

A process fills its own `Metrics` and hands a snapshot to the supervisor when asked; the server renders the sum of all snapshots as
Prometheus text. Nothing here knows of HTTP.
"""

from bisect import bisect_left

from headrace.engine.messages.lifecycle import Histogram, Series

Labels = tuple[tuple[str, str], ...]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Bounds for latencies."""

REFUSED = "headrace_requests_refused_total"
REFUSED_HELP = "Requests refused, by cause."
REJECTED_FRAMES = "headrace_rejected_frames_total"
REJECTED_FRAMES_HELP = "Messages on a socket of the process that were dropped, being none that it understands."

REJECTED_CONNECTIONS = "headrace_rejected_connections_total"
REJECTED_CONNECTIONS_HELP = "Connections from other machines that came to nothing: no key, none that may connect, or another protocol."


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        self.value += amount


class Gauge:
    """A number that is set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        self.value = value


class Distribution:
    """A histogram with fixed bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Metrics:
    """All metrics of one process, by name and labels."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, Labels], tuple[str, str, Counter | Gauge | Distribution]] = {}

    def counter(self, name: str, help: str, labels: Labels = ()) -> Counter:
        """The counter of this name and these labels; made on first use."""
        return self._get(name, "counter", help, labels, Counter)

    def gauge(self, name: str, help: str, labels: Labels = ()) -> Gauge:
        return self._get(name, "gauge", help, labels, Gauge)

    def histogram(self, name: str, help: str, bounds: tuple[float, ...] = SECONDS, labels: Labels = ()) -> Distribution:
        return self._get(name, "histogram", help, labels, lambda: Distribution(bounds))

    def snapshot(self) -> list[Series]:
        """A copy of everything, as messages."""
        series = []
        for (name, labels), (kind, help, item) in self._items.items():
            value = Histogram(item.bounds, list(item.counts), item.sum) if isinstance(item, Distribution) else item.value
            series.append(Series(name, kind, help, labels, value))
        return series

    def _get(self, name, kind, help, labels, make):
        found = self._items.get((name, labels))
        if found is None:
            found = self._items[name, labels] = (kind, help, make())
        elif found[0] != kind:
            raise ValueError(f"metric {name} is a {found[0]}, not a {kind}")
        return found[2]
