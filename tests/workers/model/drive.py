"""Runs a decoder without scheduler or worker: each sequence owns a fixed set of pages, in an order that can be shuffled."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from headrace.kernels.ops import Backend, Batch
from headrace.kernels.select import make_backend
from headrace.workers.loader import Checkpoint
from headrace.workers.model.decoder import Decoder, load_decoder

KERNELS = ("reference", "cpu")
"""What every test of a model's numbers runs on."""


@dataclass(frozen=True)
class Loaded:
    backend: Backend
    decoder: Decoder


def backend_of(kind: str, threads: int | None = None) -> Backend:
    """The backend of one of KERNELS; skips the test where the native one is not built."""
    if kind == "cpu":
        pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
    return make_backend(kind, threads=threads)


def load(kernels: str, architecture: str, checkpoint: Checkpoint, context: int, threads: int | None = None) -> Loaded:
    backend = backend_of(kernels, threads)
    return Loaded(backend, load_decoder(architecture, checkpoint, backend, context))


class Drive:
    """Sequences numbered from 0, each with room for `room` tokens. `step` appends tokens to any of them in one flat batch."""

    def __init__(self, loaded: Loaded, sequences: int = 1, room: int = 320, page_size: int = 16, shuffle: int | None = None) -> None:
        self.page_size = page_size
        each = -(-room // page_size)
        numbers = list(range(sequences * each))
        if shuffle is not None:
            random.Random(shuffle).shuffle(numbers)
        self.pages = [numbers[i * each : (i + 1) * each] for i in range(sequences)]
        self.lengths = [0] * sequences
        decoder, backend = loaded.decoder, loaded.backend
        kv = backend.new_kv(len(decoder.layers), sequences * each, page_size, decoder.heads)
        self.program = backend.compile(decoder, kv)

    def step(self, work: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """Append each (sequence, tokens), in this order; the logits [tokens, V] of each."""
        ids, positions, slots, starts = [], [], [], [0]
        for sequence, tokens in work:
            begin = self.lengths[sequence]
            places = range(begin, begin + len(tokens))
            ids += tokens
            positions += places
            slots += [self.pages[sequence][p // self.page_size] * self.page_size + p % self.page_size for p in places]
            starts.append(len(ids))
            self.lengths[sequence] = begin + len(tokens)
        pages = int32([self.pages[sequence] for sequence, _ in work])
        batch = Batch(int32(ids), int32(positions), int32(slots), int32(starts), pages)
        logits = torch.tensor(np.asarray(self.program.run(batch, np.arange(len(ids), dtype=np.int32))))
        return list(logits.split([len(tokens) for _, tokens in work]))


def int32(values: list) -> np.ndarray:
    return np.array(values, np.int32)


def all_logits(loaded: Loaded, ids: list[int], **options) -> torch.Tensor:
    """Logits [len(ids), V] at every position of a text read at once."""
    return Drive(loaded, room=len(ids), **options).step([(0, ids)])[0]


def greedy(loaded: Loaded, ids: list[int], count: int) -> list[int]:
    """The `count` tokens that greedy decoding appends."""
    drive = Drive(loaded, room=len(ids) + count)
    fresh, out = ids, []
    for _ in range(count):
        fresh = [int(drive.step([(0, fresh)])[0][-1].argmax())]
        out += fresh
    return out
