"""The extension built from src/. Addresses are those of contiguous tensors, 0 for none; sizes and meaning are in src/ops.h."""

from collections.abc import Sequence

import numpy as np

Scores = tuple[float, list[int], list[float]]

PANEL: int
SOURCES: str

def instruction_sets() -> list[str]: ...
def number(seed: int, position: int, /) -> float: ...

class Linear:
    def __init__(
        self,
        form: int,
        outputs: int,
        inputs: int,
        group: int,
        offset: int,
        halves: bool,
        values: int,
        scales: int,
        minimums: int,
        bias: int,
        /,
    ) -> None: ...

class Heads:
    def __init__(self, query: int, kv: int, dim: int, /) -> None: ...

class KV:
    def __init__(self, keys: int, values: int, pages: int, page_size: int, /) -> None: ...

class Batch:
    def __init__(
        self, positions: int, slots: int, query_start: int, pages: int, tokens: int, requests: int, table_width: int, /
    ) -> None: ...

class Engine:
    """ValueError for an index out of bounds, or an instruction set that the machine lacks."""

    def __init__(self, threads: int, isa: str, /) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def pack(self, source: int, outputs: int, inputs: int, size: int, to: int, /) -> None: ...
    def pack_nibbles(self, source: int, outputs: int, inputs: int, offset: int, to: int, /) -> None: ...
    def linear(self, weight: Linear, x: int, rows: int, y: int, /) -> None: ...
    def embed(self, table: Linear, ids: int, count: int, scale: float, y: int, /) -> None: ...
    def rows(self, x: int, index: int, count: int, all: int, width: int, y: int, /) -> None: ...
    def attention(self, q: int, heads: Heads, kv: KV, batch: Batch, scale: float, window: int, out: int, /) -> None: ...
    def rope_write_kv(
        self,
        qkv: int,
        heads: Heads,
        cos: int,
        sin: int,
        positions: int,
        half: int,
        interleaved: bool,
        q_norm: int,
        k_norm: int,
        eps: float,
        kv: KV,
        batch: Batch,
        q: int,
        /,
    ) -> None: ...
    def rmsnorm(self, x: int, residual: int, weight: int, eps: float, rows: int, width: int, sum: int, y: int, /) -> None: ...
    def gated(self, gate_up: int, rows: int, width: int, gelu: bool, y: int, /) -> None: ...
    def add(self, x: int, residual: int, count: int, sum: int, /) -> None: ...
    def sample(
        self,
        logits: np.ndarray,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        repetition_penalty: Sequence[float],
        presence_penalty: Sequence[float],
        frequency_penalty: Sequence[float],
        seed: Sequence[int],
        position: Sequence[int],
        logit_bias: Sequence[Sequence[tuple[int, float]]],
        banned: Sequence[Sequence[int]],
        prompt: Sequence[Sequence[int]],
        output: Sequence[Sequence[int]],
        logprobs: Sequence[int | None],
        /,
    ) -> tuple[list[int], list[Scores | None]]: ...
    def score(self, logits: np.ndarray, tokens: Sequence[int], top: int, /) -> list[Scores]: ...
