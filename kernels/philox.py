"""Random numbers that are a pure function of (seed, position): the counter-based generator Philox4x32-10.

A request's k-th token is drawn with the number at counter k under its seed, whatever was drawn before it, beside it or by which
process. That is why a seeded request gives the same tokens alone, in a batch, and after a restart. Where drafts are accepted by
dice, a counter has further numbers: `draw` is a word of it.

Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3.
"""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to the two halves of the key after each round."""
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words for a counter of four words and a key of two."""
    a, b, c, d = counter
    left, right = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 32) ^ b ^ left, second & _WORD, (first >> 32) ^ d ^ right, first & _WORD
        left, right = (left + _WEYL[0]) & _WORD, (right + _WEYL[1]) & _WORD
    return a, b, c, d


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """The number in [0, 1) at `position`, a multiple of 2^-53. Of the seed, the lowest 64 bits count (of a negative one too)."""
    words = philox4x32((position & _WORD, position >> 32, draw, 0), (seed & _WORD, (seed >> 32) & _WORD))
    return ((words[0] >> 5) * (1 << 26) + (words[1] >> 6)) / (1 << 53)
