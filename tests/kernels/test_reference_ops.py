"""The reference ops compute what the op table says, next to naive float64 versions of each."""

import pytest
import torch

from headrace.kernels.ops import HeadShape, RopeTable
from headrace.kernels.reference.exact import exp, row_sum
from headrace.kernels.reference.step import KVPages
from headrace.kernels.weights import GroupedInt
from tests.kernels.eager import ReferenceOps
from tests.kernels.paged import Extents, dense, grouped_int, values_of

OPS = ReferenceOps()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def grouped(n: int, k: int, group: int, seed: int = 0) -> GroupedInt:
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return grouped_int(codes, random(n, k // group, seed=seed), random(n, k // group, seed=seed + 1), group, 4)


def test_exp_is_within_two_units_in_the_last_place_over_its_whole_range():
    x = torch.cat((torch.linspace(-86.9, 88, 200_001), random(1000) * 1e-3))
    exact = x.double().exp()
    assert ((exp(x).double() - exact).abs() / exact).max() < 2 * 2**-23


def test_exp_is_exact_at_its_ends():
    x = torch.tensor([0.0, -0.0, -torch.inf, -1e30, -87.1, torch.nan])
    assert exp(x)[:5].tolist() == [1, 1, 0, 0, 0]
    assert exp(x)[5].isnan()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 577])
def test_row_sum_sums_rows_of_any_length(length):
    x = random(5, 3, length)
    close(row_sum(x), x.double().sum(-1, keepdim=True))


@pytest.mark.parametrize(("n", "k"), [(1, 3), (37, 50), (64, 32)])
@pytest.mark.parametrize("rows", [1, 8, 9, 70])
def test_linear_multiplies_stacked_weights_and_adds_the_bias(n, k, rows):
    first, second, bias, x = random(n, k), random(5, k, seed=1), random(n + 5, seed=2), random(rows, k, seed=3)
    out = OPS.linear(x, OPS.prepare([dense(first), dense(second.bfloat16())], bias))
    close(out, x.double() @ torch.cat((first, second.bfloat16())).double().t() + bias.double())


def test_weights_of_different_inputs_cannot_be_stacked():
    with pytest.raises(ValueError, match="weights of 16 and 32 inputs"):
        OPS.prepare([dense(random(8, 32)), dense(random(8, 16))])


def test_integer_weights_multiply_as_their_dequantized_values():
    weight, x = grouped(48, 64, 16), random(3, 64)
    codes, scales, minimums = (torch.from_numpy(part) for part in (weight.codes, weight.scales, weight.minimums))
    values = (codes.view(48, 4, 16) * scales.unsqueeze(-1) + minimums.unsqueeze(-1)).view(48, 64)
    assert torch.equal(values_of(weight), values)
    close(OPS.linear(x, OPS.prepare([weight])), x.double() @ values.double().t())


def test_embedding_rows_are_dequantized_and_scaled_once():
    weight = grouped(20, 32, 16)
    ids = int32(3, 0, 19, 3)
    assert torch.equal(OPS.embed(ids, OPS.prepare_table(weight)), values_of(weight)[ids.long()])
    assert torch.equal(OPS.embed(ids, OPS.prepare_table(weight), 1.7), values_of(weight)[ids.long()] * 1.7)


def test_rmsnorm_and_the_residual_sum():
    x, residual, weight = random(5, 72), random(5, 72, seed=1), random(72, seed=2)
    total = (x + residual).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    normed, summed = OPS.add_rmsnorm(x, residual, weight, 1e-5)
    close(normed, expected)
    assert torch.equal(summed, residual + x)
    assert torch.equal(OPS.rmsnorm(summed, weight, 1e-5), normed)
    assert torch.equal(OPS.add(x, residual), summed)


def test_gated_activations():
    x = random(6, 2 * 37) * 4
    gate, up = x.double().chunk(2, -1)
    close(OPS.gated(x, "silu"), torch.nn.functional.silu(gate) * up)
    close(OPS.gated(x, "gelu_tanh"), torch.nn.functional.gelu(gate, approximate="tanh") * up)
    with pytest.raises(ValueError, match='"relu" is not known'):
        OPS.gated(x, "relu")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [16, 12])
def test_rope_turns_each_pair_and_writes_k_and_v_to_their_slots(interleaved, rotated):
    heads = HeadShape(4, 2, 16)
    tokens, half = 3, rotated // 2
    angles = random(40, half)
    table = RopeTable(angles.cos(), angles.sin(), interleaved)
    qkv, q_norm, k_norm = random(tokens, 8 * 16), random(16, seed=1), random(16, seed=2)
    kv = KVPages(torch.zeros(5, 2, 8, 16), torch.zeros(5, 2, 8, 16))
    extents = Extents(int32(0, 7, 39), int32(9, 39, 16), int32(0, 3), int32(0).view(1, 1))
    q = OPS.rope_write_kv(qkv, heads, table, q_norm, k_norm, 1e-6, kv, extents).view(tokens, 4, 16)

    def expected(x: torch.Tensor, weight: torch.Tensor, position: int) -> torch.Tensor:
        x = x.double() / (x.double().square().mean() + 1e-6).sqrt() * weight
        turned = x.clone()
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            pair = torch.complex(x[a], x[b]) * torch.polar(torch.ones((), dtype=torch.float64), angles[position, i].double())
            turned[a], turned[b] = pair.real, pair.imag
        return turned

    split = qkv.view(tokens, 8, 16)
    for row, (position, slot) in enumerate([(0, 9), (7, 39), (39, 16)]):
        for head in range(4):
            close(q[row, head], expected(split[row, head], q_norm, position))
        for head in range(2):
            close(kv.keys[slot // 8, head, slot % 8], expected(split[row, 4 + head], k_norm, position))
            assert torch.equal(kv.values[slot // 8, head, slot % 8], split[row, 6 + head])
    assert (kv.values != 0).any(-1).sum() == tokens * 2


@pytest.mark.parametrize("window", [None, 1, 40, 200])
@pytest.mark.parametrize("dim", [16, 20])
def test_attention_sees_its_own_request_up_to_itself_and_no_further_back_than_the_window(window, dim):
    heads, page_size = HeadShape(6, 2, dim), 12
    lengths, fresh = [300, 1, 130], [150, 1, 7]
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(9)).int()[: 3 * 13 + 1]
    table = torch.stack([pages[:25], pages[25:26].expand(25), pages[26:40].repeat(2)[:25]])
    # what lies beyond a request's tokens must not be read
    kv = KVPages(torch.full((40, 2, page_size, dim), torch.nan), torch.full((40, 2, page_size, dim), torch.nan))
    keys, values = [random(n, 2, dim, seed=n) for n in lengths], [random(n, 2, dim, seed=n + 1) for n in lengths]
    for r, n in enumerate(lengths):
        for p in range(n):
            kv.keys[table[r, p // page_size], :, p % page_size] = keys[r][p]
            kv.values[table[r, p // page_size], :, p % page_size] = values[r][p]
    positions = [p for n, f in zip(lengths, fresh, strict=True) for p in range(n - f, n)]
    q = random(sum(fresh), 6 * dim, seed=7)
    extents = Extents(int32(*positions), int32(*positions), int32(0, 150, 151, 158), table)
    out = OPS.attention(q, heads, kv, extents, 0.3, window).view(-1, 6, dim)
    owner = [r for r, f in enumerate(fresh) for _ in range(f)]
    for row, (r, p) in enumerate(zip(owner, positions, strict=True)):
        seen = slice(0 if window is None else max(0, p - window + 1), p + 1)
        k, v = keys[r][seen].repeat_interleave(3, 1).double(), values[r][seen].repeat_interleave(3, 1).double()
        weights = (torch.einsum("hd,phd->hp", q.view(-1, 6, dim)[row].double(), k) * 0.3).softmax(-1)
        close(out[row], torch.einsum("hp,phd->hd", weights, v))
