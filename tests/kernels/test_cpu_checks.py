"""What does not fit a native op is a ValueError that names the argument, and never a crash or a silent result."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.ops import HeadShape, RopeTable
from tests.kernels.eager import NativeOps
from tests.kernels.paged import dense, grouped_int, int32, paged, random

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
from headrace.kernels.cpu.pages import Pages  # noqa: E402

OPS = NativeOps(1)
HEADS = HeadShape(4, 2, 16)
BATCH = paged(HEADS, 8, [20, 9], [3, 1])
"""Four tokens of two requests on eight pages."""
ROPE = RopeTable(random(32, 8), random(32, 8), False)
PACKED = OPS.prepare([dense(random(8, 16))])
FLOATS = random(4, 64)
X = random(4, 16)
QKV = random(4, 128)
NORM = torch.ones(16)


def attention(q=FLOATS, heads=HEADS, kv=BATCH.kv, extents=BATCH.extents, scale=1.0, window=None) -> Any:
    return OPS.attention(q, heads, kv, extents, scale, window)


def rope_write_kv(qkv=QKV, heads=HEADS, rope=ROPE, q_norm=NORM, k_norm=None, kv=BATCH.kv, extents=BATCH.extents) -> Any:
    return OPS.rope_write_kv(qkv, heads, rope, q_norm, k_norm, 1e-6, kv, extents)


def pages(**changes: torch.Tensor) -> Any:
    return dataclasses.replace(BATCH.kv, **changes)


def extents(**changes: torch.Tensor) -> Any:
    return dataclasses.replace(BATCH.extents, **changes)


def rope(**changes: torch.Tensor) -> Any:
    return dataclasses.replace(ROPE, **changes)


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("x", lambda: OPS.linear(random(4, 15), PACKED)),
        ("weight", lambda: OPS.rmsnorm(X, torch.ones(15), 1e-6)),
        ("residual", lambda: OPS.add_rmsnorm(X, random(4, 15), NORM, 1e-6)),
        ("residual", lambda: OPS.add(X, random(4, 17))),
        ("input 1", lambda: OPS.add(X, random(5, 16))),
        ("input 0", lambda: OPS.add(X.double(), X)),
        ("gate_up", lambda: OPS.gated(random(2, 7), "silu")),
        ("activation", lambda: OPS.gated(X, "relu")),
        ("ids", lambda: OPS.embed(int32([7, 8]), PACKED)),
        ("ids", lambda: OPS.embed(int32([-1]), PACKED)),
        ("picks", lambda: OPS.rows(X, int32([4]))),
        ("picks", lambda: OPS.rows(X, int32([-1]))),
        ("picks", lambda: OPS.rows(X, torch.tensor([0]))),
    ],
)
def test_a_simple_op_refuses_what_does_not_fit(name, attempt):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        attempt()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": random(4, 63)}),
        ("query heads", {"heads": HeadShape(4, 3, 16)}),
        ("window", {"window": 0}),
        ("window", {"window": -5}),
        ("keys", {"kv": pages(keys=BATCH.kv.keys.transpose(1, 2))}),
        ("keys", {"kv": pages(keys=random(8, 3, 8, 16), values=random(8, 3, 8, 16))}),
        ("values", {"kv": pages(values=BATCH.kv.values[:3])}),
        ("values", {"kv": pages(values=random(8, 2, 8, 8))}),
        ("positions", {"extents": extents(positions=BATCH.extents.positions.long())}),
        ("positions", {"extents": extents(positions=int32([1, 2, 3]))}),
        ("positions", {"extents": extents(positions=int32([17, 18, 19, -1]))}),
        ("positions", {"extents": extents(positions=int32([17, 18, 19, 24]))}),
        ("slots", {"extents": extents(slots=int32([1]))}),
        ("query_start", {"extents": extents(query_start=int32([0, 4]))}),
        ("query_start", {"extents": extents(query_start=int32([0, 3, 5]))}),
        ("query_start", {"extents": extents(query_start=int32([0, 5, 4]))}),
        ("query_start", {"extents": extents(query_start=int32([1, 3, 4]))}),
        ("pages", {"extents": extents(pages=BATCH.extents.pages.long())}),
        ("pages", {"extents": extents(pages=BATCH.extents.pages[0])}),
        ("pages", {"extents": extents(pages=BATCH.extents.pages + len(BATCH.kv.keys))}),
        ("pages", {"extents": extents(pages=BATCH.extents.pages - 9)}),
    ],
)
def test_attention_refuses_what_does_not_fit(name, changes):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        attention(**changes)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_pages_that_do_not_lie_as_kernels_read_them_are_refused(name):
    right, other = Pages.new(2, 8, 8, HEADS)
    right.checked(HEADS)
    for wrong in (getattr(right, name).copy(), getattr(other, name)):
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            dataclasses.replace(right, **{name: wrong}).checked(HEADS)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qkv", {"qkv": random(4, 127)}),
        ("q_norm", {"q_norm": torch.ones(8)}),
        ("cos", {"rope": rope(cos=random(32, 9), sin=random(32, 9))}),
        ("sin", {"rope": rope(sin=random(31, 8))}),
        ("positions", {"extents": extents(positions=int32([0, 1, 2, 32]))}),
        ("positions", {"extents": extents(positions=int32([0, 1, -2, 31]))}),
        ("slots", {"extents": extents(slots=int32([0, 1, 2, len(BATCH.kv.keys) * 8]))}),
        ("slots", {"extents": extents(slots=int32([0, -1, 2, 3]))}),
        ("slots", {"extents": extents(slots=BATCH.extents.slots.long())}),
        ("values", {"kv": pages(values=BATCH.kv.values.double())}),
    ],
)
def test_rope_refuses_what_does_not_fit(name, changes):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        rope_write_kv(**changes)


CODES = torch.zeros(8, 32, dtype=torch.int8)
SCALES = torch.ones(8, 2)


@pytest.mark.parametrize(
    ("message", "weights", "bias"),
    [
        ("at least one weight", [], None),
        ("weights of 16 and 32 inputs", [dense(random(8, 32)), dense(random(8, 16))], None),
        ("weight", [dense(random(8, 0))], None),
        ("weight", [dense(random(0, 8))], None),
        ("weight", [dense(random(8, 8).double())], None),
        ("bias", [dense(random(8, 16))], torch.zeros(7)),
        ("bias", [dense(random(8, 16))], torch.zeros(8, 1)),
        ("codes", [grouped_int(CODES.to(torch.uint8), SCALES, None, 16, 4)], None),
        ("scales", [grouped_int(CODES, torch.ones(8, 3), None, 16, 4)], None),
        ("scales", [grouped_int(CODES, SCALES.half(), None, 16, 4)], None),
        ("minimums", [grouped_int(CODES, SCALES, torch.ones(7, 2), 16, 4)], None),
        ("group", [grouped_int(CODES, SCALES, None, 12, 4)], None),
        ("group", [grouped_int(CODES, SCALES, None, 0, 4)], None),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(message, weights, bias):
    with pytest.raises(ValueError, match=message):
        OPS.prepare(weights, bias)


def test_more_threads_than_cores_are_warned_of_and_none_are_refused(caplog):
    NativeOps(cpu.physical_cores() + 1)
    assert "get in each other's way" in caplog.text
    with pytest.raises(ValueError, match="threads=0"):
        NativeOps(0)


def test_a_machine_with_the_portable_path_alone_is_told_so(caplog, monkeypatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SETS", ["portable"])
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    assert cpu.CpuBackend(1, "portable").isa == "portable"
    assert "no AVX2" in caplog.text


def test_an_instruction_set_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match="mmx"):
        NativeOps(1, "mmx")


DIMENSION = st.integers(-1, 40)


@given(
    st.lists(DIMENSION, min_size=4, max_size=4), st.lists(DIMENSION, min_size=3, max_size=3), st.lists(DIMENSION, min_size=2, max_size=2)
)
@settings(max_examples=300, deadline=None)
def test_any_indices_give_numbers_or_a_value_error(positions, starts, table):
    batch = extents(positions=int32(positions), slots=int32(positions), query_start=int32(starts), pages=int32([table, table]))
    for attempt in (lambda: attention(extents=batch), lambda: rope_write_kv(extents=batch, kv=pages(keys=random(8, 2, 8, 16)))):
        try:
            assert attempt().shape == (4, 64)
        except ValueError as reason:
            assert any(name in str(reason) for name in ("positions", "slots", "query_start", "pages")), reason
