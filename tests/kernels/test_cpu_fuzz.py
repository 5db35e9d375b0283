"""Whatever shapes, types and numbers reach the op table: a result or an error that Python can catch. A crash would end this process."""

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.ops import HeadShape, RopeTable
from headrace.kernels.weights import Dense, GroupedInt, ScaledFloat

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
from headrace.kernels.cpu import _native  # noqa: E402
from headrace.kernels.cpu.pages import TYPES, Pages  # noqa: E402
from headrace.kernels.cpu.recorder import Recorder  # noqa: E402

REFUSALS = (ValueError, TypeError, OverflowError, AttributeError, IndexError)
DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.uint8, np.int32, np.int64, np.uint16, bool, "<U3", object])
SIZES = st.sampled_from([0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 48, 64, 96, 256])
SHAPES = st.lists(SIZES, min_size=0, max_size=4).map(tuple)


@st.composite
def arrays(draw, dtypes=DTYPES, shapes=SHAPES) -> np.ndarray:
    dtype, shape = draw(dtypes), draw(shapes)
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(-9, 9, shape if len(shape) < 3 else shape[:3])
    array = values.astype(dtype)
    return array[..., ::2] if draw(st.booleans()) and array.ndim else array


FLOATS = arrays(st.sampled_from([np.float32, np.float16, np.float64, np.uint16]))


@st.composite
def weights(draw) -> Any:
    if draw(st.booleans()):
        return Dense(draw(FLOATS))
    outputs, inputs, group = draw(SIZES), draw(SIZES), draw(st.sampled_from([-1, 0, 1, 3, 4, 8, 16, 32, 64]))
    right = draw(st.booleans())
    if draw(st.booleans()):
        block = (draw(st.sampled_from([0, 1, 8, 256])), group)
        blocks = (-(-outputs // max(block[0], 1)), -(-inputs // max(group, 1)))
        bytes_ = draw(arrays(st.just(np.uint8), st.just((outputs, inputs)))) if right else draw(arrays())
        return ScaledFloat(bytes_, np.ones(blocks, np.float32) if right else draw(arrays()), block)
    codes = draw(arrays(st.just(np.int8), st.just((outputs, inputs)))) if right else draw(arrays())
    scales = np.ones((outputs, inputs // group), np.float32) if right and group > 0 else draw(arrays())
    zeros = draw(st.sampled_from([None, np.ones(scales.shape, np.int8) if right else draw(arrays())]))
    return GroupedInt(codes, scales, draw(st.sampled_from([None, scales])), group, 4, zeros)


@given(
    parts=st.lists(weights(), max_size=3),
    bias=st.none() | arrays(),
    activations=st.sampled_from(["int8", "bf16", "f32"]),
    rows=st.integers(0, 12),
)
@settings(max_examples=300)
def test_any_weights_are_multiplied_with_or_refused(parts, bias, activations, rows):
    backend = cpu.CpuBackend(1, activations=activations)
    try:
        packed = backend.prepare("weight", lambda: parts, bias)
    except REFUSALS:
        return
    recorder = Recorder()
    x = recorder.input(packed.inputs)
    tape, at = recorder.program(backend._engine, [y := recorder.linear(x, packed)])
    tape.run(*plain(rows), None, np.empty(0, np.int32), [np.ones((rows, packed.inputs), np.float32)])
    assert tape.view(at(y), y.width).shape == (rows, packed.outputs)


def plain(rows: int) -> tuple[np.ndarray, ...]:
    zeros = np.zeros(rows, np.int32)
    return zeros, zeros, zeros, np.array([0, rows], np.int32), np.zeros((1, 1), np.int32)


HEADS = st.builds(HeadShape, st.integers(-1, 6), st.integers(-1, 6), st.sampled_from([-8, 0, 1, 4, 8, 12, 16]))
RIGHT = HeadShape(4, 2, 8)
EXPERTS = cpu.CpuBackend(1).prepare_experts("experts", 3, lambda: [[Dense(np.ones((16, 64), np.float32))]] * 3)
DOWN = cpu.CpuBackend(1).prepare_experts("down", 3, lambda: [[Dense(np.ones((64, 8), np.float32))]] * 3)
ROUTERS = [cpu.CpuBackend(1).prepare("router", lambda n=n: [Dense(np.ones((n, 64), np.float32))]) for n in (3, 4)]
PACKED = cpu.CpuBackend(1).prepare("table", lambda: [Dense(np.ones((32, 64), np.float32))])


def of_codes(outputs: int, inputs: int) -> Any:
    weight = GroupedInt(np.ones((outputs, inputs), np.int8), np.ones((outputs, inputs // 32), np.float32), None, 32, 4)
    return cpu.CpuBackend(1, activations="int8").prepare("codes", lambda: [weight])


CODES = [of_codes(outputs, inputs) for outputs in (32, 64, 192) for inputs in (32, 96)]


@given(data=st.data())
@settings(max_examples=400)
def test_any_op_is_recorded_and_run_or_refused(data):
    draw = data.draw
    recorder = Recorder()
    width = draw(SIZES)
    x, other = recorder.input(width), recorder.input(draw(SIZES | st.just(width)))
    heads = draw(HEADS | st.just(RIGHT))
    page_size = draw(st.sampled_from([8, 16]))
    made_for = draw(st.just(heads if heads.query_heads > 0 and heads.kv_heads > 0 and heads.dim > 0 else RIGHT) | st.just(RIGHT))
    (kv,) = Pages.new(1, 2, page_size, made_for)
    rope = RopeTable(draw(FLOATS), draw(FLOATS), draw(st.booleans()))
    norm = draw(arrays(st.sampled_from([np.float32, np.float64]), st.just((width,)) | SHAPES))
    ops = {
        "rmsnorm": lambda: recorder.rmsnorm(x, norm, 1e-6),
        "add_rmsnorm": lambda: recorder.add_rmsnorm(x, other, norm, 1e-6)[0],
        "add": lambda: recorder.add(x, other),
        "linear": lambda: recorder.linear(x, PACKED),
        "mlp": lambda: recorder.linear(
            recorder.gated(recorder.linear(x, draw(st.sampled_from(CODES))), "silu"), draw(st.sampled_from(CODES))
        ),
        "gated": lambda: recorder.gated(x, draw(st.sampled_from(["silu", "gelu_tanh", "tanh"]))),
        "experts": lambda: recorder.experts(
            x,
            recorder.route(
                draw(st.sampled_from([x, other])), draw(st.sampled_from(ROUTERS)), draw(st.integers(-1, 5)), draw(st.booleans())
            ),
            *draw(st.permutations([EXPERTS, DOWN]) | st.just([EXPERTS, DOWN])),
            draw(st.sampled_from(["silu", "tanh"])),
        ),
        "embed": lambda: recorder.embed(None, PACKED),
        "attention": lambda: recorder.attention(x, heads, kv, None, 1.0, draw(st.sampled_from([None, -1, 0, 1, 5]))),
        "rope": lambda: recorder.rope_write_kv(x, heads, cpu.CpuBackend(1).prepare_rope(rope), norm, None, 1e-6, kv, None),
        "picked": lambda: recorder.picked(x),
    }
    backend = cpu.CpuBackend(1)
    rows = draw(st.integers(0, 12))
    try:
        y = ops[draw(st.sampled_from(sorted(ops)))]()
        tape, at = recorder.program(backend._engine, [y])
        inputs = [np.ones((rows, value.width), np.float32) for value in (x, other)]
        tape.run(*plain(rows), None, np.arange(rows, dtype=np.int32), inputs)
        assert tape.view(at(y), y.width).shape == (rows, y.width)
    except REFUSALS:
        pass


@given(data=st.data())
@settings(max_examples=400)
def test_any_arrays_of_a_step_are_computed_or_refused(data):
    backend = cpu.CpuBackend(1)
    recorder = Recorder()
    (kv,) = Pages.new(1, 3, 8, RIGHT, data.draw(st.sampled_from(sorted(TYPES))))
    table = backend.prepare("table", lambda: [Dense(np.ones((32, 64), np.float32))])
    q = recorder.rope_write_kv(
        recorder.embed(None, table),
        RIGHT,
        RopeTable(np.ones((20, 4), np.float32), np.ones((20, 4), np.float32), False),
        None,
        None,
        1e-6,
        kv,
        None,
    )
    y = recorder.picked(recorder.attention(q, RIGHT, kv, None, 1.0, None))
    tape, _ = recorder.program(backend._engine, [y])
    count = st.integers(0, 6)
    right = arrays(st.just(np.int32), count.map(lambda n: (n,)))
    any_array = right | arrays() | st.sampled_from([None, 3, [1, 2], np.full(3, 2**31 - 1, np.int32), np.full(3, -(2**31), np.int32)])
    table_of_pages = arrays(st.just(np.int32), st.tuples(count, count)) | any_array
    with contextlib.suppress(*REFUSALS):
        tape.run(
            *(data.draw(any_array) for _ in range(4)), data.draw(table_of_pages), data.draw(st.none() | any_array), data.draw(any_array), []
        )


def test_an_engine_of_no_threads_is_refused():
    with pytest.raises(ValueError, match="threads=0"):
        cpu.CpuBackend(0)
    assert _native.instruction_sets()[-1] == "portable"
