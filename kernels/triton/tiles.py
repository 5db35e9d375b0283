"""Sizes of the tiles that the kernels work in: one readable table, the same for every batch. Measured on an H200.

A row of a result may depend, to the last bit, on nothing but its own inputs. So what fixes an order of additions (how K is walked and
split, how positions are) follows from the shape of the weight, or is a constant; only how many rows share a tile follows from the batch.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from triton.runtime import driver

KV_SPLIT = 256
"""Positions whose softmax is computed from nothing, before it is merged with the others' in order."""
QUERY_ROWS = 64
"""Rows (token, query head) of an attention tile: what a Hopper tensor core takes at least. Decoding fills few of them and waits for
memory all the same."""


K_BLOCK = 64
"""Inputs of a product that are multiplied at once: the order of its sum."""
PROGRAMS = 264
"""Programs that fill a large GPU twice: products of few outputs are split along K until there are about so many tiles of SPLIT_TILE."""
SPLIT_TILE = 64
MOST_SPLITS = 8
LEAST_SPLIT = 512
"""Inputs that are worth a split of their own."""
SPLIT_STEP = 128
"""A split is a multiple of this: of K_BLOCK, and of what integers are taken in at a time."""

Kind = Literal["floats", "float32", "grouped", "e4m3", "int8"]
"""How a product is computed: in `linear.py`, in 16 bits or in 32, in `grouped.py`, or in `scaled.py` in one of two types."""


@dataclass(frozen=True, slots=True)
class Rows:
    """How many tokens share a tile of a product with how many outputs, which are the rows of the tensor core's first operand, as weights
    come first here; and the means that takes."""

    tokens: int
    outputs: int
    warps: int
    stages: int
    """At most: no more than fit."""


@dataclass(frozen=True, slots=True)
class Positions:
    """How many positions attention reads at once, and the means that takes."""

    block: int
    warps: int
    stages: int


FEW_TOKENS = 16
SOME: dict[Kind, Rows] = {
    "floats": Rows(64, 64, 4, 4),
    "float32": Rows(64, 64, 4, 3),
    "grouped": Rows(64, 64, 4, 3),
    "e4m3": Rows(64, 128, 8, 4),
    "int8": Rows(64, 128, 8, 4),
}
EXPERT_TOKENS = FEW_TOKENS, 64
"""Rows of one expert in a tile, where experts have few each and where they have more: SOME of any kind has as many."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What kind of device it is that a tile must suit."""

    shared: int
    """KiB of shared memory that a block may take (CUDA C++ programming guide, table of compute capabilities; CDNA 3 instruction set
    architecture, local data share)."""
    positions: Positions
    few: Rows
    many: dict[Kind, Rows]
    unsplit: dict[Kind, Rows]
    """Where K is not split there is a sum less to hold, and room in registers for more tokens."""
    in_registers: int = 0
    """Stages that are on their way in registers, and take no shared memory."""


_MANY: dict[Kind, Rows] = {
    "floats": Rows(128, 128, 8, 4),
    "float32": Rows(64, 128, 8, 2),
    "grouped": Rows(64, 128, 8, 4),
    "e4m3": Rows(64, 128, 8, 4),
    "int8": Rows(128, 128, 8, 4),
}
_UNSPLIT: dict[Kind, Rows] = _MANY | {
    "floats": Rows(256, 128, 8, 3),
    "grouped": Rows(128, 128, 8, 4),
    "e4m3": Rows(128, 128, 8, 4),
    "int8": Rows(256, 128, 8, 3),
}
HOPPER = Generation(227, Positions(64, 4, 2), Rows(FEW_TOKENS, 128, 8, 4), _MANY, _UNSPLIT)
"""Its tiles have been measured; others' are what compiles for them without spilling registers. Here attention of prompts spills 72 bytes a
thread beside pages in bfloat16, 16 beside fp8. None with 32 positions, or with 128 rows, 8 warps and 3 stages: neither has been timed."""
_FEW = Rows(FEW_TOKENS, 128, 4, 4)
BLACKWELL = Generation(
    227,
    Positions(32, 4, 3),
    _FEW,
    _MANY | {"int8": Rows(64, 128, 8, 4)},
    _UNSPLIT | {"e4m3": Rows(64, 128, 8, 4), "int8": Rows(128, 128, 8, 4)},
)
AMPERE = Generation(
    163,
    Positions(32, 8, 2),
    _FEW,
    _MANY | {"int8": Rows(64, 128, 8, 4)},
    _UNSPLIT | {"grouped": Rows(64, 128, 8, 4), "int8": Rows(128, 128, 8, 4)},
)
ADA = replace(AMPERE, shared=99, few=Rows(FEW_TOKENS, 64, 4, 4), unsplit=AMPERE.unsplit | {"floats": Rows(128, 128, 8, 4)})
"""And small Blackwells, which multiply as it does."""
CDNA = Generation(
    64,
    Positions(32, 4, 2),
    _FEW,
    _MANY,
    _UNSPLIT | {"floats": Rows(128, 128, 8, 4), "int8": Rows(128, 128, 8, 4)},
    in_registers=1,
)

GENERATIONS = {80: AMPERE, 86: ADA, 87: AMPERE, 89: ADA, 90: HOPPER, 100: BLACKWELL, 103: BLACKWELL, 120: ADA, 121: ADA}
"""By NVIDIA's compute capability."""


def generation() -> Generation:
    """The present device's. The CPU is taken for the one on which tiles were measured."""
    target = driver.active.get_current_target()
    if target.backend == "hip":
        return CDNA
    return HOPPER if target.backend == "cpu" else GENERATIONS.get(target.arch, ADA)


def rows_of(tokens: int, kind: Kind, splits: int, inputs: int, weight_bytes: float, input_bytes: int) -> Rows:
    """The tile for a product of so many tokens. A stage holds so many `inputs` at a time, of as many bytes each in the weight and in x."""
    device = generation()
    if tokens <= FEW_TOKENS:
        rows = device.few
    elif tokens <= 2 * SOME[kind].tokens:
        rows = SOME[kind]
    else:
        rows = (device.unsplit if splits == 1 else device.many)[kind]
    stages = lambda rows: (  # noqa: E731
        int((device.shared << 10) / (inputs * (rows.outputs * weight_bytes + rows.tokens * input_bytes))) + device.in_registers
    )
    if rows.tokens > 128 and stages(rows) < rows.stages:
        rows = device.many[kind]
    return replace(rows, stages=max(1, min(rows.stages, stages(rows))))


def whole_of(tokens: int, splits: int) -> bool:
    """Whether one program adds up all splits of its tile: where there are many tokens, or nothing is split."""
    return splits == 1 or tokens > 2 * SOME["floats"].tokens


def split_of(outputs: int, inputs: int) -> int:
    """Inputs [K] of one split of a product: a multiple of SPLIT_STEP."""
    tiles = -(-outputs // SPLIT_TILE)
    splits = max(1, min(PROGRAMS // tiles, MOST_SPLITS, inputs // LEAST_SPLIT))
    return -(-inputs // (splits * SPLIT_STEP)) * SPLIT_STEP


def precision_of(dtype: torch.dtype) -> str:
    """How operands of a type are multiplied: float32 in three parts of 19 bits on NVIDIA's tensor cores, which is as good (and compiles in
    seconds, not minutes); AMD's multiply float32 themselves. Other types have no choice."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`: Triton's tiles have no other sizes."""
    return 1 << (size - 1).bit_length()
