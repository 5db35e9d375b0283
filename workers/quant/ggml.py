"""ggml's block formats, unpacked into `GroupedInt`.

A row of a tensor is a run of blocks; a block holds the codes of 32 (or, in the K formats, 256) consecutive inputs in a packed
order together with their scales. Unpacking only moves integers and widens half-precision scales, so dequantizing the result
gives what the format defines, to the last bit: value = scale * code (+ minimum), each step rounded once to float32.

    Q4_1 block   scale f16 │ minimum f16 │ 16 bytes: low nibbles are inputs 0…15, high nibbles 16…31
    Q4_K block   f16 │ f16 │ 12 bytes: eight 6-bit scales and minimums │ 4 × 32 bytes: low nibbles 32 inputs, high the next 32

Layouts: the block structs of ggml's quantization source. Everything here is numpy on one thread, in pieces that stay in cache; numpy
releases the interpreter lock, so tensors may be unpacked side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from headrace.kernels.weights import GroupedInt
from headrace.workers.quant.fields import PIECE_BYTES

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How one ggml type stores its blocks."""

    block: int
    """Inputs a block."""
    nbytes: int
    """Bytes a block."""
    group: int
    """Inputs that share a scale."""
    bits: int
    has_minimums: bool
    unpack: Callable[[Array, Array, Array, Array], None]
    """(blocks uint8 [n, nbytes], codes uint8 [n, block], scales f32 [n, groups], minimums f32 [n, groups], or none): fill the outputs."""


def unpack(type_name: str, packed: Array, columns: slice | None = None) -> GroupedInt:
    """Rows of packed blocks as a canonical weight.

    `packed` is uint8 [N, bytes a row], rows any stride apart. `columns` selects inputs; its ends must fall on group borders
    (ValueError otherwise), not on block borders. Allocates the result and one piece's worth of scratch.
    """
    form = FORMATS[type_name]
    width = packed.shape[1] // form.nbytes * form.block
    start, stop, _ = (columns or slice(None)).indices(width)
    if start % form.group or stop % form.group or stop <= start:
        raise ValueError(f"columns {start}:{stop} of a {type_name} tensor must be some, and must fall on multiples of {form.group}")
    first, last = start // form.block, -(-stop // form.block)
    packed = packed[:, first * form.nbytes : last * form.nbytes]
    rows, blocks, groups = packed.shape[0], last - first, form.block // form.group
    codes = np.empty((rows, blocks * form.block), np.uint8)
    scales = np.empty((rows, blocks * groups), np.float32)
    minimums = np.empty((rows if form.has_minimums else 0, blocks * groups), np.float32)
    step = max(1, PIECE_BYTES // max(1, packed.shape[1]))
    with np.errstate(all="ignore"):  # An infinite scale is the file's affair, not worth a warning.
        for top in range(0, rows, step):
            piece = slice(top, min(rows, top + step))
            form.unpack(
                np.ascontiguousarray(packed[piece]).reshape(-1, form.nbytes),
                codes[piece].reshape(-1, form.block),
                scales[piece].reshape(-1, groups),
                minimums[piece].reshape(-1, groups),
            )
    cut = slice(start - first * form.block, stop - first * form.block)
    group_cut = slice(cut.start // form.group, cut.stop // form.group)
    return GroupedInt(
        codes=_trimmed(codes.view(np.int8), cut),
        scales=_trimmed(scales, group_cut),
        minimums=_trimmed(minimums, group_cut) if form.has_minimums else None,
        group=form.group,
        bits=form.bits,
    )


def _trimmed(values: Array, columns: slice) -> Array:
    return np.ascontiguousarray(values[:, columns])


def _half(blocks: Array, offset: int) -> Array:
    """The half-precision number at byte `offset` of every block, as float32 [n]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).ravel().astype(np.float32)


def _field(blocks: Array, offset: int, nbytes: int) -> Array:
    """Bytes `offset` … of every block, as one contiguous uint8 [n, nbytes].

    Copied as whole items of `nbytes`, which numpy does an order of magnitude faster than byte by byte.
    """
    out = np.empty((blocks.shape[0], nbytes), np.uint8)
    out.view(f"V{nbytes}")[:, 0] = np.ndarray((blocks.shape[0],), f"V{nbytes}", blocks, offset, (blocks.strides[0],))
    return out


def _spread(values: Array, codes: Array, offset: int) -> None:
    """Put contiguous uint8 [n, w] at `codes[:, offset : offset + w]`, item by item as `_field` does."""
    width = values.shape[1]
    target = np.ndarray((codes.shape[0],), f"V{width}", codes, offset, (codes.strides[0],))
    target[:] = values.view(f"V{width}")[:, 0]


def _nibbles(blocks: Array, offset: int, codes: Array, high: Array | None = None, shift: int = 0) -> None:
    """16 bytes of every block into 32 codes: low nibbles first, then high ones; `high` is added after, `shift` taken off."""
    packed = _field(blocks, offset, 16)
    for place, values in ((0, packed & 0x0F), (16, packed >> 4)):
        if high is not None:
            values |= high[:, place : place + 16]
        if shift:
            values -= shift
        _spread(values, codes, place)


def _fifth_bits(blocks: Array, offset: int) -> Array:
    """The 32 bits at byte `offset`, each as 0 or 16: uint8 [n, 32]."""
    bits = np.unpackbits(_field(blocks, offset, 4), axis=1, bitorder="little")
    bits <<= 4
    return bits


def _q4_0(blocks: Array, codes: Array, scales: Array, minimums: Array) -> None:
    scales[:, 0] = _half(blocks, 0)
    _nibbles(blocks, 2, codes, shift=8)


def _q4_1(blocks: Array, codes: Array, scales: Array, minimums: Array) -> None:
    scales[:, 0], minimums[:, 0] = _half(blocks, 0), _half(blocks, 2)
    _nibbles(blocks, 4, codes)


def _q5_0(blocks: Array, codes: Array, scales: Array, minimums: Array) -> None:
    scales[:, 0] = _half(blocks, 0)
    _nibbles(blocks, 6, codes, _fifth_bits(blocks, 2), shift=16)


def _q5_1(blocks: Array, codes: Array, scales: Array, minimums: Array) -> None:
    scales[:, 0], minimums[:, 0] = _half(blocks, 0), _half(blocks, 2)
    _nibbles(blocks, 8, codes, _fifth_bits(blocks, 4))


def _q8_0(blocks: Array, codes: Array, scales: Array, minimums: Array) -> None:
    scales[:, 0] = _half(blocks, 0)
    _spread(_field(blocks, 2, 32), codes, 0)


def _k_scales(blocks: Array, scales: Array, minimums: Array) -> None:
    """The eight 6-bit scales and minimums of Q4_K and Q5_K blocks, times the block's own two.

    Of 12 bytes, the first four hold scales 0…3 in their low six bits, the next four minimums 0…3, the last four the low nibbles of
    scales and minimums 4…7, whose upper two bits are the upper two of the first eight bytes. The format subtracts minimums.
    """
    packed = _field(blocks, 4, 12)
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale, minimum = _half(blocks, 0)[:, None], _half(blocks, 2)[:, None]
    np.multiply(scale, a & 63, out=scales[:, 0:4])
    np.multiply(scale, (c & 15) | (a >> 2 & 48), out=scales[:, 4:8])
    np.multiply(minimum, b & 63, out=minimums[:, 0:4])
    np.multiply(minimum, (c >> 4) | (b >> 2 & 48), out=minimums[:, 4:8])
    np.negative(minimums, out=minimums)


def _q4_k(blocks: Array, codes: Array, scales: Array, minimums: Array) -> None:
    _k_scales(blocks, scales, minimums)
    for part in range(4):
        packed = _field(blocks, 16 + 32 * part, 32)
        _spread(packed & 0x0F, codes, 64 * part)
        _spread(packed >> 4, codes, 64 * part + 32)


def _q5_k(blocks: Array, codes: Array, scales: Array, minimums: Array) -> None:
    _k_scales(blocks, scales, minimums)
    high = _field(blocks, 16, 32)
    for part in range(4):
        packed = _field(blocks, 48 + 32 * part, 32)
        _spread(packed & 0x0F | (high >> 2 * part & 1) << 4, codes, 64 * part)
        _spread(packed >> 4 | (high >> 2 * part + 1 & 1) << 4, codes, 64 * part + 32)


def _q6_k(blocks: Array, codes: Array, scales: Array, minimums: Array) -> None:
    """Two halves of 128 inputs; in each, 64 bytes of low nibbles and 32 bytes that hold two upper bits of four inputs."""
    np.multiply(_half(blocks, 208)[:, None], _field(blocks, 192, 16).view(np.int8), out=scales)
    for half in range(2):
        high = _field(blocks, 128 + 32 * half, 32)
        for part in range(4):
            packed = _field(blocks, 64 * half + 32 * (part & 1), 32)
            low = packed >> 4 if part > 1 else packed & 0x0F
            _spread((low | (high >> 2 * part & 3) << 4) - np.uint8(32), codes, 128 * half + 32 * part)


FORMATS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 18, 32, 4, False, _q4_0),
    "Q4_1": BlockFormat(32, 20, 32, 4, True, _q4_1),
    "Q5_0": BlockFormat(32, 22, 32, 5, False, _q5_0),
    "Q5_1": BlockFormat(32, 24, 32, 5, True, _q5_1),
    "Q8_0": BlockFormat(32, 34, 32, 8, False, _q8_0),
    "Q4_K": BlockFormat(256, 144, 32, 4, True, _q4_k),
    "Q5_K": BlockFormat(256, 176, 32, 5, True, _q5_k),
    "Q6_K": BlockFormat(256, 210, 16, 6, False, _q6_k),
}
"""Every block format that can be read."""
