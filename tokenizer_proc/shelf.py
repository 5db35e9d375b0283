"""Requests that are kept for a while after they ended or lost their reader: a stream that broke can go on from here.

    ended, aborted, frontend dead ─▶ put ─▶ a file for each, for KEPT_S ─▶ find ─▶ a frontend submits them again

A request is a pure function of its prompt, parameters, seed and tokens, so nothing runs on for a reader that may never return: what is
kept is a record, and going on means to compute again what is not in it. The files lie in the engine's run directory, which is private
and goes with the engine: whichever processes die in the meantime, all tokenizers find what any of them has put there.

    answers/<digest of tenant and answer>-<choice>
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

import msgspec

from headrace.engine.messages.frontend import Kept, TokenPrompt
from headrace.tokenizer_proc.live import Live

KEPT_S = 60.0
"""Seconds for which an answer can be recalled."""

MOST_BYTES = 64 << 20
"""About what all records together may take; the oldest go first."""

SWEEP_S = 5.0
"""Seconds between two looks at what has lain for too long."""


class Shelf:
    """The records of all tokenizers of the engine that runs in `run_dir`. A disk that is full costs records, nothing else."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "answers"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._unfinished = self._folder / f"unfinished-{os.getpid()}"
        self._swept = time.time()
        self._bytes = 0
        """Written since the last sweep, and what that left."""

    def put(self, live: Live) -> None:
        """Keep a request as far as it came; nothing happens to one whose frontend left no notes."""
        generate = live.generate
        if not generate.notes:
            return
        choice = generate.first_choice + live.place
        one = msgspec.structs.replace(
            generate,
            requests=(live.request,),
            seeds=(generate.seeds[live.place],),
            prompt=TokenPrompt(tuple(live.submit.prompt)),
            emitted=(tuple(live.tokens),),
            first_choice=choice,
        )
        record = msgspec.msgpack.encode(Kept(one, live.end))
        self._bytes += len(record)
        with contextlib.suppress(OSError):
            self._unfinished.write_bytes(record)
            self._unfinished.rename(self._folder / f"{_digest(generate.tenant, generate.answer)}-{choice}")
            if time.time() - self._swept > SWEEP_S or self._bytes > MOST_BYTES:
                self._sweep()

    def find(self, tenant: str, answer: str) -> list[Kept]:
        """The requests of an answer."""
        oldest = time.time() - KEPT_S
        found = []
        for path in self._folder.glob(f"{_digest(tenant, answer)}-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= oldest:
                    found.append(msgspec.msgpack.decode(path.read_bytes(), type=Kept))
        return found

    def _sweep(self) -> None:
        """Take away what is too old, and the oldest of what is too much."""
        self._swept = time.time()
        files = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                files.append((status.st_mtime, status.st_size, entry.path))
        self._bytes = 0
        for written, size, path in sorted(files, reverse=True):
            self._bytes += size
            # Half of what there may be, so that not every record that follows is one too many.
            if written < self._swept - KEPT_S or self._bytes > MOST_BYTES // 2:
                self._bytes -= size
                Path(path).unlink(missing_ok=True)


def _digest(tenant: str, answer: str) -> str:
    return hashlib.sha256(f"{tenant}\n{answer}".encode(errors="surrogateescape")).hexdigest()[:32]
