"""Every native op computes what the reference computes, on every instruction set of this machine, over ragged shapes."""

import pytest
import torch

from headrace.kernels.ops import HeadShape, RopeTable
from headrace.kernels.weights import Weight
from tests.kernels.eager import NativeOps, ReferenceOps
from tests.kernels.paged import dense, grouped, int32, paged, random

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
REFERENCE = ReferenceOps()


@pytest.fixture(scope="module", params=cpu.INSTRUCTION_SETS)
def ops(request):
    return NativeOps(2, request.param)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def assert_linear_agrees(ops, weights: list[Weight], rows: int, bias: torch.Tensor | None = None) -> None:
    inputs = weights[0].shape[1]
    x = random(rows, inputs, seed=5) / inputs**0.5
    close(ops.linear(x, ops.prepare(weights, bias)), REFERENCE.linear(x, REFERENCE.prepare(weights, bias)))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 11, 12, 13, 97, 200])
def test_linear_multiplies_any_number_of_rows(ops, rows):
    assert_linear_agrees(ops, [grouped(40, 288, 32, 4, 0, True)], rows)
    assert_linear_agrees(ops, [dense(random(40, 299))], rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (16, 255), (17, 256), (33, 257), (200, 513)])
def test_linear_multiplies_floats_of_any_shape(ops, dtype, n, k):
    for rows in (1, 4, 9):
        assert_linear_agrees(ops, [dense(random(n, k).to(dtype))], rows, random(n, seed=3))


FORMS = [
    (4, 0, True),  # Q4_1
    (4, 0, False),
    (4, -8, False),  # Q4_0
    (4, -8, True),
    (5, 0, True),
    (5, -16, False),
    (6, -32, False),
    (8, -128, False),
    (8, -128, True),
]


@pytest.mark.parametrize("group", [2, 16, 32, 256])
@pytest.mark.parametrize(("bits", "low", "minimum"), FORMS)
def test_linear_multiplies_every_form_of_integers(ops, bits, low, minimum, group):
    for n, k in [(1, group), (37, 3 * group)]:
        for rows in (1, 2, 8):
            assert_linear_agrees(ops, [grouped(n, k, group, bits, low, minimum)], rows, random(n, seed=3))


@pytest.mark.parametrize("group", [1, 3])
def test_groups_of_an_odd_size_are_served(ops, group):
    for bits, low in [(4, 0), (8, -128)]:
        for rows in (1, 5):
            assert_linear_agrees(ops, [grouped(18, 5 * group, group, bits, low, True)], rows)


def test_weights_are_stacked_in_order_whatever_their_forms(ops):
    q4, other, q8 = grouped(24, 64, 32, 4, 0, True), grouped(7, 64, 32, 4, 0, True), grouped(9, 64, 32, 8, -128, False)
    half, single = dense(random(5, 64).half()), dense(random(6, 64))
    for weights in ([q4, other], [q4, q8], [q8, half], [half, single], [half, half], [single, q4, half]):
        outputs = sum(weight.shape[0] for weight in weights)
        for rows in (1, 7):
            assert_linear_agrees(ops, weights, rows, random(outputs, seed=2))


def test_codes_of_both_signs_may_be_stacked(ops):
    """One half of a Q4_0 tensor may use no negative code, and its neighbour may."""
    assert_linear_agrees(ops, [grouped(16, 32, 32, 4, 0, False), grouped(16, 32, 32, 4, -8, False)], 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_small_float_is_widened_exactly(ops, dtype):
    """All 65,536 bit patterns, subnormals, infinities and NaNs included, each multiplied by one."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    for rows in (1, 2):
        out = ops.linear(torch.ones(rows, 1), ops.prepare([dense(values)]))
        for row in out:
            torch.testing.assert_close(row, values[:, 0].float(), rtol=0, atol=0, equal_nan=True)


def test_infinities_and_nans_reach_the_outputs_they_belong_to_and_no_others(ops):
    weight = ops.prepare([dense(random(20, 40))])
    x = random(9, 40, seed=1)
    clean = ops.linear(x, weight)
    x[3, 17], x[6, 0] = torch.nan, torch.inf
    out = ops.linear(x, weight)
    assert out[3].isnan().all() and out[6].isinf().all()
    rest = [0, 1, 2, 4, 5, 7, 8]
    assert torch.equal(out[rest], clean[rest])


def test_no_rows_give_no_rows(ops):
    weight, norm, none = ops.prepare([dense(random(5, 8))]), torch.ones(8), torch.empty(0, 8)
    assert ops.linear(none, weight).shape == (0, 5)
    assert ops.rmsnorm(none, norm, 1e-5).shape == (0, 8)
    assert ops.gated(none, "silu").shape == (0, 4)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 72, 577])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_rmsnorm_and_the_residual_sum(ops, rows, width):
    x, residual, weight = random(rows, width) * 3, random(rows, width, seed=1), random(width, seed=2)
    close(ops.rmsnorm(x, weight, 1e-5), REFERENCE.rmsnorm(x, weight, 1e-5))
    normed, total = ops.add_rmsnorm(x, residual, weight, 1e-6)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, ops.rmsnorm(total, weight, 1e-6))
    assert torch.equal(ops.add(x, residual), total)


def test_rmsnorm_of_zeros_is_zeros(ops):
    assert torch.equal(ops.rmsnorm(torch.zeros(2, 16), torch.ones(16), 1e-6), torch.zeros(2, 16))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 5, 8, 37, 1536])
def test_gated_activations(ops, activation, width):
    x = random(5, 2 * width) * 4
    x[0, :width] = torch.linspace(-120, 120, width)
    close(ops.gated(x, activation), REFERENCE.gated(x, activation))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gate_that_is_not_a_number_stays_one(ops, activation):
    x = torch.ones(1, 18)
    x[0, 0] = x[0, 8] = torch.nan
    assert ops.gated(x, activation).isnan().tolist() == [[True, *[False] * 7, True]]


@pytest.mark.parametrize("table", [dense(random(50, 24)), dense(random(50, 24).half()), grouped(50, 64, 32, 8, -128, False)])
def test_embedding_rows_are_the_reference_s_to_the_bit(ops, table):
    ids = int32([49, 0, 3, 3, *range(40)])
    for scale in (1.0, 4.9):
        expected = REFERENCE.embed(ids, REFERENCE.prepare_table(table), scale)
        assert torch.equal(ops.embed(ids, ops.prepare_table(table), scale), expected)


def test_rows_picks_rows(ops):
    x = random(6, 9)
    assert torch.equal(ops.rows(x, int32([5, 0, 5])), x[[5, 0, 5]])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "dim", "rotated"), [(9, 3, 64, 64), (4, 4, 8, 6), (5, 1, 24, 24), (8, 2, 256, 64), (3, 1, 20, 10)]
)
def test_rope_turns_heads_and_writes_pages(ops, query_heads, kv_heads, dim, rotated, interleaved):
    heads = HeadShape(query_heads, kv_heads, dim)
    batch = paged(heads, 8, [1, 20, 33], [1, 20, 4])
    angles = random(64, rotated // 2)
    rope = RopeTable(angles.cos(), angles.sin(), interleaved)
    qkv = random(batch.tokens, (query_heads + 2 * kv_heads) * dim, seed=4)
    q_norm, k_norm = random(dim, seed=1), random(dim, seed=2)
    for norms in [(q_norm, k_norm), (None, None), (None, k_norm), (q_norm, None)]:
        mine, expected = batch.empty(), batch.empty()
        close(
            ops.rope_write_kv(qkv, heads, rope, *norms, 1e-6, mine, batch.extents),
            REFERENCE.rope_write_kv(qkv, heads, rope, *norms, 1e-6, expected, batch.extents),
        )
        torch.testing.assert_close(mine.keys, expected.keys, rtol=2e-5, atol=2e-5, equal_nan=True)
        torch.testing.assert_close(mine.values, expected.values, rtol=0, atol=0, equal_nan=True)


SHAPES = [(9, 3, 64), (4, 4, 8), (5, 1, 24), (2, 1, 72), (71, 1, 16), (6, 2, 128), (4, 1, 256), (3, 3, 20)]
"""The last is no multiple of a vector."""


@pytest.mark.parametrize(("query_heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("window", [None, 1, 45, 300])
@pytest.mark.parametrize("page_size", [8, 16, 64, 24])
def test_attention_over_ragged_batches(ops, query_heads, kv_heads, dim, window, page_size):
    """A prefill, a chunk, single tokens, a request without rows; what lies beyond a request's tokens is NaN and must not be read."""
    heads = HeadShape(query_heads, kv_heads, dim)
    batch = paged(heads, page_size, [40, 333, 257, 9, 1, 32, 0], [40, 21, 1, 0, 1, 17, 0])
    q = batch.query()
    mine = ops.attention(q, heads, batch.kv, batch.extents, dim**-0.5, window)
    close(mine, REFERENCE.attention(q, heads, batch.kv, batch.extents, dim**-0.5, window))


def test_attention_to_one_key_far_above_the_others_is_its_value(ops):
    heads = HeadShape(1, 1, 8)
    batch = paged(heads, 8, [100], [1])
    keys = torch.zeros(100, 8)
    keys[60] = 50.0
    places = batch.extents.pages[0].long()[torch.arange(100) // 8], torch.arange(100) % 8
    batch.kv.keys[places[0], 0, places[1]] = keys
    out = ops.attention(torch.ones(1, 8), heads, batch.kv, batch.extents, 1.0, None)
    assert torch.equal(out[0], batch.kv.values[places[0][60], 0, places[1][60]])


def test_attention_of_a_query_that_is_not_a_number_is_not_a_number_and_disturbs_no_other(ops):
    heads = HeadShape(4, 2, 16)
    batch = paged(heads, 16, [70, 50], [20, 1])
    q = batch.query()
    clean = ops.attention(q, heads, batch.kv, batch.extents, 0.25, None)
    q[3, 0] = torch.nan
    out = ops.attention(q, heads, batch.kv, batch.extents, 0.25, None)
    assert out[3, :16].isnan().all()
    out[3, :16] = clean[3, :16]
    assert torch.equal(out, clean)
