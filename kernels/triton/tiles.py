"""Sizes of the tiles that the kernels work in: one readable table, the same for every batch.

A row of a result may depend, to the last bit, on nothing but its own inputs. So what fixes an order of additions (how K is walked and
split, how positions are) follows from the shape of the weight, or is a constant; only how many rows share a tile follows from the batch.
"""

from dataclasses import dataclass

import torch

KV_SPLIT = 256
"""Positions whose softmax is computed from nothing, before it is merged with the others' in order."""
KV_BLOCK = 64
"""Positions read at once."""
QUERY_ROWS = 64
"""Rows (token, query head) of an attention tile: what a Hopper tensor core takes at least. Decoding fills few of them and waits for
memory all the same."""

K_BLOCK = 64
"""Inputs of a product that are multiplied at once: the order of its sum."""
PROGRAMS = 264
"""Programs that fill a large GPU twice: products of few outputs are split along K until there are about so many."""
MOST_SPLITS = 8
LEAST_SPLIT = 512
"""Inputs that are worth a split of their own."""
SPLIT_STEP = 128
"""A split is a multiple of this: of K_BLOCK, and of what integers are taken in at a time."""


@dataclass(frozen=True, slots=True)
class Rows:
    """How many tokens share a tile of a product with how many outputs, which are the rows of the tensor core's first operand, as weights
    come first here; and the means that takes."""

    tokens: int
    outputs: int
    warps: int
    stages: int


FEW = Rows(16, 64, 4, 5)
SOME = Rows(64, 64, 4, 4)
MANY = Rows(128, 128, 8, 3)


def rows_of(tokens: int) -> Rows:
    """The tile for a product of so many tokens."""
    return FEW if tokens <= FEW.tokens else SOME if tokens <= 2 * SOME.tokens else MANY


def split_of(outputs: int, inputs: int) -> int:
    """Inputs [K] of one split of a product: a multiple of SPLIT_STEP."""
    tiles = -(-outputs // FEW.outputs)
    splits = max(1, min(PROGRAMS // tiles, MOST_SPLITS, inputs // LEAST_SPLIT))
    return -(-inputs // (splits * SPLIT_STEP)) * SPLIT_STEP


def precision_of(dtype: torch.dtype) -> str:
    """How operands of a type are multiplied: float32 in three parts of 19 bits on NVIDIA's tensor cores, which is as good (and compiles in
    seconds, not minutes); AMD's multiply float32 themselves. Other types have no choice."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`: Triton's tiles have no other sizes."""
    return 1 << (size - 1).bit_length()
