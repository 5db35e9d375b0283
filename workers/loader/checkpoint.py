"""A checkpoint as the model builder sees it: names, shapes, and weights in canonical form, whatever the files are.

    ModelFiles ── open_checkpoint ──▶ Checkpoint ── weight(name, rows, columns) ──▶ a canonical weight
                                                 ── vector(name) ──▶ float32

Names and metadata are the format's own; a family file in `workers/model/` knows what they mean. Nothing is read before it is
asked for: a rank that asks for its share touches only the pages of its share.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headrace.engine.checkpoint.card import ModelFiles
from headrace.kernels.weights import Weight
from headrace.workers.loader.gguf import GGUFCheckpoint
from headrace.workers.loader.safetensors import SafetensorsCheckpoint


class Checkpoint(Protocol):
    """Open files of one model. Every method raises UserError for a tensor that is missing, or of a kind that cannot be read."""

    format: str
    """"gguf" or "huggingface"."""
    path: Path
    """The GGUF file, or the directory."""
    metadata: Mapping[str, Any]
    """config.json, or the metadata of a GGUF file."""

    def names(self) -> list[str]:
        """All tensors, in file order."""
        ...

    @property
    def files(self) -> set[Path]:
        """All that weights are read from."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """(N, K) for a matrix of N rows (outputs) and K columns (inputs), (E, N, K) for those of E experts, (N,) for a vector."""
        ...

    def weight(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Weight:
        """A matrix, or a rank's part of it: float types as a view of the mapped file, packed types unpacked into fresh memory.

        `columns` of a type that has groups of inputs must fall on their borders (UserError otherwise).
        """
        ...

    def experts(self, name: str) -> list[Weight]:
        """The matrices [N, K] of a tensor [E, N, K], as `weight` gives them."""
        ...

    def vector(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A norm, a bias or a table of frequencies in float32; shares the file's memory when it is stored so. Read only."""
        ...


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """Open the files that `headrace.engine.checkpoint.resolve` found; UserError when they have changed for the worse since."""
    return GGUFCheckpoint(files.path) if files.format == "gguf" else SafetensorsCheckpoint(files.path)
