"""The checks of `tests.kernels.triton_parity`, by as many processes as there are cores: most of the time goes into compiling, one core
each.

    checks, new ones and long ones first ─▶ whoever is free takes the next ─▶ a line for each, as it comes

Long ones are those that took long in an earlier run.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

MOST_PROCESSES = 15


def ordered(names: Sequence[str], earlier: Sequence[dict]) -> list[int]:
    """Numbers of the checks, by `triton_parity.Check.title`: those first that an earlier run does not have, then those that took longest
    there."""
    seconds = {f"{line['check']} {line['type']}": line.get("seconds", 0.0) for line in earlier}
    return sorted(range(len(names)), key=lambda number: -seconds.get(names[number], float("inf")))


def outcomes(device: str, numbers: Sequence[int], processes: int | None = None) -> Iterator[dict]:
    """The outcome of each of these checks, as it comes. Whoever stops listening stops the processes."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_parity", "--device", device, "--asked"]
    workers = Workers(command, numbers, processes or min(MOST_PROCESSES, os.cpu_count() or 1))
    try:
        for _ in numbers:
            yield workers.found.get()
    finally:
        workers.stop()


class Workers:
    """Processes that are given a number, a line, and answer with a line of JSON. One that dies is the outcome of the number that it was
    at, and another takes its place."""

    def __init__(self, command: list[str], numbers: Sequence[int], processes: int) -> None:
        self.found: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._command = command
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in numbers:
            self._waiting.put(number)
        self._lock, self._stopped = threading.Lock(), False
        self._running: list[subprocess.Popen[str]] = []
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(len(numbers), processes))]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the processes, whatever they are at."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        process = None
        while not self._stopped:
            try:
                number = self._waiting.get_nowait()
            except queue.Empty:
                break
            process = process or self._started()
            line = "" if process is None else _answer(process, number)
            if line:
                answer = json.loads(line)
                self.found.put(answer | {"number": number})
                if "why" in answer and process is not None:
                    # It ends itself, see `triton_parity`.
                    process.wait()
                    process = None
            elif process is not None and not self._stopped:
                why = f"its process ended with {process.wait()}"
                self.found.put({"number": number, "error": None, "bound": None, "ok": False, "why": why})
                process = None
        if process is not None and process.stdin is not None:
            # What a killed one has not read cannot be written any more, and closing tries to.
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()

    def _started(self) -> subprocess.Popen[str] | None:
        """A new process; none any more once all are to end."""
        with self._lock:
            if self._stopped:
                return None
            self._running.append(subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            return self._running[-1]


def _answer(process: subprocess.Popen[str], number: int) -> str:
    """The line that the process gives for the number, empty where it dies."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""
