"""A packed weight is the weight it was made of, to the last bit: a product with rows of the identity gives it back as it dequantizes.

Scales here are such as the GGUF types have, whose products with codes are exact in float32, so that one rounding and two are the same.
"""

import pytest
import torch

from headrace.kernels.weights import GroupedInt
from tests.kernels.eager import NativeOps
from tests.kernels.paged import grouped_int, int32, random, values_of

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
OUTPUTS, INPUTS = 37, 288


@pytest.fixture(scope="module", params=cpu.INSTRUCTION_SETS)
def ops(request):
    return NativeOps(2, request.param)


def integers(bits: int, low: int, group: int, two_levels: bool, minimum: bool) -> GroupedInt:
    """Scales are binary16, or binary16 times a small integer as in the K-quants, which binary16 cannot hold."""
    draw = torch.Generator().manual_seed(bits + group)
    codes = torch.randint(low, low + 2**bits, (OUTPUTS, INPUTS), generator=draw, dtype=torch.int16).to(torch.int8)
    codes[0, 0], codes[-1, -1] = low, low + 2**bits - 1

    def level(seed: int) -> torch.Tensor:
        values = random(OUTPUTS, INPUTS // group, seed=seed).half().float()
        return values * torch.randint(33, 64, values.shape, generator=draw) if two_levels else values

    return grouped_int(codes, level(1), level(2) if minimum else None, group, bits)


FORMS = {
    "Q4_0": integers(4, -8, 32, False, False),
    "Q4_1": integers(4, 0, 32, False, True),
    "Q5_0": integers(5, -16, 32, False, False),
    "Q5_1": integers(5, 0, 32, False, True),
    "Q8_0": integers(8, -128, 32, False, False),
    "Q4_K": integers(4, 0, 32, True, True),
    "Q5_K": integers(5, 0, 32, True, True),
    "Q6_K": integers(6, -32, 16, True, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_value_comes_back_as_it_dequantizes(ops, form):
    weight = FORMS[form]
    packed, identity, expected = ops.prepare([weight]), torch.eye(INPUTS), values_of(weight)
    assert torch.equal(ops.linear(identity, packed).T, expected)
    assert torch.equal(torch.cat([ops.linear(row, packed) for row in identity.split(1)]).T, expected)
    assert torch.equal(ops.embed(int32(list(range(OUTPUTS))), ops.prepare_table(weight)), expected)


@pytest.mark.parametrize(("form", "scale_bytes"), [("Q4_1", 2), ("Q4_K", 4)])
def test_scales_take_two_bytes_where_that_is_exact(ops, form, scale_bytes):
    panels = -(-OUTPUTS // 16)
    groups = INPUTS // 32
    assert ops.prepare([FORMS[form]]).nbytes == panels * 16 * (INPUTS // 2 + 2 * groups * scale_bytes)


def test_a_table_and_a_head_of_the_same_name_share_their_storage(ops):
    weight = integers(8, -128, 32, False, False)
    table = ops.backend.prepare_table("embedding", lambda: weight)
    assert ops.backend.prepare("embedding", lambda: [weight]) is table
    assert ops.backend.prepare("head", lambda: [weight]) is not table
