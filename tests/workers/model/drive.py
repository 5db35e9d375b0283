"""Runs a decoder without scheduler or worker: each sequence owns a fixed set of pages, in an order that can be shuffled."""

import random

import pytest
import torch

from headrace.kernels.ops import Extents, Ops
from headrace.kernels.select import make_ops
from headrace.workers.model.decoder import Decoder

KERNELS = ("reference", "cpu")
"""What every test of a model's numbers runs on."""


def ops_of(kind: str, threads: int | None = None) -> Ops:
    """The ops of one of KERNELS; skips the test where the native ones are not built."""
    if kind == "cpu":
        pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
    return make_ops(kind, threads=threads)


class Drive:
    """Sequences numbered from 0, each with room for `room` tokens. `step` appends tokens to any of them in one flat batch."""

    def __init__(self, decoder: Decoder, sequences: int = 1, room: int = 320, page_size: int = 16, shuffle: int | None = None) -> None:
        self.decoder, self.page_size = decoder, page_size
        each = -(-room // page_size)
        numbers = list(range(sequences * each))
        if shuffle is not None:
            random.Random(shuffle).shuffle(numbers)
        self.pages = [numbers[i * each : (i + 1) * each] for i in range(sequences)]
        self.lengths = [0] * sequences
        self.kv = decoder.new_kv(sequences * each, page_size)

    def step(self, work: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """Append each (sequence, tokens), in this order; the hidden states [tokens, H] of each."""
        ids, positions, slots, starts, context = [], [], [], [0], []
        for sequence, tokens in work:
            begin = self.lengths[sequence]
            places = range(begin, begin + len(tokens))
            ids += tokens
            positions += places
            slots += [self.pages[sequence][p // self.page_size] * self.page_size + p % self.page_size for p in places]
            starts.append(len(ids))
            context.append(begin + len(tokens))
            self.lengths[sequence] = begin + len(tokens)
        extents = Extents(
            int32(positions), int32(slots), int32(starts), int32(context), int32([self.pages[sequence] for sequence, _ in work])
        )
        hidden = self.decoder.forward(int32(ids), extents, self.kv)
        return list(hidden.split([len(tokens) for _, tokens in work]))


def int32(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def all_logits(decoder: Decoder, ids: list[int], **options) -> torch.Tensor:
    """Logits [len(ids), V] at every position of a text read at once."""
    return decoder.logits(Drive(decoder, room=len(ids), **options).step([(0, ids)])[0])


def greedy(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    """The `count` tokens that greedy decoding appends."""
    drive = Drive(decoder, room=len(ids) + count)
    fresh, out = ids, []
    for _ in range(count):
        fresh = [int(decoder.logits(drive.step([(0, fresh)])[0][-1:]).argmax())]
        out += fresh
    return out
