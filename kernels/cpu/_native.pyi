"""The extension built from src/. Addresses are those of contiguous tensors, 0 for none; sizes and meaning are in src/ops.h."""

from collections.abc import Sequence

import numpy as np

Scores = tuple[float, list[int], list[float]]
Rows = tuple[int, int, int, int, int]
"""Outputs, and the addresses of values, scales, minimums and zeros."""

ALIGN: int
PANEL: int
SOURCES: str

def instruction_sets() -> list[str]: ...
def number(seed: int, position: int, /) -> float: ...

class Linear:
    def __init__(
        self,
        form: int,
        scales: int,
        minimums: bool,
        activations: int,
        offset: int,
        outputs: int,
        inputs: int,
        group: int,
        panels: int,
        bias: int,
        following: Linear | None,
        /,
    ) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def codes_size(self) -> int:
        """Bytes of a row of int8 that it is multiplied with."""

class Heads:
    def __init__(self, query: int, kv: int, dim: int, /) -> None: ...

class Rope:
    def __init__(
        self, cos: int, sin: int, positions: int, half: int, interleaved: bool, q_norm: int, k_norm: int, eps: float, /
    ) -> None: ...

class KV:
    def __init__(self, numbers: int, scales: int, pages: int, apart: int, page_size: int, form: int, /) -> None: ...

class Routing:
    """Which of so many experts each row of a step goes to."""

    def __init__(self, experts: int, used: int, renormalize: bool, /) -> None: ...

class Place:
    """Where a value of a program stands: in the arena of tokens (0) or of picks (1), so many floats a row before it."""

    def __init__(self, arena: int, start: int, /) -> None: ...

class Program:
    """Ops put on a tape, to be run in that order. ValueError for an index out of bounds."""

    def __init__(self, engine: Engine, /) -> None: ...
    def reserve(self, arena: int, floats: int, /) -> None: ...
    def input(self, width: int, y: Place, /) -> None: ...
    def embed(self, table: Linear, scale: float, y: Place, /) -> None: ...
    def linear(self, weight: Linear, x: Place, y: Place, /) -> None: ...
    def quantize(self, reader: Linear, x: Place, codes: Place, /) -> None: ...
    def linear_codes(self, weight: Linear, codes: Place, y: Place, /) -> None: ...
    def linear_gated(self, gate_up: Linear, codes: Place, gelu: bool, reader: Linear, y: Place, /) -> None: ...
    def rmsnorm(self, x: Place, weight: int, eps: float, width: int, reader: Linear | None, y: Place, /) -> None: ...
    def add_rmsnorm(
        self, x: Place, residual: Place, weight: int, eps: float, width: int, sum: Place, reader: Linear | None, y: Place, /
    ) -> None: ...
    def gated(self, gate_up: Place, width: int, gelu: bool, each: int, reader: Linear | None, y: Place, /) -> None: ...
    def route(self, routing: Routing, logits: Place, weights: Place, /) -> None: ...
    def experts(self, routing: Routing, weight: Linear, x: Place, sorted: bool, y: Place, /) -> None: ...
    def combine(self, routing: Routing, x: Place, weights: Place, width: int, y: Place, /) -> None: ...
    def add(self, x: Place, residual: Place, width: int, sum: Place, /) -> None: ...
    def rope_write_kv(self, qkv: Place, heads: Heads, rope: Rope, kv: KV, q: Place, /) -> None: ...
    def attention(self, q: Place, heads: Heads, kv: KV, scale: float, window: int, out: Place, /) -> None: ...
    def rows(self, x: Place, width: int, y: Place, /) -> None: ...
    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        query_start: np.ndarray,
        pages: np.ndarray,
        parents: np.ndarray | None,
        picks: np.ndarray,
        inputs: Sequence[np.ndarray],
        /,
    ) -> None: ...
    def pick(self, picks: np.ndarray, /) -> None: ...
    def address(self, place: Place, /) -> int: ...
    def view(self, place: Place, width: int, /) -> np.ndarray: ...
    def times(self) -> list[tuple[str, int]]: ...

class Engine:
    """ValueError for an instruction set that the machine lacks."""

    def __init__(self, threads: int, isa: str, /) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def choose(self, parts: Sequence[Rows], inputs: int, group: int, /) -> tuple[int, int, int]:
        """Form, kind of scales, and offset of integer codes."""
    def probe(self) -> tuple[float, float, float, float]:
        """The most of this machine: operations on floats, operations on int8, and bytes read from memory, a second."""
    def pack(self, parts: Sequence[Rows], weight: Linear, to: int, /) -> None: ...
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
