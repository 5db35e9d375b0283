"""The folder of an engine's sockets, which is made for it and goes with it."""

import os
import tempfile
from pathlib import Path

from headrace.engine.errors import UserError

LONGEST_ADDRESS = 107
"""Bytes of a socket's path that Linux takes (unix(7))."""

LONGEST_NAME = len("tokenizer-99.desk")


def make_run_dir() -> Path:
    """A private folder for the engine's sockets. UserError where there can be none."""
    place = os.environ.get("XDG_RUNTIME_DIR")
    named = f"XDG_RUNTIME_DIR {place}" if place else f"TMPDIR {tempfile.gettempdir()}"
    try:
        run_dir = Path(tempfile.mkdtemp(prefix="headrace-", dir=place))
    except OSError as error:
        raise UserError(f"{named}: no folder for sockets can be made there ({error.strerror}); name one that can be written to") from None
    if len(os.fsencode(run_dir)) + 1 + LONGEST_NAME > LONGEST_ADDRESS:
        run_dir.rmdir()
        raise UserError(f"{named} is too long for sockets, whose paths have {LONGEST_ADDRESS} bytes at most; name a shorter one")
    return run_dir
