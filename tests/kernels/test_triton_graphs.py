"""Decode steps as graphs, with a stand-in for the few calls of torch.cuda: what a graph reads, and that it is captured once a size."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")

from headrace.kernels.ops import Batch
from headrace.kernels.triton import graphs
from headrace.kernels.triton.step import StepTokens
from headrace.kernels.triton.tiles import KV_SPLIT

PAGE_SIZE = 16


class Card:
    """A stand-in for the device: a captured graph computes again what was computed while it was captured."""

    def __init__(self) -> None:
        self.seen: list[StepTokens] = []
        self.replays = 0
        self.order: list[str] = []
        self._work: list = []

    def whole(self, tokens: StepTokens) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """States that tell everything a row was given."""
        self.seen.append(tokens)
        rows = torch.cat([x.view(len(tokens.ids), -1) for x in (tokens.ids, tokens.positions, tokens.slots, tokens.pages)], 1).float()
        tiles = tokens.tiles(4).table.float()
        if self._work and self._work[-1] is None:
            self._work[-1] = (tokens, rows, tiles)
        return (rows,), tiles

    @contextmanager
    def capture(self, graph: "Card.Graph", pool: object):
        self._work.append(None)
        yield
        graph.work = self._work.pop()

    class Graph:
        def __init__(self, card: "Card") -> None:
            self.card, self.work = card, None

        def replay(self) -> None:
            tokens, rows, tiles = self.work
            self.card.replays += 1
            (fresh_rows,), fresh_tiles = self.card.whole(tokens)
            rows.copy_(fresh_rows)
            tiles.copy_(fresh_tiles)


@pytest.fixture
def card(monkeypatch) -> Card:
    card = Card()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        graph_pool_handle=lambda: 0,
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=lambda one: nullcontext(),
        CUDAGraph=lambda: Card.Graph(card),
        Event=lambda: SimpleNamespace(record=lambda: card.order.append("copied"), synchronize=lambda: card.order.append("waited")),
        graph=card.capture,
    )
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    monkeypatch.setattr(graphs, "pinned", lambda size: torch.zeros(size, dtype=torch.int32))
    return card


def batch(positions: list[int], width: int) -> Batch:
    count = len(positions)
    pages = np.arange(1, count * width + 1, dtype=np.int32).reshape(count, width)
    numbers = np.arange(count, dtype=np.int32)
    slots = np.array([pages[r, p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for r, p in enumerate(positions)], np.int32)
    return Batch(numbers + 100, np.array(positions, np.int32), slots, np.arange(count + 1, dtype=np.int32), pages)


def test_rows_of_a_graph_are_those_of_the_step_and_the_rest_have_no_slot_and_no_tile(card):
    made = graphs.Graphs(card.whole, torch.device("cpu"), PAGE_SIZE)
    step = batch([3, 40, 20], 3)
    (rows,), tiles = made.replay(step)
    assert rows[:, :3].tolist() == [[100, 3, step.slots[0]], [101, 40, step.slots[1]], [102, 20, step.slots[2]]]
    assert rows[:, 3:6].tolist() == step.pages.tolist()
    assert tiles.tolist() == [[0, 0, 1], [1, 1, 2], [2, 2, 3]]
    tokens = card.seen[-1]
    assert (tokens.slots[3:].tolist(), tokens.tiles(1).table[3:].tolist()) == ([-1], [[0, 0, 0]])


def test_a_smaller_step_leaves_nothing_of_the_one_before_it(card):
    made = graphs.Graphs(card.whole, torch.device("cpu"), PAGE_SIZE)
    made.replay(batch([3, 40, 20, 7], 3))
    made.replay(batch([5, 6, 9], 1))
    tokens = card.seen[-1]
    assert tokens.slots.tolist()[3] == -1
    assert tokens.tiles(1).table.tolist() == [[0, 0, 1], [1, 1, 2], [2, 2, 3], [0, 0, 0]]


def test_a_graph_is_captured_once_for_each_size_and_reach(card):
    made = graphs.Graphs(card.whole, torch.device("cpu"), PAGE_SIZE)
    for rows, last in ((3, 5), (4, 9), (4, KV_SPLIT), (4, 3 * KV_SPLIT), (5, 1)):
        made.replay(batch([last] * rows, last // PAGE_SIZE + 1))
    # 4 rows of 1, 2 and 4 splits, and 8 rows of 1: two runs each, before and while it is captured.
    assert (len(card.seen) - card.replays, card.replays) == (8, 5)


def test_only_steps_of_single_tokens_are_graphs():
    one = batch([1, 2], 1)
    assert graphs.Graphs.fits(one)
    prompt = Batch(one.ids, one.positions, one.slots, np.array([0, 2], np.int32), one.pages[:1])
    assert not graphs.Graphs.fits(prompt)
    tree = Batch(one.ids, one.positions, one.slots, one.query_start, one.pages, np.array([-1, -1], np.int32))
    assert not graphs.Graphs.fits(tree)


def test_what_the_device_may_still_read_is_waited_for_before_it_is_overwritten(card):
    made = graphs.Graphs(card.whole, torch.device("cpu"), PAGE_SIZE)
    made.replay(batch([3], 1))
    made.replay(batch([4], 1))
    assert card.order == ["waited", "copied"] * 2
