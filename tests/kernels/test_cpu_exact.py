"""A packed weight is the weight it was made of, to the last bit: a product with rows of the identity gives it back as it dequantizes.

Scales here are such as the GGUF types have, whose products with codes are exact in float32, so that one rounding and two are the same.
"""

import pytest
import torch

from headrace.kernels.weights import GroupedInt, ScaledFloat
from tests.kernels.eager import NativeOps
from tests.kernels.paged import grouped_int, int32, random, scaled_float, values_of, with_zeros

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


def zeros(bits: int, scales: torch.Tensor) -> GroupedInt:
    return with_zeros(OUTPUTS, INPUTS, 32, bits, scales)


def float8(block: tuple[int, int], seed: int = 3) -> ScaledFloat:
    return scaled_float(OUTPUTS, INPUTS, block, random(-(-OUTPUTS // block[0]), -(-INPUTS // block[1]), seed=seed))


SCALES = random(OUTPUTS, INPUTS // 32, seed=4)
FORMS = {
    "Q4_0": integers(4, -8, 32, False, False),
    "Q4_1": integers(4, 0, 32, False, True),
    "Q5_0": integers(5, -16, 32, False, False),
    "Q5_1": integers(5, 0, 32, False, True),
    "Q8_0": integers(8, -128, 32, False, False),
    "Q4_K": integers(4, 0, 32, True, True),
    "Q5_K": integers(5, 0, 32, True, True),
    "Q6_K": integers(6, -32, 16, True, False),
    "zeros of 4 bits": zeros(4, SCALES.half().float()),
    "zeros of 8 bits": zeros(8, SCALES.half().float()),
    "zeros beside scales of bfloat16": zeros(4, (SCALES * 1e-9).bfloat16().float()),
    "zeros of 8 bits beside scales of bfloat16": zeros(8, (SCALES * 1e-9).bfloat16().float()),
    "zeros of 8 bits beside scales of float32": zeros(8, SCALES),
    "float8 in blocks": float8((16, 96)),
    "float8 in blocks cut short": float8((16, 128)),
    "float8 by output": float8((1, INPUTS)),
    "float8 with one scale": float8((OUTPUTS, INPUTS)),
    "float8 in one block that is larger": float8((1 << 40, 1 << 40)),
    "float8 in groups of 3": float8((1, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_value_comes_back_as_it_dequantizes(ops, form):
    weight = FORMS[form]
    packed, identity, expected = ops.prepare([weight]), torch.eye(INPUTS), values_of(weight)
    assert torch.equal(ops.linear(identity, packed).T, expected)
    assert torch.equal(torch.cat([ops.linear(row, packed) for row in identity.split(1)]).T, expected)
    assert torch.equal(ops.embed(int32(list(range(OUTPUTS))), ops.prepare_table(weight)), expected)


@pytest.mark.parametrize(
    ("form", "code_bytes", "scale_bytes"),
    [("Q4_1", 0.5, 4), ("Q4_K", 0.5, 8), ("zeros of 4 bits", 0.5, 3), ("zeros of 8 bits", 1, 3), ("float8 by output", 1, 4 / 9)],
)
def test_codes_and_scales_take_as_few_bytes_as_are_exact(ops, form, code_bytes, scale_bytes):
    panels = -(-OUTPUTS // 16)
    groups = INPUTS // 32
    assert ops.prepare([FORMS[form]]).nbytes == panels * 16 * (INPUTS * code_bytes + groups * scale_bytes)


def test_zeros_beside_scales_of_any_kind_are_right_but_for_a_rounding(ops):
    """Where codes less their zeros have an offset, instruction sets without fused products round once more."""
    weight = zeros(4, SCALES)
    out = ops.linear(torch.eye(INPUTS), ops.prepare([weight])).T
    torch.testing.assert_close(out, values_of(weight), rtol=1e-6, atol=3e-6)


def test_float8_that_is_no_number_stays_none(ops):
    weight = float8((16, 96))
    weight.codes[3, 5] = 0x7F
    out = ops.linear(torch.ones(2, INPUTS), ops.prepare([weight]))
    assert out[:, 3].isnan().all()
    assert out[:, :3].isfinite().all()


def test_a_table_and_a_head_of_the_same_name_share_their_storage(ops):
    weight = integers(8, -128, 32, False, False)
    table = ops.backend.prepare_table("embedding", lambda: weight)
    assert ops.backend.prepare("embedding", lambda: [weight]) is table
    assert ops.backend.prepare("head", lambda: [weight]) is not table
