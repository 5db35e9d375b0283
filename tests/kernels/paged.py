"""Flat batches over shuffled pages, for tests of attention and rope: what a worker's batch looks like, made from two lists."""

from dataclasses import dataclass, replace

import torch

from headrace.kernels.ops import Batch, HeadShape
from headrace.kernels.reference.step import TYPES, KVPages, StepTokens
from headrace.kernels.weights import Dense, GroupedInt, InputRounding, ScaledFloat, Weight


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(values: torch.Tensor) -> Dense:
    """A plain weight of these values, stored in their type."""
    return Dense(values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy())


def grouped_int(codes: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor | None, group: int, bits: int) -> GroupedInt:
    return GroupedInt(codes.numpy(), scales.numpy(), None if minimums is None else minimums.numpy(), group, bits)


def grouped(n: int, k: int, group: int, bits: int, low: int, minimum: bool) -> GroupedInt:
    """Codes low … low + 2^bits - 1, both ends among them."""
    codes = torch.randint(low, low + 2**bits, (n, k), generator=torch.Generator().manual_seed(n + k), dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = low, low + 2**bits - 1
    scales, minimums = random(n, k // group) / 2**bits, random(n, k // group, seed=1)
    return grouped_int(codes, scales, minimums if minimum else None, group, bits)


def with_zeros(outputs: int, inputs: int, group: int, bits: int, scales: torch.Tensor) -> GroupedInt:
    """Codes and zeros of all values that there are; `scales` [outputs, inputs / group]."""
    draw = torch.Generator().manual_seed(bits + group)
    low = 0 if bits == 4 else -128
    codes, zeros = (
        torch.randint(low, low + 2**bits, (outputs, count), generator=draw, dtype=torch.int16).to(torch.int8)
        for count in (inputs, inputs // group)
    )
    codes[0, 0], codes[-1, -1], zeros[-1, -1] = low, low + 2**bits - 1, low
    return GroupedInt(codes.numpy(), scales.numpy(), None, group, bits, zeros.numpy())


def scaled_float(
    outputs: int, inputs: int, block: tuple[int, int], scales: torch.Tensor, rounding: InputRounding | None = None
) -> ScaledFloat:
    """Float8 codes of every value that there is, NaN aside; `scales` for each block."""
    codes = torch.randint(0, 254, (outputs, inputs), generator=torch.Generator().manual_seed(inputs), dtype=torch.uint8)
    codes.view(-1)[: min(254, codes.numel())] = torch.arange(min(254, codes.numel()), dtype=torch.uint8)
    return ScaledFloat((codes + (codes >= 127)).numpy(), scales.numpy(), block, rounding)


def values_of(weight: Weight) -> torch.Tensor:
    """The weight in float32."""
    return torch.from_numpy(weight.dequantize())


@dataclass(frozen=True)
class Extents:
    """Where the tokens of a flat batch belong: `headrace.kernels.ops.Batch` without ids, as tensors."""

    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    pages: torch.Tensor
    parents: torch.Tensor | None = None

    def tokens(self) -> StepTokens:
        return StepTokens(torch.zeros_like(self.positions), self.positions, self.slots, self.query_start, self.pages, self.parents)

    def batch(self) -> Batch:
        arrays = (torch.zeros_like(self.positions), self.positions, self.slots, self.query_start, self.pages)
        return Batch(*(array.numpy() for array in arrays), None if self.parents is None else self.parents.numpy())


@dataclass(frozen=True)
class Paged:
    """Requests of so many tokens in all, the last `fresh` of each in the batch. What no token has been written to is NaN."""

    heads: HeadShape
    kv: KVPages
    extents: Extents

    @property
    def tokens(self) -> int:
        return self.extents.positions.shape[0]

    def query(self, seed: int = 7) -> torch.Tensor:
        return random(self.tokens, self.heads.query_heads * self.heads.dim, seed=seed)

    def part(self, request: int, first: int, last: int) -> tuple[slice, "Paged"]:
        """Rows first … last - 1 of one request as a batch of their own, and where they stand in this one."""
        e = self.extents
        begin = int(e.query_start[request])
        rows = slice(begin + first, begin + last)
        context = int(e.positions[rows.stop - 1]) + 1
        pages = e.pages[request : request + 1, : -(-context // self.kv.keys.shape[2])]
        extents = Extents(e.positions[rows].clone(), e.slots[rows].clone(), int32([0, last - first]), pages.contiguous())
        return rows, Paged(self.heads, self.kv, extents)

    def empty(self) -> KVPages:
        """Pages like this batch's with nothing in them yet."""
        return KVPages(torch.full_like(self.kv.keys, torch.nan), torch.full_like(self.kv.values, torch.nan))

    def stored(self, dtype: str) -> "Paged":
        """The same with its pages in one of `TYPES`."""
        pages, _, page_size, _ = self.kv.keys.shape
        kv = KVPages.new(pages, page_size, self.heads, torch.device("cpu"), TYPES[dtype])
        kv.write(*(x.transpose(1, 2).flatten(0, 1) for x in (self.kv.keys, self.kv.values)), torch.arange(pages * page_size))
        return replace(self, kv=kv)

    def sharing(self, of: int, prefixes: dict[int, int]) -> "Paged":
        """The same where requests see the first so many positions, whole pages, of another in that one's pages."""
        pages = self.extents.pages.clone()
        for request, positions in prefixes.items():
            count = positions // self.kv.keys.shape[2]
            pages[request, :count] = pages[of, :count]
        return replace(self, extents=replace(self.extents, pages=pages))

    def as_tree(self, request: int, parents: list[int]) -> "Paged":
        """The same with the rows of one request being a tree."""
        e = self.extents
        all_parents, positions = (
            torch.cat([torch.arange(-1, count - 1) for count in e.query_start.diff().tolist()]).int(),
            e.positions.clone(),
        )
        if e.parents is not None:
            all_parents = e.parents.clone()
        first = int(e.query_start[request])
        for row, parent in enumerate(parents):
            all_parents[first + row] = parent
            positions[first + row] = positions[first] if parent < 0 else positions[first + parent] + 1
        return replace(self, extents=replace(e, positions=positions, parents=all_parents))

    def path(self, request: int, row: int) -> "Paged":
        """A row of a tree as the last of a plain sequence, in pages where that lies in order."""
        e = self.extents
        first, page_size = int(e.query_start[request]), self.kv.keys.shape[2]
        nodes, node = [], row
        while node >= 0:
            nodes.insert(0, node)
            node = int(e.parents[first + node])
        base = int(e.positions[first])
        kv = replace(self.kv, keys=self.kv.keys.clone(), values=self.kv.values.clone())
        if kv.scales is not None:
            kv = replace(kv, scales=kv.scales.clone())

        def at(place: int) -> tuple[int, int]:
            return int(e.pages[request, place // page_size]), place % page_size

        for depth, node in enumerate(nodes):
            to, from_ = at(base + depth), at(base + node)
            for room, source in ((kv.keys, self.kv.keys), (kv.values, self.kv.values)):
                room[to[0], :, to[1]] = source[from_[0], :, from_[1]]
            if kv.scales is not None:
                kv.scales[to[0], :, :, to[1]] = self.kv.scales[from_[0], :, :, from_[1]]
        one = slice(first + row, first + row + 1)
        return Paged(self.heads, kv, Extents(e.positions[one], e.slots[one], int32([0, 1]), e.pages[request : request + 1]))


def paged(heads: HeadShape, page_size: int, contexts: list[int], fresh: list[int], seed: int = 0) -> Paged:
    widths = [-(-context // page_size) for context in contexts]
    order = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.zeros(len(contexts), max(*widths, 1), dtype=torch.int32)
    shape = (len(order), heads.kv_heads, page_size, heads.dim)
    kv = KVPages(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
    positions, slots, starts, used = [], [], [0], 0
    for request, (context, width, new) in enumerate(zip(contexts, widths, fresh, strict=True)):
        table[request, :width] = order[used : used + width]
        used += width
        places = torch.arange(context)
        pages, offsets = table[request].long()[places // page_size], places % page_size
        kv.keys[pages, :, offsets] = random(context, heads.kv_heads, heads.dim, seed=seed + 2 * request)
        kv.values[pages, :, offsets] = random(context, heads.kv_heads, heads.dim, seed=seed + 2 * request + 1)
        positions += places[context - new :].tolist()
        slots += (pages * page_size + offsets)[context - new :].tolist()
        starts.append(len(positions))
    return Paged(heads, kv, Extents(int32(positions), int32(slots), int32(starts), table))
