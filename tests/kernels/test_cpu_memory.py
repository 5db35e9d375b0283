"""Memory for weights: pieces that do not overlap, from cache lines' boundaries on, and a file that is written in long pieces."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")

from headrace.kernels.cpu import store
from headrace.kernels.cpu.memory import HUGE, LINE, Memory


@given(st.lists(st.one_of(st.integers(1, 1000), st.integers(HUGE - 100, 40 << 20)), max_size=8))
def test_pieces_of_any_size_are_zeros_and_nobody_elses(sizes):
    memory = Memory()
    pieces = [memory.allocate(size) for size in sizes]
    assert [len(piece) for piece in pieces] == sizes
    for number, piece in enumerate(pieces, 1):
        assert piece.ctypes.data % LINE == 0
        assert not piece[:1].any() and not piece[-1:].any()
        piece[:1], piece[-1:] = number, number
    for number, piece in enumerate(pieces, 1):
        assert (piece[:1] == number).all() and (piece[-1:] == number).all()


def test_a_large_piece_begins_a_huge_page():
    memory = Memory()
    memory.allocate(1)
    assert memory.allocate(64 << 20).ctypes.data % HUGE == 0


class Raw(io.RawIOBase):
    """A file that remembers how long the pieces were that it was written in."""

    def __init__(self) -> None:
        self.pieces: list[int] = []

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.pieces.append(len(data))
        return len(data)


def test_the_file_is_written_in_whole_pieces_whatever_the_weights_are(monkeypatch):
    monkeypatch.setattr(store, "PIECE", 4 * store.ALIGN)
    raw = Raw()
    file = io.BufferedWriter(raw, store.PIECE)
    written = 0
    monkeypatch.setattr(raw, "tell", lambda: sum(raw.pieces))
    monkeypatch.setattr(raw, "seekable", lambda: True)
    for size in (1, store.PIECE + 5, 3 * store.PIECE, 17, store.ALIGN):
        begin = store._append(file, np.zeros(size, np.uint8))
        assert begin % store.ALIGN == 0 and begin >= written
        written = begin + size
    file.flush()
    assert all(piece == store.PIECE for piece in raw.pieces[:-1])
    assert sum(raw.pieces) == written
