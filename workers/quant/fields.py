"""Integers of 4 and 8 bits out of the words of 32 that hold them, the first in the lowest bits: what packed formats share."""

import numpy as np

WORD = 32
PIECE_BYTES = 192 * 1024
"""Packed bytes unpacked at a time: with the codes they become, about what a core's second-level cache holds."""


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The fields along the last dimension of int32 [..., W]: uint8 [..., W * 32 / bits]."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return octets
    pairs = octets.astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)


def centred(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields less half of what they can count, as int8."""
    return (fields - np.uint8(1 << bits - 1)).view(np.int8)


def as_codes(fields: np.ndarray, zeros: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 codes [N, K] and zeros [N, groups] of so many bits as `GroupedInt` has them: zeros in the middle are folded into the codes;
    besides, those of 4 bits stay unsigned, and of 8 bits both lose 128."""
    if np.all(zeros == 1 << bits - 1):
        return centred(fields, bits), None
    if bits == 4:
        return fields.view(np.int8), np.ascontiguousarray(zeros).view(np.int8)
    return centred(fields, bits), centred(np.ascontiguousarray(zeros), bits)
