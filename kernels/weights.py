"""The forms in which kernels know weights.

Every format (GGUF, GPTQ, AWQ, …) is loaded into one of these exactly: `dequantize` gives, bit for bit, what the format defines.

    Dense        [N, K] floats as stored
    GroupedInt   value[n, k] = scale[n, k // group] * code[n, k] + minimum[n, k // group]
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Dense:
    """A plain weight: `values` is [N, K] in float32, bfloat16 or float16, possibly memory-mapped."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The weight in float32 [N, K]; shares memory when it already is float32."""
        return self.values.float()


@dataclass(frozen=True, slots=True)
class GroupedInt:
    """Integer codes with a scale, and perhaps a minimum, for each group of consecutive inputs.

    Zero points are folded into the codes, so that `scale * code` is the format's own product and rounds as it does.
    """

    codes: torch.Tensor
    """int8 [N, K]; within the range of `bits` (signed, or unsigned from 0)."""
    scales: torch.Tensor
    """float32 [N, K // group]."""
    minimums: torch.Tensor | None
    """float32 [N, K // group], added after the product; None where the format has none."""
    group: int
    """Consecutive inputs (along K) that share a scale."""
    bits: int
    """Bits a code needs: 4, 5, 6 or 8."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The weight in float32 [N, K], with one rounding for the product and one for the sum."""
        n, k = self.codes.shape
        values = self.codes.view(n, k // self.group, self.group).float() * self.scales.unsqueeze(-1)
        if self.minimums is not None:
            values += self.minimums.unsqueeze(-1)
        return values.view(n, k)


Weight = Dense | GroupedInt
