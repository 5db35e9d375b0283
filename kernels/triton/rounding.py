"""Rounding to whole numbers and to float8 e4m3fn (arXiv:2209.05433), and back, by float32 arithmetic alone: for kernels on any card."""

import triton
import triton.language as tl


@triton.jit
def nearest_whole(x):
    """Whole numbers of magnitude below 2^22: the sum with 1.5 * 2^23 has no room for fractions, and rounds to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def nearest_e4m3(x):
    """Values of e4m3fn as float32, for |x| up to 448 and a little: fractions have three bits, and none below 2^-9."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    inverse = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    return nearest_whole(x * inverse) * step


@triton.jit
def e4m3_code(x):
    """Bytes of e4m3fn for finite x of magnitude up to 448, which is rounded."""
    half = (nearest_e4m3(x) * (1.0 / 256.0)).to(tl.float16).to(tl.int16, bitcast=True)
    return (((half >> 8) & 0x80) | ((half >> 7) & 0x7F)).to(tl.uint8)


@triton.jit
def e4m3_value(code):
    """Bytes of e4m3fn as float16, where the hardware knows no such type: they have the same fraction, and 2^8 to make up for."""
    wide = code.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half * 256.0)


@triton.jit
def byte_value(code):
    """int8 as float16: the bits of 2^10 with a number below 2^8 in its lowest places are that float16 plus the number."""
    return ((code.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
