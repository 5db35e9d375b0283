"""How far a measurement is: a bar on a terminal, a plain line every few seconds elsewhere. Always on stderr."""

import asyncio
import sys
from time import perf_counter

from headrace.client.bench.wire import Sample

_BAR_PERIOD_S = 0.25
_LINE_PERIOD_S = 5.0


class Progress:
    """Of one measurement after the other. `label` tells them apart."""

    def __init__(self, label: str = "") -> None:
        self.label = label
        self._task: asyncio.Task[None] | None = None
        self._bar = None
        self._is_terminal = sys.stderr.isatty()
        self._samples: list[Sample] = []
        self._total: int | None = None
        self._duration: float | None = None
        self._started = 0.0

    def say(self, text: str) -> None:
        """One line, on a terminal only: what happens before the clock runs."""
        if self._is_terminal:
            print(f"\r\x1b[2K{self.label}{text} …", end="", file=sys.stderr, flush=True)

    def start(self, total: int | None, duration: float | None, samples: list[Sample]) -> None:
        """Show the progress of `samples` towards `total` requests or `duration` seconds."""
        self._samples, self._total, self._duration, self._started = samples, total, duration, perf_counter()
        if self._is_terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._open_bar()
        self._task = asyncio.get_running_loop().create_task(self._tick())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()
        if self._bar is not None:
            self._show()
            self._bar.stop()
            self._bar = None

    def _open_bar(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return
        text = TextColumn("{task.fields[state]}")
        self._bar = Bar(
            TextColumn(self.label + "measuring"), BarColumn(), text, TimeElapsedColumn(), console=Console(stderr=True), auto_refresh=False
        )
        self._bar.start()
        self._bar.add_task("", total=self._total or self._duration, state="")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_BAR_PERIOD_S if self._bar is not None else _LINE_PERIOD_S)
            self._show()

    def _show(self) -> None:
        elapsed = perf_counter() - self._started
        ended = sum(sample.ended > 0 for sample in self._samples)
        chunks = sum(len(sample.times) for sample in self._samples)
        wanted = f"{ended}/{self._total}" if self._total else f"{ended}"
        state = f"{wanted} requests · {chunks} chunks · {chunks / max(elapsed, 1e-9):.0f}/s"
        if self._bar is not None:
            reached = ended if self._total else min(elapsed, self._duration or elapsed)
            self._bar.update(self._bar.task_ids[0], completed=reached, state=state, refresh=True)
        else:
            print(f"{self.label}{elapsed:6.1f} s  {state}", file=sys.stderr, flush=True)
