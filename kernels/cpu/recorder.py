"""Records a model's ops on a native tape, and is the program that replays it.

    model.forward(recorder, …) ─▶ ops over Values ─▶ neighbours joined ─▶ places for the values ─▶ native tape ─▶ CpuProgram.run(batch)
                                                  └────────────── tape.py ─────────────┘

Shapes are checked here, once; what the arrays of a step say is checked by the tape before every run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.cpu.packed import Codes, Packed
from headrace.kernels.cpu.pages import Pages
from headrace.kernels.cpu.tape import PICKS, TOKENS, Op, Value, Work, joined, places
from headrace.kernels.ops import Batch, HeadShape, Model, RopeTable


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """`headrace.kernels.ops.Routing`, filled by every step."""

    native: _native.Routing
    weights: Value
    """[rows, used]."""
    experts: int

    @property
    def used(self) -> int:
        return self.weights.width


class Recorder:
    """`headrace.kernels.ops.Ops`, whose docstrings hold here. ValueError for shapes that do not fit."""

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._codes: dict[tuple[Value, Codes], Value] = {}
        """What was quantized, and how: those who read the same read it together."""

    def input(self, width: int) -> Value:
        """A matrix of TOKENS rows that is given to every run, in the order in which they were asked for here."""
        y = Value(TOKENS, width)
        self._record(_moves("input", y), (), (y,), lambda tape, at: tape.input(width, at(y)))
        return y

    def embed(self, tokens: None, table: Packed, scale: float = 1.0) -> Value:
        y = Value(TOKENS, table.inputs)
        self._record(_moves("embed", y), (), (y,), lambda tape, at: tape.embed(table.native, scale, at(y)))
        return y

    def rmsnorm(self, x: Value, weight: np.ndarray, eps: float) -> Value:
        address = _vector("weight", weight, x.width)

        def to(y: Value, reader: Packed | None) -> Op:
            native = reader and reader.native
            return Op(_moves("rmsnorm", x, y), (x,), (y,), lambda tape, at: tape.rmsnorm(at(x), address, eps, x.width, native, at(y)))

        y = Value(x.rows, x.width)
        self._ops.append(replace(to(y, None), quantized=to))
        return y

    def add_rmsnorm(self, x: Value, residual: Value, weight: np.ndarray, eps: float) -> tuple[Value, Value]:
        _alike(x, residual)
        y, total = Value(x.rows, x.width), Value(x.rows, x.width)
        address = _vector("weight", weight, x.width)

        def to(y: Value, reader: Packed | None) -> Op:
            native = reader and reader.native
            return Op(
                _moves("add_rmsnorm", x, residual, y, total),
                (x, residual),
                (y, total),
                lambda tape, at: tape.add_rmsnorm(at(x), at(residual), address, eps, x.width, at(total), native, at(y)),
            )

        self._ops.append(replace(to(y, None), quantized=to))
        return y, total

    def add(self, x: Value, residual: Value) -> Value:
        _alike(x, residual)
        y = Value(x.rows, x.width)
        self._record(_moves("add", x, residual, y), (x, residual), (y,), lambda tape, at: tape.add(at(x), at(residual), x.width, at(y)))
        return y

    def linear(self, x: Value, weight: Packed) -> Value:
        if x.width != weight.inputs:
            raise ValueError(f"x has {x.width} columns, the weight has {weight.inputs} inputs")
        y = Value(x.rows, weight.outputs)
        if weight.codes is None:
            work = _product("linear", weight, x, y)
            self._record(work, (x,), (y,), lambda tape, at: tape.linear(weight.native, at(x), at(y)))
            return y
        codes = self._quantized(x, weight, weight.codes)
        self._record(
            _product("linear", weight, codes, y),
            (codes,),
            (y,),
            lambda tape, at: tape.linear_codes(weight.native, at(codes), at(y)),
            factors=(codes, weight) if weight.one_part else None,
        )
        return y

    def _quantized(self, x: Value, reader: Packed, wanted: Codes) -> Value:
        """The codes of x that this weight is multiplied with."""
        if (codes := self._codes.get((x, wanted))) is None:
            codes = self._codes[x, wanted] = Value(x.rows, reader.native.codes_size // 4)
            self._record(
                _moves("quantize", x, codes),
                (x,),
                (codes,),
                lambda tape, at: tape.quantize(reader.native, at(x), at(codes)),
                after=lambda before: before.quantized and before.quantized(codes, reader),
            )
        return codes

    def gated(self, gate_up: Value, activation: str) -> Value:
        if activation not in ("silu", "gelu_tanh"):
            raise ValueError(f'activation "{activation}" is not known: use "silu" or "gelu_tanh"')
        if gate_up.width % 2:
            raise ValueError(f"gate_up has {gate_up.width} columns, it must have two equal halves")
        width, gelu = gate_up.width // 2, activation == "gelu_tanh"

        def to(y: Value, reader: Packed | None) -> Op:
            native = reader and reader.native
            return Op(
                _moves("gated", gate_up, y),
                (gate_up,),
                (y,),
                lambda tape, at: tape.gated(at(gate_up), width, gelu, 1, native, at(y)),
                after=lambda before: reader and _linear_gated(before, gelu, reader, y),
            )

        y = Value(gate_up.rows, width)
        self._ops.append(replace(to(y, None), quantized=to))
        return y

    def route(self, x: Value, router: Packed, used: int, renormalize: bool) -> Routed:
        experts = router.outputs
        if not 1 <= used <= experts:
            raise ValueError(f"{used} of {experts} experts cannot be used: from 1 to all of them can")
        logits = self.linear(x, router)
        routing = Routed(_native.Routing(experts, used, renormalize), Value(x.rows, used), experts)
        self._record(
            _moves("route", logits, routing.weights),
            (logits,),
            (routing.weights,),
            lambda tape, at: tape.route(routing.native, at(logits), at(routing.weights)),
        )
        return routing

    def experts(self, x: Value, routing: Routed, gate_up: Packed, down: Packed, activation: str) -> Value:
        if activation not in ("silu", "gelu_tanh"):
            raise ValueError(f'activation "{activation}" is not known: use "silu" or "gelu_tanh"')
        if not routing.experts == gate_up.experts == down.experts:
            raise ValueError(f"the router chooses among {routing.experts} experts, there are {gate_up.experts} and {down.experts}")
        if x.rows != routing.weights.rows or x.width != gate_up.inputs:
            raise ValueError(f"x has {x.width} columns, the experts have {gate_up.inputs} inputs")
        if gate_up.outputs != 2 * down.inputs:
            raise ValueError(f"gate and up give {gate_up.outputs} columns, down takes {down.inputs}: it must be half of them")
        used, gelu = routing.used, activation == "gelu_tanh"
        # Rows of these are those of a token's experts, all tokens' sorted by expert.
        halves, inner, outer = (Value(x.rows, used * width) for width in (gate_up.outputs, down.inputs, down.outputs))
        self._record(
            _of_experts(gate_up, used, x, halves),
            (x,),
            (halves,),
            lambda tape, at: tape.experts(routing.native, gate_up.native, at(x), False, at(halves)),
        )
        self._record(
            _moves("gated", halves, inner),
            (halves,),
            (inner,),
            lambda tape, at: tape.gated(at(halves), down.inputs, gelu, used, None, at(inner)),
        )
        self._record(
            _of_experts(down, used, inner, outer),
            (inner,),
            (outer,),
            lambda tape, at: tape.experts(routing.native, down.native, at(inner), True, at(outer)),
        )
        y = Value(x.rows, down.outputs)
        self._record(
            _moves("combine", outer, routing.weights, y),
            (outer, routing.weights),
            (y,),
            lambda tape, at: tape.combine(routing.native, at(outer), at(routing.weights), y.width, at(y)),
        )
        return y

    def rope_write_kv(
        self,
        qkv: Value,
        heads: HeadShape,
        rope: RopeTable,
        q_norm: np.ndarray | None,
        k_norm: np.ndarray | None,
        eps: float,
        kv: Pages,
        tokens: None,
    ) -> Value:
        _of_tokens("qkv", qkv, (heads.query_heads + 2 * heads.kv_heads) * heads.dim, heads)
        positions, half = rope.cos.shape
        if 2 * half > heads.dim:
            raise ValueError(f"cos of {half} pairs does not fit heads of {heads.dim}")
        native = _native.Rope(
            rope.cos.ctypes.data,
            rope.sin.ctypes.data,
            positions,
            half,
            rope.interleaved,
            0 if q_norm is None else _vector("q_norm", q_norm, heads.dim),
            0 if k_norm is None else _vector("k_norm", k_norm, heads.dim),
            eps,
        )
        q, shape, pages = Value(TOKENS, heads.query_heads * heads.dim), _heads(heads), kv.checked(heads)
        work = _moves("rope_write_kv", qkv, qkv)
        self._record(work, (qkv,), (q,), lambda tape, at: tape.rope_write_kv(at(qkv), shape, native, pages, at(q)))
        return q

    def attention(self, q: Value, heads: HeadShape, kv: Pages, tokens: None, scale: float, window: int | None) -> Value:
        _of_tokens("q", q, heads.query_heads * heads.dim, heads)
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a token sees at least itself")
        out, shape, pages = Value(TOKENS, q.width), _heads(heads), kv.checked(heads)
        work = Work(
            "attention",
            f"{heads.query_heads}/{heads.kv_heads} heads of {heads.dim}",
            position_operations=4 * heads.query_heads * heads.dim,
            position_bytes=kv.position_bytes,
            row_bytes=8 * q.width,
        )
        self._record(work, (q,), (out,), lambda tape, at: tape.attention(at(q), shape, pages, scale, window or 0, at(out)))
        return out

    def picked(self, x: Value) -> Value:
        """The rows of x that a run picks."""
        y = Value(PICKS, x.width)
        self._record(_moves("rows", x, y), (x,), (y,), lambda tape, at: tape.rows(at(x), x.width, at(y)))
        return y

    def program(self, engine: _native.Engine, outputs: Sequence[Value]) -> tuple[_native.Program, Callable[[Value], _native.Place]]:
        """A tape of all that was recorded, and where `outputs` stand on it, which are kept to the end. Nothing more can be recorded."""
        self._ops = joined(self._ops, outputs)
        starts, sizes = places(self._ops, outputs)
        tape = _native.Program(engine)
        for rows, size in enumerate(sizes):
            tape.reserve(rows, size)

        def at(value: Value) -> _native.Place:
            return _native.Place(value.rows, starts[value])

        for op in self._ops:
            op.put(tape, at)
        return tape, at

    def works(self) -> list[Work]:
        """What the ops do, in the order of the tape: those of TOKENS first."""
        return [replace(op.work, picked=rows == PICKS) for rows in (TOKENS, PICKS) for op in self._ops if op.writes[0].rows == rows]

    def _record(self, work: Work, reads: tuple[Value, ...], writes: tuple[Value, ...], put: Any, **more: Any) -> None:
        self._ops.append(Op(work, reads, writes, put, **more))


class CpuProgram:
    """`headrace.kernels.ops.Program`. Logits are a view of the tape's own memory."""

    def __init__(self, engine: _native.Engine, model: Model, kv: Sequence[Pages]) -> None:
        recorder = Recorder()
        picked = [recorder.picked(state) for state in model.forward(recorder, None, kv)]
        logits = model.logits(recorder, model.finish(recorder, *picked))
        # The tape knows addresses alone: what lies there must not go while it is there.
        self._model, self._kv = model, kv
        self._tape, at = recorder.program(engine, [logits])
        self._logits, self._width = at(logits), logits.width
        self._viewed: tuple[tuple[int, int], np.ndarray] | None = None
        """Address and rows of the logits of the last step, and these: from one step to the next they mostly stand where they stood."""
        self._works = recorder.works()

    def run(self, batch: Batch, picks: np.ndarray) -> np.ndarray:
        self._tape.run(batch.ids, batch.positions, batch.slots, batch.query_start, batch.pages, batch.parents, picks, [])
        return self._view(len(picks))

    def logits(self, picks: np.ndarray) -> np.ndarray:
        self._tape.pick(picks)
        return self._view(len(picks))

    def _view(self, rows: int) -> np.ndarray:
        place = self._tape.address(self._logits), rows
        if self._viewed is None or self._viewed[0] != place:
            self._viewed = place, self._tape.view(self._logits, self._width)
        return self._viewed[1]

    def times(self) -> list[tuple[Work, int]]:
        """Nanoseconds that each op took in all runs since this was called last, in the order of the tape. From the first call on."""
        return [(work, spent) for work, (_, spent) in zip(self._works, self._tape.times(), strict=True)]


def _linear_gated(product: Op, gelu: bool, reader: Packed, y: Value) -> Op | None:
    """A product whose result is gated and quantized at once."""
    if product.factors is None:
        return None
    codes, gate_up = product.factors
    return Op(
        _product("linear_gated", gate_up, codes, y),
        (codes,),
        (y,),
        lambda tape, at: tape.linear_gated(gate_up.native, at(codes), gelu, reader.native, at(y)),
    )


def _product(op: str, weight: Packed, x: Value, y: Value) -> Work:
    return Work(
        op,
        f"{weight.outputs}×{weight.inputs} {weight.name}",
        row_operations=2 * weight.outputs * weight.inputs,
        numbers=weight.activations,
        fixed_bytes=weight.nbytes,
        row_bytes=4 * (x.width + y.width),
    )


def _moves(op: str, *values: Value) -> Work:
    """An op that does no more than to read and write these."""
    return Work(op, str(values[0].width), row_bytes=4 * sum(value.width for value in values))


def _of_experts(weight: Packed, used: int, x: Value, y: Value) -> Work:
    """A product with the weights of a row's experts. Rows that share one do not read it twice: what is read at least is one row's."""
    return Work(
        "experts",
        f"{used} of {weight.experts} × {weight.outputs}×{weight.inputs} {weight.name}",
        row_operations=2 * used * weight.outputs * weight.inputs,
        numbers=weight.activations,
        fixed_bytes=weight.nbytes // weight.experts * used,
        row_bytes=4 * (x.width + y.width),
    )


def _alike(x: Value, residual: Value) -> None:
    if (x.rows, x.width) != (residual.rows, residual.width):
        raise ValueError(f"residual has {residual.width} columns, x has {x.width}")


def _of_tokens(name: str, x: Value, width: int, heads: HeadShape) -> None:
    if x.rows != TOKENS or x.width != width:
        raise ValueError(f"{name} has {x.width} columns, {heads} needs {width}")


def _vector(name: str, x: np.ndarray, size: int) -> int:
    """The address of a contiguous float32 [size]."""
    if x.dtype != np.float32 or x.shape != (size,) or not x.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous float32 [{size}], it is {x.dtype} {list(x.shape)}")
    return x.ctypes.data


def _heads(heads: HeadShape) -> _native.Heads:
    if min(heads.query_heads, heads.kv_heads, heads.dim) < 1 or heads.query_heads % heads.kv_heads:
        raise ValueError(f"{heads}: query heads must share KV heads evenly")
    return _native.Heads(heads.query_heads, heads.kv_heads, heads.dim)
