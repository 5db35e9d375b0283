"""The forms in which kernels know weights.

Every format (GGUF, GPTQ, AWQ, …) is loaded into one of these exactly: `dequantize` gives, bit for bit, what the format defines.

    Dense        [N, K] floats as stored
    GroupedInt   value[n, k] = scale[n, k // group] * code[n, k] + minimum[n, k // group]
"""

from dataclasses import dataclass

import numpy as np

_FLOATS = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", np.dtype(np.uint16): "bfloat16"}


def widened(values: np.ndarray) -> np.ndarray:
    """float32 from float32 (shared), float16, or the bits of bfloat16 in uint16."""
    if values.dtype == np.uint16:
        return np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Dense:
    """A plain weight. `values` is [N, K] in float32 or float16, or in uint16 the bits of bfloat16, which numpy does not have; possibly
    memory-mapped."""

    values: np.ndarray

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
    """Integer codes with a scale, and perhaps a minimum, for each group of consecutive inputs.

    Zero points are folded into the codes, so that `scale * code` is the format's own product and rounds as it does.
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

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> np.ndarray:
        """The weight in float32 [N, K], with one rounding for the product and one for the sum."""
        n, k = self.codes.shape
        with np.errstate(invalid="ignore"):  # An infinite scale is the file's affair, not worth a warning.
            grouped = self.codes.reshape(n, k // self.group, self.group) * self.scales[:, :, None]
            if self.minimums is not None:
                grouped += self.minimums[:, :, None]
        return grouped.reshape(n, k)

    def take(self, rows: np.ndarray) -> "GroupedInt":
        """The given rows (integers [B]), copied."""
        minimums = None if self.minimums is None else self.minimums[rows]
        return GroupedInt(self.codes[rows], self.scales[rows], minimums, self.group, self.bits)


Weight = Dense | GroupedInt
