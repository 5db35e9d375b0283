"""Integers of 4 and 8 bits as compressed-tensors packs them (pack-quantized), every field half of its range above its value.

    weight_packed      [N, K * bits / 32] I32: inputs that follow each other in one word     weight_shape  [2]: N, K
    weight_scale       [N, K / group], [N, 1] or one float
    weight_zero_point  [N * bits / 32, K / group] I32: outputs that follow each other in one word; or I8, a byte each

value = (code - zero) * scale in float32, whatever the type of the scales.
"""

import numpy as np

from headrace.engine.checkpoint.quantization import Scheme
from headrace.engine.errors import UserError
from headrace.kernels.weights import GroupedInt
from headrace.workers.quant.fields import PIECE_BYTES, WORD, as_codes, unpacked
from headrace.workers.quant.layer import Layer, cut

CODES = "weight_packed"


def shape(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    outputs, inputs = (int(size) for size in layer.read("weight_shape", "I64", "I32", shape=(2,)))
    words = layer.matrix(CODES)
    if min(outputs, inputs) < 1 or words != (outputs, -(-inputs * scheme.bits // WORD)):
        raise layer.fault(
            "weight_shape", f"says [{outputs}, {inputs}], which {list(words)} words of {scheme.bits}-bit integers do not hold"
        )
    return outputs, inputs


def read(layer: Layer, scheme: Scheme, rows: slice | None, columns: slice | None) -> GroupedInt:
    whole, bits, group = shape(layer, scheme), scheme.bits, scheme.block[1]
    _check_order(layer, whole[1], group)
    part = cut(layer, whole, group, rows, columns)
    groups = whole[1] // (group or whole[1])
    stored = (whole[0] if scheme.block[0] else 1, groups)
    scales = np.broadcast_to(layer.floats(layer.called(*scheme.scales), stored), (whole[0], groups))[part.rows, part.groups]
    words = layer.read(CODES, "I32", shape=layer.matrix(CODES))
    first, last = part.columns.start * bits // WORD, -(-part.columns.stop * bits // WORD)
    words, skipped = words[part.rows, first:last], part.columns.start - first * WORD // bits
    fields = np.empty(part.shape, np.uint8)
    step = max(1, PIECE_BYTES // (4 * words.shape[1]))
    for top in range(0, len(fields), step):
        fields[top : top + step] = unpacked(words[top : top + step], bits)[:, skipped : skipped + fields.shape[1]]
    codes, zeros = as_codes(fields, _zeros(layer, scheme, whole[0], groups)[part.rows, part.groups], bits)
    return GroupedInt(codes, np.ascontiguousarray(scales), None, part.group, bits, zeros, layer.inputs(scheme))


def _zeros(layer: Layer, scheme: Scheme, outputs: int, groups: int) -> np.ndarray:
    """What fields are less, uint8 [N, groups]."""
    middle = np.uint8(1 << scheme.bits - 1)
    if scheme.symmetric:
        return np.full((outputs, groups), middle)
    stored, name = (outputs if scheme.block[0] else 1), "weight_zero_point"
    if layer.stored(name).dtype == "I8":
        fields = layer.read(name, "I8", shape=(stored, groups)).view(np.uint8) + middle
    else:
        words = layer.read(name, "I32", "I8", shape=(-(-stored * scheme.bits // WORD), groups))
        fields = unpacked(words.T, scheme.bits)[:, :stored].T
    return np.broadcast_to(fields, (outputs, groups))


def _check_order(layer: Layer, inputs: int, group: int | None) -> None:
    """Refuse inputs that are not in the order of their groups."""
    if "weight_g_idx" in layer and group is not None:
        order = layer.read("weight_g_idx", "I32", "I64", shape=(inputs,))
        if np.any(order != np.arange(inputs) // group) and np.any(order != -1):
            raise UserError(
                f"{layer.path}: tensor {layer.name + '.weight_g_idx'!r} sorts inputs (actorder=group), which is not supported: "
                "quantize with actorder=weight, or take a GGUF file"
            )
