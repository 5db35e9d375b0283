"""The checks of `tests.kernels.triton_parity`, by as many processes as there are cores: most of the time goes into compiling, one core
each. What `scripts/kernel-parity` runs, and `scripts/gpu-check` on a GPU.

    checks, new ones and long ones first ─▶ whoever is free takes the next ─▶ a line for each, as it comes ─▶ table by op and type

Long ones are those that took long in an earlier run.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

MOST_PROCESSES = 15
TYPES = ("bfloat16", "float16", "float32")
_CASE = re.compile(
    r" (HeadShape\(.*?\)|\d+(x\d+)+|silu|gelu_tanh|sorted|chosen|window \w+|of small values|at ends of pages|of no rows|"
    r"rows alone and together|trees as paths)"
)
"""What a check's name says beside the op and the kind of its weights or pages."""


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


def table(lines: Iterable[dict]) -> list[dict]:
    """By op, kind of weights or pages, and type: how many checks, the worst relative error and the largest difference, and how many values
    were other bits than alone, or than the reference's where those are to be met."""
    rows: dict[tuple[str, str], dict] = {}
    for line in lines:
        subject = _CASE.sub("", line["check"]), line["type"]
        empty = {"op": subject[0], "type": subject[1], "checks": 0, "wrong": 0, "relative": None, "largest": None, "other_bits": None}
        row = rows.setdefault(subject, empty)
        row["checks"] += 1
        row["wrong"] += not line["ok"]
        for name, value in (("relative", line["error"]), ("largest", line.get("largest"))) if line["bound"] else ():
            if value is not None:
                row[name] = value if row[name] is None else max(row[name], value)
        if line["bound"] == 0 and line["error"] is not None:
            row["other_bits"] = (row["other_bits"] or 0) + line["error"]
    return [rows[subject] for subject in sorted(rows)]


def line_of(row: dict) -> str:
    """One of `table`."""
    said = lambda name, form: "–" if row[name] is None else format(row[name], form)  # noqa: E731
    return (
        f"{row['op']:32} {row['type']:9} {row['checks']:3} checks, {row['wrong']} wrong; relative error {said('relative', '.1e'):7} "
        f"largest {said('largest', '.1e'):7} other bits {said('other_bits', 'g')}"
    )


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


def main() -> None:
    from tests.kernels.triton_parity import every

    parser = argparse.ArgumentParser(prog="scripts/kernel-parity", description="Every Triton kernel beside the reference.")
    parser.add_argument("--device", default="cpu", help="default: cpu, by the backend in kernels/triton_cpu")
    parser.add_argument("--only", default="", metavar="TEXT", help="the checks whose name contains this")
    parser.add_argument("--type", nargs="+", default=TYPES, choices=TYPES, help="of activations; default: all")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    checks = every(arguments.device)
    numbers = [number for number, check in enumerate(checks) if arguments.only in check.name and check.type in arguments.type]
    begun, lines = time.perf_counter(), []
    for line in outcomes(arguments.device, numbers):
        number = line.pop("number")
        lines.append(line)
        if not line["ok"]:
            print(
                f"WRONG {checks[number].title}", {key: value for key, value in line.items() if key != "where"}, line.get("where", "")[-800:]
            )
        if len(lines) % 20 == 0:
            print(f"{len(lines):4} of {len(numbers)} checks after {time.perf_counter() - begun:.0f} s", flush=True)
    rows = table(lines)
    for row in rows:
        print(line_of(row))
    print(f"{sum(line['ok'] for line in lines)} of {len(numbers)} checks are right, after {time.perf_counter() - begun:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": arguments.device, "table": rows}, indent=1) + "\n")
    sys.exit(not all(line["ok"] for line in lines))


if __name__ == "__main__":
    main()
