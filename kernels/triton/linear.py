"""Linear layers: y = x W^T + b for weights of floats and of grouped integers.

    W [N, K]   floats, or codes with a scale (and a minimum) a group of inputs ─dequantize─▶ [outputs, K_BLOCK] ┐
    x [T, K]   ──────────────────────────────────────────────────────── transposed ───────▶ [K_BLOCK, tokens]  ┴▶ dot ─▶ [outputs, tokens]

The weight is the first operand, so that few tokens make a narrow product and not a mostly empty one. K is cut into splits by the shape of
the weight alone. Each is summed up from nothing, and the sums are added in order: by one program where there are many tokens, or by the
programs of the splits and one more kernel where there are few. Both give the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from headrace.kernels.triton.tiles import K_BLOCK, MANY, precision_of, rows_of, split_of
from headrace.kernels.weights import Dense, GroupedInt, ScaledFloat, Weight

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

REDUCE_BLOCK = 1024
HALF = K_BLOCK // 2


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A weight [N, K] on a device, for products and for look-ups of its rows."""

    values: torch.Tensor
    """Floats [N, K], codes int8 [N, K], or nibbles uint8 [N, K / 2]: of each K_BLOCK inputs the first half in the lower ones, the second
    half in the higher ones, so that a tile of bytes is two tiles of codes."""
    scales: torch.Tensor | None
    """float16 where that is exact, else float32: [N, K / group]. None for floats."""
    minimums: torch.Tensor | None
    bias: torch.Tensor | None
    """float32 [N]."""
    inputs: int
    group: int
    low: int
    """What is taken off a nibble to make it a code."""

    @property
    def outputs(self) -> int:
        return self.values.shape[0]

    @property
    def bits(self) -> int:
        """4, 8, or 0 for floats."""
        return 0 if self.scales is None else 4 if self.values.dtype == torch.uint8 else 8


def prepare(weights: Sequence[Weight], bias: np.ndarray | None, device: torch.device) -> list[DeviceWeight]:
    """The weights on the device, those of one form stacked along N. ValueError for unequal inputs or a bias of another size."""
    inputs, outputs = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
    if any(weight.shape[1] != inputs for weight in weights):
        raise ValueError(f"weights of {[weight.shape[1] for weight in weights]} inputs cannot be stacked")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"a bias of shape {bias.shape} does not fit {outputs} outputs")
    stacks: list[list[Dense | GroupedInt]] = []
    for weight in map(_known, weights):
        if stacks and _form(stacks[-1][0]) == _form(weight):
            stacks[-1].append(weight)
        else:
            stacks.append([weight])
    parts, begin = [], 0
    for stack in stacks:
        end = begin + sum(weight.shape[0] for weight in stack)
        parts.append(_stacked(stack, None if bias is None else bias[begin:end], device))
        begin = end
    return parts


def _known(weight: Weight) -> Dense | GroupedInt:
    """The weight, as floats where the kernels do not know its form."""
    if isinstance(weight, ScaledFloat) or (isinstance(weight, GroupedInt) and weight.zeros is not None):
        return Dense(weight.dequantize())
    return weight


def _form(weight: Dense | GroupedInt) -> tuple:
    if isinstance(weight, Dense):
        return (weight.dtype,)
    return weight.group, _nibbles_from(weight), weight.minimums is None


def _nibbles_from(weight: GroupedInt) -> int | None:
    """The lowest code, if all fit in 4 bits above it."""
    if weight.bits != 4 or weight.shape[1] % K_BLOCK:
        return None
    return 0 if weight.minimums is not None else -8


def _stacked(weights: Sequence[Dense | GroupedInt], bias: np.ndarray | None, device: torch.device) -> DeviceWeight:
    offsets = None if bias is None else torch.tensor(bias, dtype=torch.float32, device=device)
    first = weights[0]
    if isinstance(first, Dense):
        rows = [_floats(weight, device) for weight in weights if isinstance(weight, Dense)]
        values = torch.cat(rows) if len(rows) > 1 else rows[0]
        return DeviceWeight(values, None, None, offsets, first.shape[1], first.shape[1], 0)
    integers = [weight for weight in weights if isinstance(weight, GroupedInt)]
    low = _nibbles_from(first)
    codes = np.concatenate([weight.codes for weight in integers])
    if low is not None:
        halves = (codes - low).astype(np.uint8).reshape(len(codes), -1, 2, HALF)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)
    scales = _exact(np.concatenate([weight.scales for weight in integers]))
    minimums = None if first.minimums is None else _exact(np.concatenate([w.minimums for w in integers if w.minimums is not None]))
    return DeviceWeight(
        torch.from_numpy(codes).to(device),
        scales.to(device),
        None if minimums is None else minimums.to(device),
        offsets,
        first.shape[1],
        first.group,
        low or 0,
    )


def _floats(weight: Dense, device: torch.device) -> torch.Tensor:
    values = torch.from_numpy(
        np.require(weight.values.view(np.int16) if weight.values.dtype == np.uint16 else weight.values, requirements="CW")
    )
    return values.to(device).view(FLOATS[weight.dtype])


def _exact(values: np.ndarray) -> torch.Tensor:
    """float16 if that holds every value, else float32."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    return torch.from_numpy(halves if np.array_equal(halves.astype(np.float32), values) else np.ascontiguousarray(values, np.float32))


@triton.jit
def pair_at(scales, minimums, place, inside, MINIMUMS: tl.constexpr):
    """A scale and a minimum, or a scale twice where there is none."""
    factor = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
    if MINIMUMS:
        minimum = tl.load(minimums + place, mask=inside, other=0.0).to(tl.float32)
    else:
        minimum = factor
    return factor, minimum


@triton.jit
def pairs_from(scales, minimums, rows, k, K, inside, GROUP: tl.constexpr, HALF: tl.constexpr, MINIMUMS: tl.constexpr):
    """`pair_at` of the HALF inputs from k on, and of the HALF behind them: columns [outputs, 1] each."""
    place = rows * (K // GROUP)
    first = pair_at(scales, minimums, place + k // GROUP, inside & (k < K), MINIMUMS)
    second = pair_at(scales, minimums, place + (k + HALF) // GROUP, inside & (k + HALF < K), MINIMUMS)
    return first, second


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    X,
    W,
    scales,
    minimums,
    bias,
    Y,
    T,
    N,
    K,
    width,
    stride,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LOW: tl.constexpr,
    MINIMUMS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Y[t, n] of all splits (WHOLE), or of one, to Y [SPLITS, T, N]. `width` is what lies between rows of Y, `stride` of W."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    HALF: tl.constexpr = INPUTS // 2
    rows = outputs.to(tl.int64)[:, None]
    x_rows = X + tokens.to(tl.int64)[None, :] * K
    if WHOLE:
        first, last = 0, SPLITS
    else:
        first = tl.program_id(2)
        last = first + 1
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for split in range(first, last):
        acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
        if BITS != 0 and GROUP % HALF == 0:
            ahead = pairs_from(scales, minimums, rows, split * SPLIT, K, (outputs < N)[:, None], GROUP, HALF, MINIMUMS)
        for k in range(split * SPLIT, min(K, (split + 1) * SPLIT), INPUTS):
            if BITS == 0:
                columns = k + tl.arange(0, INPUTS)
                known = columns < (K if not EVEN else k + INPUTS)
                x = tl.load(x_rows + columns[:, None], mask=(tokens < T)[None, :] & known[:, None], other=0.0)
                w = tl.load(W + rows * stride + columns[None, :], mask=(outputs < N)[:, None] & known[None, :], other=0.0)
                if W.dtype.element_ty == tl.float16 and X.dtype.element_ty == tl.bfloat16:
                    # Activations may exceed what float16 holds.
                    w = w.to(tl.bfloat16)
                acc = tl.dot(w, x.to(w.dtype), acc, input_precision=PRECISION)
            else:
                if BITS == 4:
                    packed = tl.load(W + rows * stride + (k // 2 + tl.arange(0, HALF))[None, :], mask=(outputs < N)[:, None], other=0).to(
                        tl.int32
                    )
                for half in tl.static_range(2):
                    columns = k + half * HALF + tl.arange(0, HALF)
                    known = columns < (K if not EVEN else k + INPUTS)
                    inside = (outputs < N)[:, None] & known[None, :]
                    x = tl.load(x_rows + columns[:, None], mask=(tokens < T)[None, :] & known[:, None], other=0.0)
                    if BITS == 4:
                        code = (packed >> (4 * half) & 15) + LOW
                    else:
                        code = tl.load(W + rows * stride + columns[None, :], mask=inside, other=0).to(tl.int32)
                    if GROUP % HALF == 0:
                        factor, minimum = ahead[half]
                    else:
                        place = rows * (K // GROUP) + columns[None, :] // GROUP
                        factor, minimum = pair_at(scales, minimums, place, inside, MINIMUMS)
                    w = code.to(tl.float32) * factor
                    if MINIMUMS:
                        w += minimum
                    acc = tl.dot(w.to(x.dtype), x, acc, input_precision=PRECISION)
                if GROUP % HALF == 0:
                    # The next ones are on their way while the products go on.
                    ahead = pairs_from(scales, minimums, rows, k + INPUTS, K, (outputs < N)[:, None], GROUP, HALF, MINIMUMS)
        total += acc
    inside = (outputs < N)[:, None] & (tokens < T)[None, :]
    y_rows = tokens.to(tl.int64)[None, :]
    if WHOLE:
        if BIAS:
            total += tl.load(bias + outputs, mask=outputs < N, other=0.0)[:, None]
        tl.store(Y + y_rows * width + outputs[:, None], total.to(Y.dtype.element_ty), mask=inside)
    else:
        tl.store(Y + (first.to(tl.int64) * T + y_rows) * N + outputs[:, None], total, mask=inside)


@triton.jit(do_not_specialize=["T"])
def add_splits_kernel(partial, bias, Y, T, N, width, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Y[t, n] = 0 + partial[0, t, n] + partial[1, t, n] + … in this order."""
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < N
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + (split * T.to(tl.int64) + token) * N + outputs, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + outputs, mask=inside, other=0.0)
    tl.store(Y + token * width + outputs, total.to(Y.dtype.element_ty), mask=inside)


def linear(x: torch.Tensor, parts: Sequence[DeviceWeight], out: torch.dtype) -> torch.Tensor:
    """x [T, K], contiguous, times the stacked weights [N, K] transposed, plus their biases: [T, N] of type `out`."""
    tokens, width = x.shape[0], sum(part.outputs for part in parts)
    y = torch.empty(tokens, width, dtype=out, device=x.device)
    begin = 0
    for part in parts:
        if tokens:
            _one(x, part, y[:, begin:], width)
        begin += part.outputs
    return y


def _one(x: torch.Tensor, w: DeviceWeight, y: torch.Tensor, width: int) -> None:
    tokens, inputs, outputs = x.shape[0], w.inputs, w.outputs
    rows, split = rows_of(tokens), split_of(outputs, inputs)
    splits = -(-inputs // split)
    whole = splits == 1 or rows is MANY
    grid = (triton.cdiv(outputs, rows.outputs), triton.cdiv(tokens, rows.tokens), 1 if whole else splits)
    target = y if whole else torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    linear_kernel[grid](
        x,
        w.values,
        w.scales,
        w.minimums,
        w.bias,
        target,
        tokens,
        outputs,
        inputs,
        width,
        w.values.shape[1],
        SPLIT=split,
        SPLITS=splits,
        WHOLE=whole,
        BITS=w.bits,
        GROUP=w.group,
        LOW=w.low,
        MINIMUMS=w.minimums is not None,
        BIAS=w.bias is not None,
        EVEN=inputs % K_BLOCK == 0,
        PRECISION=precision_of(x.dtype if w.bits else w.values.dtype),
        TOKENS=rows.tokens,
        OUTPUTS=rows.outputs,
        INPUTS=K_BLOCK,
        num_warps=rows.warps,
        num_stages=rows.stages,
    )
    if not whole:
        grid = (tokens, triton.cdiv(outputs, REDUCE_BLOCK))
        add_splits_kernel[grid](target, w.bias, y, tokens, outputs, width, SPLITS=splits, BIAS=w.bias is not None, BLOCK=REDUCE_BLOCK)
