"""Block formats against the gguf package, bit for bit."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.checkpoint.gguf import GGML_TYPES
from headrace.engine.checkpoint.resolve import GGUF_TYPES
from headrace.kernels.weights import GroupedInt
from headrace.workers.loader.gguf import FLOATS
from headrace.workers.quant.ggml import FORMATS, unpack

HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
"""Where the half-precision numbers of a block stand."""
EXTREMES = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x3C00, 0xBC00], np.uint16)
"""Zeros, subnormals, the smallest normal, the largest finite, the infinities, one; with both signs."""


def random_blocks(name: str, rows: int, width: int, rng: np.random.Generator, halves: np.ndarray | None = None) -> np.ndarray:
    """Rows of blocks with random codes; every half-precision number is drawn from `halves`, or is any but NaN."""
    form = FORMATS[name]
    blocks = rng.integers(0, 256, (rows * width // form.block, form.nbytes), np.uint8)
    for offset in HALVES[name]:
        values = rng.integers(0, 1 << 16, len(blocks), np.uint16) if halves is None else rng.choice(halves, len(blocks))
        values = np.where(np.isnan(values.view(np.float16)), np.uint16(0x3555), values)
        blocks[:, offset : offset + 2] = values[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def assert_same_bits(weight: GroupedInt, packed: np.ndarray, name: str) -> None:
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    found = weight.dequantize()
    assert found.shape == expected.shape
    # An infinite scale times a zero code is NaN, whose payload the standard leaves open.
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("halves", [None, EXTREMES], ids=["any", "extremes"])
def test_unpacked_blocks_dequantize_to_the_formats_own_bits(name: str, halves: np.ndarray | None) -> None:
    packed = random_blocks(name, 513, 512, np.random.default_rng(7), halves)
    assert_same_bits(unpack(name, packed), packed, name)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_reals_come_back_as_the_package_gives_them(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    reals = np.random.default_rng(3).standard_normal((16, 512)).astype(np.float32)
    try:
        packed = gguf.quants.quantize(reals, kind)
    except NotImplementedError:
        pytest.skip(f"the gguf package cannot write {name}")
    weight = unpack(name, packed)
    assert_same_bits(weight, packed, name)
    assert np.abs(weight.dequantize() - reals).max() < 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_the_canonical_form_has_the_shape_it_promises(name: str) -> None:
    form = FORMATS[name]
    weight = unpack(name, random_blocks(name, 5, 512, np.random.default_rng(1)))
    assert weight.shape == (5, 512)
    assert (weight.codes.dtype, weight.scales.dtype, weight.scales.shape) == (np.int8, np.float32, (5, 512 // form.group))
    assert (weight.group, weight.bits) == (form.group, form.bits)
    assert (weight.minimums is None) != form.has_minimums
    assert weight.codes.flags.c_contiguous
    low, high = (0, (1 << form.bits) - 1) if form.has_minimums else (-(1 << form.bits - 1), (1 << form.bits - 1) - 1)
    assert (int(weight.codes.min()), int(weight.codes.max())) == (low, high)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.integers(1, 40), st.integers(1, 3), st.data())
def test_any_cut_on_group_borders_equals_the_cut_of_the_whole(name: str, rows: int, blocks: int, data: st.DataObject) -> None:
    form = FORMATS[name]
    width = blocks * 256
    packed = random_blocks(name, rows, width, np.random.default_rng(rows))
    start = data.draw(st.integers(0, width // form.group - 1))
    stop = data.draw(st.integers(start + 1, width // form.group))
    cut = slice(start * form.group, stop * form.group)
    part = unpack(name, packed, cut)
    assert part.shape == (rows, cut.stop - cut.start)
    assert np.array_equal(part.dequantize(), unpack(name, packed).dequantize()[:, cut])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [slice(1, 256), slice(0, 250), slice(8, 24), slice(32, 32)])
def test_a_cut_within_a_group_is_refused(name: str, columns: slice) -> None:
    with pytest.raises(ValueError, match=f"must fall on multiples of {FORMATS[name].group}"):
        unpack(name, random_blocks(name, 2, 256, np.random.default_rng(0)), columns)


def test_what_resolves_can_be_read_and_sizes_agree_with_the_container() -> None:
    assert set(GGUF_TYPES) == set(FORMATS) | set(FLOATS)
    sizes = {name: (block, size) for name, block, size in GGML_TYPES.values()}
    assert {name: (form.block, form.nbytes) for name, form in FORMATS.items()} == {name: sizes[name] for name in FORMATS}
