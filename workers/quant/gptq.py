"""Integers of 4 and 8 bits as GPTQ packs them (arXiv:2210.17323; the layout is AutoGPTQ's).

    qweight  [K * bits / 32, N] I32: inputs that follow each other in one word
    qzeros   [K / group, N * bits / 32] I32: outputs that follow each other in one word, less 1 save in the format gptq_v2
    scales   [K / group, N] floats           g_idx  [K] I32: the group of each input

value = (code - zero) * scale in float32. A zero is a field of so many bits after 1 was added to it, so that the largest becomes 0, as who
stored it had it. Inputs that are not in the order of their groups (desc_act) are refused.
"""

import numpy as np

from headrace.engine.checkpoint.quantization import Scheme
from headrace.engine.errors import UserError
from headrace.kernels.weights import GroupedInt
from headrace.workers.quant.fields import PIECE_BYTES, WORD, as_codes, unpacked
from headrace.workers.quant.layer import Layer, cut

CODES = "qweight"


def shape(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    words, outputs = layer.matrix(CODES)
    return outputs, words * WORD // scheme.bits


def read(layer: Layer, scheme: Scheme, rows: slice | None, columns: slice | None) -> GroupedInt:
    whole, bits = shape(layer, scheme), scheme.bits
    (outputs, inputs), group = whole, scheme.block[1] or whole[1]
    part = cut(layer, whole, group, rows, columns)
    _check_order(layer, inputs, group)
    scales = layer.floats("scales", (inputs // group, outputs)).T[part.rows, part.groups]
    zeros = unpacked(layer.read("qzeros", "I32", shape=(inputs // group, -(-outputs * bits // WORD))), bits)[:, :outputs]
    if scheme.zeros_less_one:
        zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
    words = layer.read(CODES, "I32", shape=layer.matrix(CODES))
    first, last = part.columns.start * bits // WORD, -(-part.columns.stop * bits // WORD)
    words, skipped = words[first:last, part.rows], part.columns.start - first * WORD // bits
    fields = np.empty(part.shape, np.uint8)
    step = max(1, PIECE_BYTES // (4 * len(words)))
    for top in range(0, len(fields), step):
        fields[top : top + step] = unpacked(words[:, top : top + step].T, bits)[:, skipped : skipped + fields.shape[1]]
    codes, left = as_codes(fields, zeros.T[part.rows, part.groups], bits)
    return GroupedInt(codes, np.ascontiguousarray(scales), None, part.group, bits, left)


def _check_order(layer: Layer, inputs: int, group: int) -> None:
    """Refuse inputs that are not in the order of their groups."""
    if "g_idx" in layer and np.any(layer.read("g_idx", "I32", shape=(inputs,)) != np.arange(inputs) // group):
        raise UserError(
            f"{layer.path}: tensor {layer.name + '.g_idx'!r} sorts inputs (desc_act=true), which is not supported: "
            "take one with desc_act=false, or a GGUF file"
        )
