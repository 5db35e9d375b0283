"""What became of each request and when, a JSON line each as it ends.

    {"id": "chatcmpl-5e…", "request": "1f…", "tenant": "", "ended": "stop", "at": 1700000000.0, "queue_s": 0.001, "first_token_s": 0.04,
     "total_s": 0.9, "prompt_tokens": 32, "cached_tokens": 16, "chunks": 1, "emitted_tokens": 128, "preemptions": 0, "worker_deaths": 0}

Durations count from the arrival at the scheduler; a moment that never came is null. A line is one write to a file opened for appending, so
that it stays whole beside those of other processes.
"""

import os
import time

import msgspec

from headrace.engine.errors import UserError
from headrace.engine.scheduler.journal import Entry

STANDARD_ERROR = "-"


class Timeline(msgspec.Struct):
    id: str
    """The answer's `x-request-id`."""
    request: str
    """One of the answer's choices."""
    tenant: str
    ended: str
    """"stop", "length", "abort", "error", or the code of the error it ended in."""
    at: float
    """Unix time, seconds."""
    queue_s: float | None
    first_token_s: float | None
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    chunks: int
    emitted_tokens: int
    preemptions: int
    worker_deaths: int


class Timelines:
    """Writes to the file at `path`, to standard error for "-", nowhere for None. `UserError` when it cannot be opened."""

    def __init__(self, path: str | None) -> None:
        self._file: int | None = None
        self._encode = msgspec.json.Encoder().encode
        if path == STANDARD_ERROR:
            self._file = 2
        elif path is not None:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise UserError(f"cannot write the request log {path}: {error.strerror}: name another file with --request-log") from None

    def add(self, entry: Entry, ended: str, now: float) -> None:
        """A request is over; `now` in monotonic seconds."""
        if self._file is None:
            return

        def since(moment: float | None) -> float | None:
            return None if moment is None else round(moment - entry.arrived, 6)

        line = Timeline(
            id=entry.submit.answer,
            request=f"{entry.submit.request:016x}",
            tenant=entry.submit.tenant,
            ended=ended,
            at=round(time.time(), 3),
            queue_s=since(entry.started),
            first_token_s=since(entry.first_token),
            total_s=round(now - entry.arrived, 6),
            prompt_tokens=len(entry.submit.prompt),
            cached_tokens=entry.cached,
            chunks=entry.chunks,
            emitted_tokens=len(entry.emitted),
            preemptions=entry.preemptions,
            worker_deaths=entry.worker_deaths,
        )
        os.write(self._file, self._encode(line) + b"\n")

    def close(self) -> None:
        if self._file is not None and self._file > 2:
            os.close(self._file)
            self._file = None
