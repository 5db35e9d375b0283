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

    def dequantize(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight in float32 [N, K], written into `out` if given; otherwise it shares memory when it already is float32."""
        return self.values.float() if out is None else out.copy_(self.values)

    def take(self, rows: torch.Tensor) -> "Dense":
        """The given rows (integers [B]), copied."""
        return Dense(self.values.index_select(0, rows))

    def to(self, device: torch.device) -> "Dense":
        """The weight on `device`; shares memory when it already is there."""
        return Dense(self.values.to(device))


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

    def dequantize(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight in float32 [N, K], with one rounding for the product and one for the sum; written into `out` if given."""
        n, k = self.codes.shape
        if out is None:
            out = torch.empty(n, k, dtype=torch.float32, device=self.codes.device)
        grouped = out.unflatten(1, (k // self.group, self.group))
        torch.mul(self.codes.view(grouped.shape), self.scales.unsqueeze(-1), out=grouped)
        if self.minimums is not None:
            grouped += self.minimums.unsqueeze(-1)
        return out

    def take(self, rows: torch.Tensor) -> "GroupedInt":
        """The given rows (integers [B]), copied."""
        minimums = None if self.minimums is None else self.minimums.index_select(0, rows)
        return GroupedInt(self.codes.index_select(0, rows), self.scales.index_select(0, rows), minimums, self.group, self.bits)

    def to(self, device: torch.device) -> "GroupedInt":
        """The weight on `device`; shares memory when it already is there."""
        minimums = None if self.minimums is None else self.minimums.to(device)
        return GroupedInt(self.codes.to(device), self.scales.to(device), minimums, self.group, self.bits)


Weight = Dense | GroupedInt
