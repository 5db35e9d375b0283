"""Float8 and int8 weights stored as they are, beside their scales: the methods fp8, compressed-tensors, and bitsandbytes.

    weight        [N, K] F8_E4M3 │ I8       weight_zero_point  like the scales, I8, where integers have zeros
    weight_scale  one, [N, 1], [N, K / group] or [N / block, K / block] floats; also called weight_scale_inv
    input_scale   one float, where the scale of inputs is static; also called activation_scale

value = code * scale, or (code - zero) * scale, in float32, whatever the type of the scales. SCB of bitsandbytes is 127 times the scale.
(LLM.int8() itself also keeps inputs above a threshold out of 8 bits, which is no matter of the weights.) Codes stay in the mapped file.
"""

import numpy as np

from headrace.engine.checkpoint.quantization import Scheme
from headrace.kernels.weights import GroupedInt, ScaledFloat, Weight
from headrace.workers.quant.layer import Layer, cut

CODES = "weight"


def shape(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    return layer.matrix(CODES)


def read(layer: Layer, scheme: Scheme, rows: slice | None, columns: slice | None) -> Weight:
    whole = layer.matrix(CODES)
    if scheme.kind == "float":
        return _floats(layer, scheme, whole, rows, columns)
    group = scheme.block[1]
    part = cut(layer, whole, group, rows, columns)
    codes = layer.read(CODES, "I8", shape=whole)[part.rows, part.columns]
    stored = (whole[0] if scheme.block[0] else 1, whole[1] // (group or whole[1]))
    spread = (whole[0], stored[1])
    if "weight_format" in layer and (order := layer.read("weight_format", "U8", shape=())) != 0:
        raise layer.fault("weight_format", f"is {order}, an order of codes made for one kind of GPU, where 0 (rows) is expected")
    scales = layer.floats(layer.called(*scheme.scales), stored) / np.float32(scheme.multiplied)
    scales = np.broadcast_to(scales, spread)[part.rows, part.groups]
    zeros = None
    if not scheme.symmetric:
        zeros = np.broadcast_to(layer.read("weight_zero_point", "I8", shape=stored), spread)[part.rows, part.groups]
    contiguous = np.ascontiguousarray
    return GroupedInt(codes, contiguous(scales), None, part.group, 8, None if zeros is None else contiguous(zeros), layer.inputs(scheme))


def _floats(layer: Layer, scheme: Scheme, whole: tuple[int, int], rows: slice | None, columns: slice | None) -> ScaledFloat:
    block = (scheme.block[0] or whole[0], scheme.block[1] or whole[1])
    scales = layer.floats(layer.called(*scheme.scales), (-(-whole[0] // block[0]), -(-whole[1] // block[1])))
    codes = layer.read(CODES, "F8_E4M3", shape=whole)
    part = cut(layer, whole, block[1], rows, columns, ragged=True)
    if part.rows.start % block[0]:  # Through a block of outputs, which each can have a scale of its own.
        scales, block = scales[np.arange(part.rows.start, part.rows.stop) // block[0]], (1, block[1])
    else:
        scales = scales[part.rows.start // block[0] : -(-part.rows.stop // block[0])]
    block = (min(block[0], part.shape[0]), min(block[1], part.shape[1]))
    return ScaledFloat(codes[part.rows, part.columns], np.ascontiguousarray(scales[:, part.groups]), block, layer.inputs(scheme))
