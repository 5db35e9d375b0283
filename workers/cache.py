"""Where what was made of a model's files is kept between starts.

$XDG_CACHE_HOME/headrace/weights/<model>-<hash of its path>/
"""

import hashlib
import os
from pathlib import Path

from headrace.workers.loader import Checkpoint


def cache_folder() -> Path:
    """The folder for everything that can be made again, by the XDG base directory specification."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "headrace"


def weights_folder(checkpoint: Checkpoint) -> Path:
    """The folder for the weights of the model at this path."""
    path = checkpoint.path.resolve()
    return cache_folder() / "weights" / f"{path.stem[:64]}-{_hash(str(path))}"


def weights_version(checkpoint: Checkpoint) -> str:
    """Another once any of the checkpoint's files has changed."""
    files = [(file.resolve(), file.stat()) for file in sorted(checkpoint.files)]
    return _hash(*(f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in files))


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
