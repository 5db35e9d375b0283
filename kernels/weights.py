"""The forms in which kernels know weights.

Every format (GGUF, GPTQ, AWQ, …) is loaded into one of these exactly: `dequantize` gives, bit for bit, what the format defines.

    Dense        [N, K] floats as stored
    GroupedInt   value[n, k] = scale[n, k // group] * code[n, k] + minimum[n, k // group], or scale * (code - zero)
    ScaledFloat  value[n, k] = e4m3(code[n, k]) * scale[n // block[0], k // block[1]]

Some formats also say how the inputs of a layer are rounded before they meet the weight: `inputs`, an `InputRounding`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

_FLOATS = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", np.dtype(np.uint16): "bfloat16"}


def widened(values: np.ndarray) -> np.ndarray:
    """float32 from float32 (shared), float16, or the bits of bfloat16 in uint16."""
    if values.dtype == np.uint16:
        return np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
    return values.astype(np.float32, copy=False)


def _e4m3_values() -> np.ndarray:
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    magnitude = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


E4M3 = _e4m3_values()
"""What each byte means as float8 e4m3fn (arXiv:2209.05433): float32 [256]. One bit of sign, four of exponent (bias 7), three of fraction;
no infinities, and NaN only with all bits after the sign set."""

LARGEST = {"e4m3": 448.0, "int8": 127.0}
"""The magnitude of code that the largest input of a group with a scale of its own becomes."""
SMALLEST = 2.0**-100
"""Below this, the inputs of a group with a scale of its own count as 0."""


@dataclass(frozen=True, slots=True)
class InputRounding:
    """How the inputs x [T, K] of a layer are rounded, as its format asks: what `--activations auto` means for such a weight.

    Every step is in float32, rounded once. With L = LARGEST[kind], of each `group` of consecutive inputs of a row (the last may be
    shorter), or of a whole row where group is None:

        highest = max |x|                 below SMALLEST: every result is 0; infinite or NaN: every result is NaN
        factor  = L / highest             scale = highest / L
        code    = nearest(x * factor)     of e4m3fn's values, or of whole numbers; of two as near, the even one
        result  = code * scale

    A static `scale` holds for all inputs instead: factor = 1 / scale, and codes saturate, those of e4m3 at ±448, whole numbers at -128 and
    127. NaN stays what it is. `code` is what a kernel multiplies with; where it multiplies by `scale` is its own affair.
    """

    kind: Literal["e4m3", "int8"]
    group: int | None = None
    """Inputs that share a scale of their own: None for all K of a row. None with a static scale."""
    scale: float | None = None
    """Static, a float32 above 0; None where each group has its own."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A plain weight. `values` is [N, K] in float32 or float16, or in uint16 the bits of bfloat16, which numpy does not have; possibly
    memory-mapped."""

    values: np.ndarray
    inputs: ClassVar[None] = None
    """How inputs are rounded: a plain weight does not say."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> str:
        """ "float32", "float16" or "bfloat16". ValueError for anything else."""
        if (name := _FLOATS.get(self.values.dtype)) is None:
            raise ValueError(f"a weight of {self.values.dtype} has no kernel: use float32, float16 or bfloat16")
        return name

    def dequantize(self) -> np.ndarray:
        """The weight in float32 [N, K]; shares memory when it already is float32."""
        return widened(self.values)

    def take(self, rows: np.ndarray) -> "Dense":
        """The given rows (integers [B]), copied."""
        return Dense(self.values[rows])


@dataclass(frozen=True, slots=True)
class GroupedInt:
    """Integer codes with a scale, and perhaps a minimum or a zero, for each group of consecutive inputs. Of these two there is one at most:
    a minimum is added to the product, a zero is taken off the code, exactly, before it.

    Zeros that all groups share are folded into the codes, so that `scale * code` is the format's own product and rounds as it does.
    """

    codes: np.ndarray
    """int8 [N, K]; within the range of `bits` (signed, or unsigned from 0)."""
    scales: np.ndarray
    """float32 [N, K // group]."""
    minimums: np.ndarray | None
    """float32 [N, K // group], added after the product; None where the format has none."""
    group: int
    """Consecutive inputs (along K) that share a scale."""
    bits: int
    """Bits a code needs: 4, 5, 6 or 8."""
    zeros: np.ndarray | None = None
    """int8 [N, K // group], taken off the codes; None where the format has none. Beside them, codes of 4 bits are unsigned, and so are the
    zeros. Where `scales` hold no more than 15 significant bits, as those of float16 and bfloat16 do, -scale * zero is exact, and added to
    scale * code gives the same value."""
    inputs: InputRounding | None = None
    """How the format wants inputs rounded: "int8" with one scale a token for W8A8, None where it is about weights alone."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> np.ndarray:
        """The weight in float32 [N, K], with one rounding for the product and one for the sum."""
        n, k = self.codes.shape
        grouped = self.codes.reshape(n, k // self.group, self.group)
        if self.zeros is not None:
            grouped = grouped.astype(np.int16) - self.zeros[:, :, None]
        with np.errstate(invalid="ignore"):  # An infinite scale is the file's affair, not worth a warning.
            grouped = grouped * self.scales[:, :, None]
            if self.minimums is not None:
                grouped += self.minimums[:, :, None]
        return grouped.reshape(n, k)

    def take(self, rows: np.ndarray) -> "GroupedInt":
        """The given rows (integers [B]), copied."""
        minimums, zeros = (None if part is None else part[rows] for part in (self.minimums, self.zeros))
        return GroupedInt(self.codes[rows], self.scales[rows], minimums, self.group, self.bits, zeros, self.inputs)


@dataclass(frozen=True, slots=True)
class ScaledFloat:
    """Float8 codes with a scale for each block of outputs and inputs; blocks at the end may be cut short."""

    codes: np.ndarray
    """uint8 [N, K]: the bits of float8 e4m3fn, see E4M3; possibly memory-mapped."""
    scales: np.ndarray
    """float32 [ceil(N / block[0]), ceil(K / block[1])]."""
    block: tuple[int, int]
    """Outputs and inputs that share a scale: (N, K) for one scale in all, (1, K) for one an output, (128, 128) for DeepSeek's blocks."""
    inputs: InputRounding | None = None
    """How the format wants inputs rounded; None where it is about weights alone."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> np.ndarray:
        """The weight in float32 [N, K], rounded once."""
        values, (outputs, inputs) = E4M3[self.codes], self.block
        scales = self.scales if self.scales.shape[1] == 1 else np.repeat(self.scales, inputs, axis=1)[:, : self.codes.shape[1]]
        with np.errstate(all="ignore"):  # As above.
            if outputs == 1:
                values *= scales
            else:
                for block, scale in enumerate(scales):
                    values[block * outputs : (block + 1) * outputs] *= scale
        return values

    def take(self, rows: np.ndarray) -> "ScaledFloat":
        """The given rows (integers [B]), copied."""
        return ScaledFloat(self.codes[rows], self.scales[rows // self.block[0]], (1, self.block[1]), self.inputs)


Weight = Dense | GroupedInt | ScaledFloat
