"""A row of every reference op is the same to the last bit: alone or in a batch, wherever it stands, with any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.ops import HeadShape
from headrace.kernels.reference import tiles
from headrace.kernels.reference.attention import SPLIT
from headrace.kernels.reference.step import KVPages
from headrace.kernels.weights import InputRounding
from tests.kernels.eager import ReferenceOps
from tests.kernels.paged import Extents, dense, scaled_float

OPS, AUTO = ReferenceOps(), ReferenceOps("auto")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


WIDTH, BIAS, NORM = 98, random(61), random(98, seed=4)
LINEAR = OPS.prepare([dense(random(61, WIDTH))], BIAS)
FLOAT8 = AUTO.prepare(
    [scaled_float(40, WIDTH, (40, WIDTH), random(1, 1), how) for how in (InputRounding("e4m3"), InputRounding("int8", 32))]
)
ROW_OPS = {
    "linear": lambda x: OPS.linear(x, LINEAR),
    "linear of rounded inputs": lambda x: AUTO.linear(x, FLOAT8),
    "rmsnorm": lambda x: OPS.rmsnorm(x, NORM, 1e-6),
    "add_rmsnorm": lambda x: OPS.add_rmsnorm(x, x * 3, NORM, 1e-6)[0],
    "silu": lambda x: OPS.gated(x * 5, "silu"),
    "gelu_tanh": lambda x: OPS.gated(x * 5, "gelu_tanh"),
}


@pytest.mark.parametrize("name", ROW_OPS)
@given(rows=st.integers(1, 150), seed=st.integers(0, 1000), count=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_any_rows_of_a_batch_are_what_they_are_alone(name, rows, seed, count):
    op = ROW_OPS[name]
    x = random(rows, WIDTH, seed=seed)
    torch.set_num_threads(count)
    whole = op(x)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(op(x[order]), whole[order])
    some = order[: 1 + seed % rows]
    assert torch.equal(op(x[some]), whole[some])
    torch.set_num_threads(1)
    assert torch.equal(op(x[:1]), whole[:1])
    assert torch.equal(op(x), whole)


@pytest.mark.parametrize(("n", "k"), [(960, 576), (3072, 576), (576, 1536), (1024, 2048), (8, 576), (60, 576)])
def test_products_of_real_shapes_do_not_depend_on_rows_or_threads(n, k):
    weight, x = OPS.prepare([dense(random(n, k))]), random(70, k)
    torch.set_num_threads(1)
    whole = OPS.linear(x, weight)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for start, stop in [(0, 70), (0, 1), (5, 6), (5, 13), (3, 36), (37, 70)]:
            assert torch.equal(OPS.linear(x[start:stop], weight), whole[start:stop])


def test_where_tiles_disagree_only_those_that_can_be_trusted_are_used(monkeypatch):
    real = torch.matmul

    def disturbed(at: int):
        def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            out = real(a, b)
            if a.shape[-2] > at:
                out[..., -1, :] += 1e-3
            return out

        return matmul

    def disturbed_by_threads(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return real(a, b) + (torch.get_num_threads() == 3)

    matrix = random(32, 128)
    monkeypatch.setattr(torch, "matmul", disturbed(at=tiles.SMALL))
    assert tiles._try_out(matrix) == (tiles.SMALL,)
    monkeypatch.setattr(torch, "matmul", disturbed(at=1))
    assert tiles._try_out(matrix) == (1,)
    monkeypatch.setattr(torch, "matmul", disturbed_by_threads)
    assert tiles._try_out(matrix) == (1,)
    monkeypatch.setattr(torch, "matmul", real)
    x = random(20, 32, seed=1)
    assert torch.equal(tiles.product(x, matrix, (1,))[7:8], tiles.product(x[7:8], matrix, (1,)))
    torch.testing.assert_close(tiles.product(x, matrix, (1,)), x @ matrix)


HEADS, PAGE = HeadShape(6, 2, 32), 16
CONTEXT = 2 * SPLIT + 60


def attend(q: torch.Tensor, kv: KVPages, pages: list[int], first: int, window: int | None) -> torch.Tensor:
    """Rows of one request whose positions start at `first`."""
    positions = list(range(first, first + len(q)))
    extents = Extents(int32(positions), int32(positions), int32([0, len(q)]), int32([pages]))
    return OPS.attention(q, HEADS, kv, extents, 0.2, window)


@pytest.mark.parametrize("window", [None, 50, SPLIT + 9])
@pytest.mark.parametrize("count", [1, 2])
def test_a_query_alone_in_a_chunk_or_in_the_whole_prompt_attends_to_the_same_bits(window, count):
    torch.set_num_threads(count)
    pages = list(range(20))
    kv = KVPages(random(40, 2, PAGE, 32), random(40, 2, PAGE, 32, seed=1))
    q = random(CONTEXT, HEADS.query_heads * HEADS.dim, seed=2)
    whole = attend(q, kv, pages, 0, window)
    for chunk in (7, 33):
        for first in range(0, CONTEXT, chunk):
            assert torch.equal(attend(q[first : first + chunk], kv, pages, first, window), whole[first : first + chunk])
    for position in (0, 1, SPLIT - 1, SPLIT, CONTEXT - 1):
        assert torch.equal(attend(q[position : position + 1], kv, pages, position, window), whole[position : position + 1])


def test_requests_of_a_batch_and_their_pages_leave_each_other_alone():
    kv = KVPages(random(40, 2, PAGE, 32), random(40, 2, PAGE, 32, seed=1))
    elsewhere = [39 - page for page in range(20)]
    moved = KVPages(kv.keys.flip(0), kv.values.flip(0))
    q = random(30, HEADS.query_heads * HEADS.dim, seed=2)
    alone = attend(q, kv, list(range(20)), CONTEXT - 30, None)
    assert torch.equal(attend(q, moved, elsewhere, CONTEXT - 30, None), alone)
    positions = [*range(3), 199, *range(CONTEXT - 30, CONTEXT), *range(17)]
    extents = Extents(
        int32(positions), int32(positions), int32([0, 3, 4, 34, 51]), int32([elsewhere, elsewhere, list(range(20)), elsewhere])
    )
    batch = torch.cat((random(4, q.shape[1], seed=8), q, random(17, q.shape[1], seed=9)))
    assert torch.equal(OPS.attention(batch, HEADS, kv, extents, 0.2, None)[4:34], alone)
