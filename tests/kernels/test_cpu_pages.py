"""Attention over pages of every type, and over trees of drafts: against the reference, and a tree's rows against their paths alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.ops import HeadShape, RopeTable
from tests.kernels.eager import ReferenceOps
from tests.kernels.paged import paged, random

cpu = pytest.importorskip("headrace.kernels.cpu")
from headrace.kernels.cpu.pages import TYPES  # noqa: E402
from tests.kernels.eager import NativeOps  # noqa: E402

REFERENCE = ReferenceOps()
HEADS = HeadShape(6, 2, 32)


@pytest.fixture(scope="module", params=cpu.INSTRUCTION_SETS)
def ops(request) -> NativeOps:
    return NativeOps(2, request.param)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", [HEADS, HeadShape(9, 3, 64), HeadShape(5, 1, 20)])
@pytest.mark.parametrize("window", [None, 45])
def test_attention_reads_pages_of_every_type(ops, dtype, heads, window):
    batch = paged(heads, 16, [40, 333, 257, 9], [40, 21, 1, 0]).stored(dtype)
    mine, expected = (each.attention(batch.query(), heads, batch.kv, batch.extents, 0.2, window) for each in (ops, REFERENCE))
    torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-5)


def test_keys_and_values_become_the_same_bytes_everywhere(ops):
    heads = HeadShape(4, 2, 24)
    batch = paged(heads, 8, [1, 20, 33], [1, 20, 4]).stored("int8")
    angles = random(64, 12)
    rope = RopeTable(angles.cos(), angles.sin(), False)
    qkv = random(batch.tokens, 8 * 24, seed=4) * torch.logspace(-20, 3, batch.tokens)[:, None]
    qkv[3, 4 * 24 :] = 0
    kept = [paged(heads, 8, [1, 20, 33], [1, 20, 4]).stored("int8").kv for _ in range(2)]
    for each, kv in zip((ops, REFERENCE), kept, strict=True):
        each.rope_write_kv(qkv, heads, rope, None, None, 1e-6, kv, batch.extents)
    # values pass through no arithmetic before; keys are turned, which may round otherwise
    assert torch.equal(kept[0].values, kept[1].values)
    torch.testing.assert_close(kept[0].scales, kept[1].scales, rtol=1e-6, atol=0, equal_nan=True)
    assert (kept[0].keys.int() - kept[1].keys.int()).abs().max() <= 1


def test_bytes_are_within_half_a_step_of_what_they_stand_for(ops):
    heads = HeadShape(1, 1, 16)
    batch = paged(heads, 8, [30], [30]).stored("int8")
    qkv = random(30, 48, seed=2)
    rope = RopeTable(torch.ones(30, 8), torch.zeros(30, 8), False)
    ops.rope_write_kv(qkv, heads, rope, None, None, 1e-6, batch.kv, batch.extents)
    keys, values = (x[0, :30] for x in batch.kv.read(batch.extents.pages[0]))
    for got, x in ((keys, qkv[:, 16:32]), (values, qkv[:, 32:])):
        assert ((got - x).abs() <= x.abs().amax(1, keepdim=True) / 127 * 0.501).all()


def test_what_is_not_finite_spoils_its_own_head_and_position(ops):
    heads = HeadShape(2, 2, 8)
    batch = paged(heads, 8, [12], [12]).stored("int8")
    qkv = random(12, 48, seed=2)
    qkv[5, 32], qkv[7, 40] = torch.inf, torch.nan
    rope = RopeTable(torch.ones(12, 4), torch.zeros(12, 4), False)
    ops.rope_write_kv(qkv, heads, rope, None, None, 1e-6, batch.kv, batch.extents)
    broken = torch.stack([x[:, :12].isnan().all(-1) for x in batch.kv.read(batch.extents.pages[0])])
    assert broken.nonzero().tolist() == [[1, 0, 5], [1, 1, 7]]


@st.composite
def trees(draw) -> list[int]:
    return [draw(st.integers(-1, row - 1)) for row in range(draw(st.integers(1, 30)))]


@pytest.mark.parametrize("dtype", TYPES)
@given(parents=trees(), context=st.integers(0, 300), window=st.sampled_from([None, 7, 90]))
@settings(max_examples=20, deadline=None)
def test_a_row_of_a_tree_is_to_the_bit_what_its_path_gives_alone(ops, dtype, parents, context, window):
    rows = len(parents)
    batch = paged(HEADS, 8, [context + rows, 50, 9], [rows, 20, 9]).stored(dtype).as_tree(0, parents)
    q = batch.query()
    out = ops.attention(q, HEADS, batch.kv, batch.extents, 0.2, window)
    for row in range(rows):
        alone = batch.path(0, row)
        assert torch.equal(ops.attention(q[row : row + 1], HEADS, alone.kv, alone.extents, 0.2, window)[0], out[row])
    # the plain requests beside it do not notice
    plain = paged(HEADS, 8, [context + rows, 50, 9], [rows, 20, 9]).stored(dtype)
    assert torch.equal(ops.attention(q, HEADS, plain.kv, plain.extents, 0.2, window)[rows:], out[rows:])


@pytest.mark.parametrize("dtype", TYPES)
def test_trees_are_the_reference_s(ops, dtype):
    batch = paged(HEADS, 16, [300, 70, 40, 12], [12, 5, 1, 12]).stored(dtype)
    batch = batch.as_tree(0, [-1, 0, 0, 1, 1, 2, 3, 3, 5, 8, -1, 10]).as_tree(3, [-1, -1, -1, 0, 1, 2, 2, 6, 7, 8, 8, 3])
    mine, expected = (each.attention(batch.query(), HEADS, batch.kv, batch.extents, 0.2, None) for each in (ops, REFERENCE))
    torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("parents", "message"),
    [([-1, 1, 0], "cannot follow row 1"), ([-1, 0, -2], "cannot follow row -2"), ([-1, 0, 5], "cannot follow row 5")],
)
def test_a_tree_that_is_none_is_refused(ops, parents, message):
    batch = paged(HEADS, 8, [20], [3]).as_tree(0, [-1, 0, 0])
    batch.extents.parents[:] = torch.tensor(parents)
    with pytest.raises(ValueError, match=message):
        ops.attention(batch.query(), HEADS, batch.kv, batch.extents, 0.2, None)


def test_a_tree_whose_positions_do_not_follow_its_rows_is_refused(ops):
    batch = paged(HEADS, 8, [20], [3]).as_tree(0, [-1, 0, 0])
    batch.extents.positions[2] += 1
    with pytest.raises(ValueError, match="must stand behind the row it follows"):
        ops.attention(batch.query(), HEADS, batch.kv, batch.extents, 0.2, None)


def test_a_tree_that_leaves_its_pages_is_refused(ops):
    batch = paged(HEADS, 8, [16], [5]).as_tree(0, [-1] * 5)
    batch.extents.positions[:] = 14
    with pytest.raises(ValueError, match="its pages end at 16"):
        ops.attention(batch.query(), HEADS, batch.kv, batch.extents, 0.2, None)
