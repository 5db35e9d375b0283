"""The canonical forms of weights mean what their docstrings say, and inputs are rounded as these ask, next to plain loops."""

import numpy as np
import pytest
import torch

from headrace.kernels.weights import E4M3, GroupedInt, InputRounding, ScaledFloat
from tests.kernels.eager import ReferenceOps
from tests.kernels.paged import random

RNG = np.random.default_rng(5)


def scaled(n: int, k: int, block: tuple[int, int], inputs: InputRounding | None = None) -> ScaledFloat:
    codes = RNG.integers(0, 256, (n, k), np.uint8)
    codes[(codes & 127) == 127] = 0
    return ScaledFloat(codes, RNG.random((-(-n // block[0]), -(-k // block[1])), np.float32), block, inputs)


def test_float8_codes_mean_what_torch_takes_them_for():
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3, theirs, equal_nan=True)
    assert np.signbit(E4M3[128])


@pytest.mark.parametrize("block", [(1, 200), (70, 200), (32, 64), (1, 40), (128, 128)])
def test_a_scaled_float_is_its_code_times_the_scale_of_its_block(block):
    weight = scaled(70, 200, block)
    values = weight.dequantize()
    assert values.dtype == np.float32
    for n in range(70):
        for k in range(0, 200, 7):
            assert values[n, k] == E4M3[weight.codes[n, k]] * weight.scales[n // block[0], k // block[1]]
    rows = np.array([69, 0, 33, 33])
    assert np.array_equal(weight.take(rows).dequantize(), values[rows])


def test_zeros_are_taken_off_the_codes_before_they_are_scaled():
    codes, zeros = RNG.integers(-128, 128, (6, 32)).astype(np.int8), RNG.integers(-128, 128, (6, 4)).astype(np.int8)
    scales = RNG.random((6, 4), np.float32)
    weight = GroupedInt(codes, scales, None, 8, 8, zeros)
    values = weight.dequantize()
    for n in range(6):
        for k in range(32):
            assert values[n, k] == np.float32(int(codes[n, k]) - int(zeros[n, k // 8])) * scales[n, k // 8]
    assert np.array_equal(weight.take(np.array([5, 1])).dequantize(), values[[5, 1]])


def test_zeros_beside_scales_of_float16_are_minimums():
    codes, zeros = RNG.integers(0, 16, (8, 32)).astype(np.int8), RNG.integers(0, 16, (8, 4)).astype(np.int8)
    scales = RNG.random((8, 4)).astype(np.float16).astype(np.float32)
    minimums = GroupedInt(codes, scales, -scales * zeros, 8, 4)
    assert np.array_equal(GroupedInt(codes, scales, None, 8, 4, zeros).dequantize(), minimums.dequantize())


def nearest(value: np.float32, kind: str) -> np.float32:
    """The code next to a value, the even one of two, found among all."""
    codes = np.arange(-128.0, 128.0) if kind == "int8" else np.concatenate([E4M3[127::-1], E4M3[128:]])
    apart = np.abs(codes.astype(np.float64) - float(value))
    best = np.flatnonzero(apart == np.nanmin(apart))
    of_bits = (lambda i: int(codes[i])) if kind == "int8" else (lambda i: 127 - i if i < 128 else i - 128)
    return np.float32(codes[min(best, key=lambda i: of_bits(i) % 2)])


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("group", [None, 128, 48, 1 << 60])
@pytest.mark.parametrize("scale", [None, 0.0123])
def test_inputs_are_rounded_as_their_weight_asks(kind, group, scale):
    if group and scale:
        return
    how = InputRounding(kind, group, scale if scale is None else float(np.float32(scale)))
    x = random(3, 256).numpy()
    x[0, :128], x[1, 7], x[2, 100:104] = 0.0, 5e-31, [300.0, -2.5, 2.5, 1e-3]
    weight = scaled(32, 256, (1, 256), how)
    largest, size = np.float32(448 if kind == "e4m3" else 127), min(group or 256, 256)
    rounded = np.zeros_like(x)
    for row, out in zip(x, rounded, strict=True):
        for begin in range(0, 256, size):
            part = row[begin : begin + size]
            highest = np.abs(part).max()
            factor = np.float32(0) if highest < 2.0**-100 else largest / highest
            by = highest / largest if scale is None else np.float32(scale)
            if scale is not None:
                factor = np.float32(1) / by
            out[begin : begin + size] = [nearest(value * factor, kind) * by for value in part]
    auto, exact = ReferenceOps("auto"), ReferenceOps()
    prepared = exact.prepare([weight])
    assert torch.equal(auto.linear(torch.from_numpy(x), auto.prepare([weight])), exact.linear(torch.from_numpy(rounded), prepared))
    assert not np.array_equal(rounded, x)


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_spoils_its_group_alone(kind, bad):
    ops, x = ReferenceOps("auto"), random(2, 256)
    x[0, 3] = bad
    y = ops.linear(x, ops.prepare([scaled(8, 256, (8, 256), InputRounding(kind))]))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_weights_that_ask_for_different_roundings_are_stacked_all_the_same():
    ops, x, bias = ReferenceOps("auto"), random(5, 128), random(24, seed=1)
    weights = [scaled(8, 128, (8, 128), InputRounding("e4m3", scale=scale)) for scale in (0.01, 0.02)] + [scaled(8, 128, (1, 128))]
    apart = [ops.linear(x, ops.prepare([weight])) for weight in weights]
    assert torch.allclose(ops.linear(x, ops.prepare(weights, bias)), torch.cat(apart, 1) + bias)
    assert not torch.allclose(ops.linear(x, ops.prepare([weights[0]])), ReferenceOps().linear(x, ReferenceOps().prepare([weights[0]])))
