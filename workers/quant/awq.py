"""Integers of 4 bits as AWQ packs them for its matrix product (arXiv:2306.00978; version "gemm").

    qweight  [K, N / 8] I32: eight outputs in a word, in ORDER
    qzeros   [K / group, N / 8] I32: the same
    scales   [K / group, N] floats

value = (code - zero) * scale in float32.
"""

import numpy as np

from headrace.engine.checkpoint.quantization import Scheme
from headrace.kernels.weights import GroupedInt
from headrace.workers.quant.fields import PIECE_BYTES, as_codes
from headrace.workers.quant.layer import Layer, cut

CODES = "qweight"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight outputs each field of a word is, from the lowest bits on."""


def shape(layer: Layer, scheme: Scheme) -> tuple[int, int]:
    inputs, words = layer.matrix(CODES)
    return words * len(ORDER), inputs


def read(layer: Layer, scheme: Scheme, rows: slice | None, columns: slice | None) -> GroupedInt:
    whole = shape(layer, scheme)
    (outputs, inputs), group = whole, scheme.block[1] or whole[1]
    part = cut(layer, whole, group, rows, columns)
    words = outputs // len(ORDER)
    first, last = part.rows.start // len(ORDER), -(-part.rows.stop // len(ORDER))
    taken = slice(part.rows.start - first * len(ORDER), part.rows.stop - first * len(ORDER))
    scales = layer.floats("scales", (inputs // group, outputs)).T[part.rows, part.groups]
    zeros = _outputs(layer.read("qzeros", "I32", shape=(inputs // group, words))[part.groups, first:last])[taken]
    fields = _outputs(layer.read(CODES, "I32", shape=(inputs, words))[part.columns, first:last])[taken]
    codes, left = as_codes(fields, zeros, scheme.bits)
    return GroupedInt(codes, np.ascontiguousarray(scales), None, part.group, scheme.bits, left)


def _outputs(words: np.ndarray) -> np.ndarray:
    """The fields of int32 [K, W] as uint8 [8 W, K]."""
    fields = np.empty((words.shape[1], len(ORDER), words.shape[0]), np.uint8)
    step = max(1, PIECE_BYTES // (4 * len(words)))
    for left in range(0, len(fields), step):
        some = np.ascontiguousarray(words[:, left : left + step].T)
        for place, output in enumerate(ORDER):
            fields[left : left + step, output] = some >> 4 * place & 15
    return fields.reshape(-1, words.shape[0])
