"""A row of every native op is the same to the last bit: alone or in a batch, wherever it stands, however cut, with any threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.ops import HeadShape, RopeTable
from headrace.kernels.weights import GroupedInt
from tests.kernels.eager import NativeOps
from tests.kernels.paged import Paged, dense, grouped_int, paged, random, scaled_float, with_zeros

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
ENGINES = {isa: [NativeOps(threads, isa) for threads in (1, 2, 3)] for isa in cpu.INSTRUCTION_SETS}
WIDTH = 320
NORM = random(WIDTH, seed=4)


def integers(bits: int, low: int, minimum: bool) -> GroupedInt:
    codes = torch.randint(low, low + 2**bits, (83, WIDTH), generator=torch.Generator().manual_seed(bits), dtype=torch.int8)
    return grouped_int(codes, random(83, WIDTH // 32), random(83, WIDTH // 32, seed=1) if minimum else None, 32, bits)


WEIGHTS = {
    "float32": dense(random(83, WIDTH)),
    "bfloat16": dense(random(83, WIDTH).bfloat16()),
    "float16": dense(random(83, WIDTH).half()),
    "4 bits": integers(4, -8, False),
    "4 bits and minimums": integers(4, 0, True),
    "8 bits": integers(8, -128, False),
    "6 bits and minimums": integers(6, 0, True),
    "zeros": with_zeros(83, WIDTH, 64, 4, random(83, WIDTH // 64).half().float()),
    "float8": scaled_float(83, WIDTH, (16, 64), random(6, WIDTH // 64)),
}
BIAS = random(83, seed=2)
ROW_OPS = {
    "rmsnorm": lambda ops, x: ops.rmsnorm(x, NORM, 1e-6),
    "add_rmsnorm": lambda ops, x: torch.cat(ops.add_rmsnorm(x, x * 3, NORM, 1e-6), 1),
    "silu": lambda ops, x: ops.gated(x * 5, "silu"),
    "gelu_tanh": lambda ops, x: ops.gated(x * 5, "gelu_tanh"),
}


@pytest.fixture(scope="module", params=ENGINES)
def engines(request) -> list:
    """Ops of one instruction set with 1, 2 and 3 threads."""
    return ENGINES[request.param]


def assert_rows_do_not_know_each_other(run, engines: list, x: torch.Tensor, seed: int) -> None:
    """`run(ops, x)` gives each row of x what it gives the row in any other company, on any of the engines."""
    whole = run(engines[0], x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    some = order[: 1 + seed % len(x)]
    for ops in engines:
        assert torch.equal(run(ops, x), whole)
        assert torch.equal(run(ops, x[order]), whole[order])
        assert torch.equal(run(ops, x[some]), whole[some])
        assert torch.equal(run(ops, x[-1:]), whole[-1:])


@pytest.mark.parametrize("name", ROW_OPS)
@given(rows=st.integers(1, 150), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_any_rows_of_a_batch_are_what_they_are_alone(engines, name, rows, seed):
    assert_rows_do_not_know_each_other(ROW_OPS[name], engines, random(rows, WIDTH, seed=seed), seed)


@pytest.mark.parametrize("form", WEIGHTS)
@given(rows=st.integers(1, 210), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_any_rows_of_a_product_are_what_they_are_alone(engines, form, rows, seed):
    packed = engines[0].prepare([WEIGHTS[form]], BIAS)
    assert_rows_do_not_know_each_other(lambda ops, x: ops.linear(x, packed), engines, random(rows, WIDTH, seed=seed), seed)


def test_an_output_does_not_depend_on_the_outputs_stacked_beside_it(engines):
    first, second = (
        WEIGHTS["4 bits and minimums"],
        grouped_int(*(random(5, 1).expand(5, WIDTH).char(), *([random(5, WIDTH // 32)] * 2)), 32, 4),
    )
    x = random(9, WIDTH, seed=3)
    alone = engines[0].linear(x, engines[0].prepare([first]))
    for rows in (1, 9):
        together = engines[1].linear(x[:rows], engines[1].prepare([second, first]))
        assert torch.equal(together[:, 5:], alone[:rows])


HEADS = HeadShape(6, 2, 32)
ANGLES = random(700, 16)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_token_is_rotated_and_written_alike_wherever_it_stands(engines, interleaved):
    batch = paged(HEADS, 16, [300, 7, 40], [130, 7, 1])
    rope = RopeTable(ANGLES.cos(), ANGLES.sin(), interleaved)
    qkv = random(batch.tokens, 10 * 32, seed=3)

    def run(ops, part: Paged, rows: slice):
        kv = batch.empty()
        return ops.rope_write_kv(qkv[rows], HEADS, rope, NORM[:32], NORM[32:64], 1e-6, kv, part.extents), kv

    q, kv = run(engines[0], batch, slice(None))
    for ops in engines:
        again, kv_again = run(ops, batch, slice(None))
        assert torch.equal(again, q)
        assert torch.equal(kv_again.keys.nan_to_num(9), kv.keys.nan_to_num(9))
        for request, first, last in [(0, 0, 1), (0, 64, 129), (1, 3, 5), (2, 0, 1)]:
            rows, part = batch.part(request, first, last)
            again, kv_again = run(ops, part, rows)
            assert torch.equal(again, q[rows])
            written = ~kv_again.keys.isnan()
            assert written.sum() == (last - first) * 2 * 32
            assert torch.equal(kv_again.keys[written], kv.keys[written])
            assert torch.equal(kv_again.values[written], kv.values[written])


@pytest.mark.parametrize("window", [None, 50, 300])
@pytest.mark.parametrize("heads", [HEADS, HeadShape(9, 3, 64), HeadShape(5, 1, 24), HeadShape(2, 2, 128)])
def test_a_query_alone_in_a_chunk_or_in_the_whole_prompt_attends_to_the_same_bits(engines, heads, window):
    batch = paged(heads, 16, [580, 90, 33, 1, 290], [580, 1, 33, 1, 70])
    q = batch.query()
    whole = engines[0].attention(q, heads, batch.kv, batch.extents, 0.2, window)
    for ops in engines:
        assert torch.equal(ops.attention(q, heads, batch.kv, batch.extents, 0.2, window), whole)
        pieces = [(0, first, min(first + size, 580)) for size in (41, 256) for first in range(0, 580, size)]
        pieces += [(0, p, p + 1) for p in (0, 1, 31, 32, 255, 256, 511, 579)] + [(1, 0, 1), (2, 5, 33), (3, 0, 1), (4, 60, 70)]
        for request, first, last in pieces:
            rows, part = batch.part(request, first, last)
            assert torch.equal(ops.attention(q[rows], heads, part.kv, part.extents, 0.2, window), whole[rows])


@pytest.mark.parametrize("heads", [HeadShape(6, 3, 64), HeadShape(12, 6, 128), HeadShape(2, 2, 256)])
@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
def test_requests_of_a_token_that_are_read_head_by_head_or_together_see_what_each_would_see_alone(engines, heads, dtype):
    batch = paged(heads, 16, [1, 700, 64, 65, 255, 256, 257, 30, 513, 90, 128, 2], [1] * 12).stored(dtype)
    q = batch.query()
    for ops in engines:
        all_rows = ops.attention(q, heads, batch.kv, batch.extents, 0.2, None)
        for request in range(12):
            rows, part = batch.part(request, 0, 1)
            assert torch.equal(ops.attention(q[rows], heads, batch.kv, part.extents, 0.2, None), all_rows[rows])


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dtype", ["f32", "int8"])
@pytest.mark.parametrize("heads", [HEADS, HeadShape(9, 3, 64), HeadShape(4, 4, 24)])
def test_requests_with_a_common_prefix_see_what_each_would_see_alone(engines, heads, dtype, page_size):
    # Of the first one's pages some share three splits of 256 positions, some two or one, and some too little for a split.
    contexts = {0: 850, 1: 833, 2: 769, 3: 768, 4: 700, 5: 515, 6: 513, 7: 256, 8: 290, 9: 850, 10: 90}
    prefixes = {1: 768, 2: 768, 3: 704, 4: 640, 5: 512, 6: 512, 7: 192, 8: 256, 10: 64}
    batch = paged(heads, page_size, list(contexts.values()), [1, 1, 3, 1, 1, 4, 2, 1, 1, 1, 1]).sharing(0, prefixes).stored(dtype)
    for crowd in (batch, paged(heads, page_size, [600] * 20, [1] * 20).sharing(0, dict.fromkeys(range(1, 20), 512)).stored(dtype)):
        q = crowd.query()
        whole = engines[0].attention(q, heads, crowd.kv, crowd.extents, 0.2, None)
        for ops in engines:
            assert torch.equal(ops.attention(q, heads, crowd.kv, crowd.extents, 0.2, None), whole)
            for request in range(len(crowd.extents.query_start) - 1):
                count = int(crowd.extents.query_start[request + 1] - crowd.extents.query_start[request])
                rows, part = crowd.part(request, 0, count)
                assert torch.equal(ops.attention(q[rows], heads, part.kv, part.extents, 0.2, None), whole[rows])


def test_which_pages_hold_a_context_and_how_large_they_are_changes_nothing(engines):
    outs = []
    for page_size, seed in [(8, 0), (16, 0), (64, 0)]:
        batch = paged(HEADS, page_size, [400], [30])
        outs.append(engines[seed].attention(batch.query(), HEADS, batch.kv, batch.extents, 0.2, None))
        order = torch.randperm(len(batch.kv.keys), generator=torch.Generator().manual_seed(5))
        place = order.argsort().int()
        kv = type(batch.kv)(batch.kv.keys[order], batch.kv.values[order])
        e = batch.extents
        moved = type(e)(e.positions, e.slots, e.query_start, place[e.pages.long()])
        outs.append(engines[0].attention(batch.query(), HEADS, kv, moved, 0.2, None))
    assert all(torch.equal(out, outs[0]) for out in outs)
