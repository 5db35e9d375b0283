"""Metrics as Prometheus reads them (text exposition format 0.0.4): the series of all processes, summed."""

from headrace.engine.messages.lifecycle import Histogram, Series


def merge(series: list[Series]) -> list[Series]:
    """One series for each name and labels: numbers are added, histograms added bucket by bucket."""
    merged: dict[tuple, Series] = {}
    for one in series:
        key = (one.name, one.labels)
        if key in merged:
            one = Series(one.name, one.kind, one.help, one.labels, _sum(merged[key].value, one.value))
        merged[key] = one
    return list(merged.values())


def render(series: list[Series]) -> str:
    """The text of a /metrics page."""
    lines: list[str] = []
    seen = ""
    for one in sorted(merge(series), key=lambda one: one.name):
        if one.name != seen:
            seen = one.name
            lines += [f"# HELP {one.name} {one.help}", f"# TYPE {one.name} {one.kind}"]
        if isinstance(one.value, Histogram):
            running = 0
            for bound, count in zip([*one.value.bounds, float("inf")], one.value.counts, strict=True):
                running += count
                le = "+Inf" if bound == float("inf") else f"{bound:g}"
                lines.append(f"{one.name}_bucket{_labels((*one.labels, ('le', le)))} {running}")
            lines.append(f"{one.name}_sum{_labels(one.labels)} {one.value.sum!r}")
            lines.append(f"{one.name}_count{_labels(one.labels)} {running}")
        else:
            lines.append(f"{one.name}{_labels(one.labels)} {one.value:.15g}")
    return "\n".join(lines) + "\n"


def _sum(a: float | Histogram, b: float | Histogram) -> float | Histogram:
    if isinstance(a, Histogram) and isinstance(b, Histogram):
        return Histogram(a.bounds, [x + y for x, y in zip(a.counts, b.counts, strict=True)], a.sum + b.sum)
    assert not isinstance(a, Histogram) and not isinstance(b, Histogram)
    return a + b


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    if not labels:
        return ""
    escaped = (value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for _, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for (name, _), value in zip(labels, escaped, strict=True)) + "}"
