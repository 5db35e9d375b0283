"""Keys and values that are moved: from place to place in their pages, and out of them and into others, bit for bit in every backend."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from headrace.kernels.kv_rows import KVRows
from headrace.kernels.ops import HeadShape
from headrace.kernels.reference import ReferenceBackend
from headrace.kernels.reference.step import LARGEST, TYPES

LAYERS, PAGES, PAGE = 3, 5, 8
HEADS = HeadShape(4, 2, 12)
NATIVE = ("f32", "f16", "int8")
EVERY = [(name, kind) for name in ("reference", "cpu", "triton") for kind in (NATIVE if name == "cpu" else TYPES)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backend_of(name: str):
    if name == "reference":
        return ReferenceBackend()
    if name == "cpu":
        return pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built").CpuBackend(1)
    pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
    from headrace.kernels.triton import TritonBackend

    return TritonBackend(DEVICE)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass
class Moved:
    """Pages of a backend, in which every byte is of its own kind: what stands where after a move is known."""

    backend: object
    kv: list
    kind: str

    @classmethod
    def of(cls, name: str, kind: str) -> "Moved":
        backend = backend_of(name)
        made = cls(backend, backend.new_kv(LAYERS, PAGES, PAGE, HEADS, kind), kind)
        made.backend.scatter_kv(made.kv, np.arange(PAGES, dtype=np.int32), made.rows(1))
        return made

    def rows(self, seed: int) -> KVRows:
        """Any bits there are for all pages, as this backend has arrays."""
        return on(self.backend, rows_of(PAGES * PAGE, self.kind, seed))

    def all(self) -> list[torch.Tensor]:
        """Bytes by slot, layer and head: keys, values, scales."""
        return bits(self.backend.gather_kv(self.kv, np.arange(PAGES, dtype=np.int32)))


def rows_of(positions: int, kind: str, seed: int) -> KVRows:
    dice = torch.Generator().manual_seed(seed)
    dtype = TYPES[kind]
    shape = (positions, LAYERS, HEADS.kv_heads, HEADS.dim)
    keys, values = (
        torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=dice, dtype=torch.uint8).view(dtype) for _ in range(2)
    )
    scales = torch.rand(*shape[:-1], 2, generator=dice) if dtype in LARGEST else None
    return KVRows(keys, values, scales)


def on(backend, rows: KVRows) -> KVRows:
    """The rows as the backend has arrays."""
    to = (lambda x: x.numpy()) if backend.name == "cpu" else (lambda x: x.to(backend.device))
    return KVRows(*(None if x is None else to(x) for x in arrays_of(rows)))


def bits(rows: KVRows) -> list[torch.Tensor]:
    arrays = [rows.keys, rows.values] + ([] if rows.scales is None else [rows.scales])
    return [torch.as_tensor(array).cpu().contiguous().view(torch.uint8) for array in arrays]


def strided(x):
    """The same array, with other memory between its rows."""
    wide = torch.as_tensor(x).repeat_interleave(2, 0)
    return wide.numpy()[::2] if isinstance(x, np.ndarray) else wide[::2]


def arrays_of(rows: KVRows) -> list:
    return [rows.keys, rows.values, rows.scales]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(*pair) for pair in zip(a, b, strict=True))


MOVES = {
    "none": ([], []),
    "one": ([3], [20]),
    "the accepted rows of a tree, over the end of a page": ([6, 9, 10, 14], [6, 7, 8, 9]),
    "backwards over themselves": ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7]),
    "places exchanged": ([5, 17, 30, 39], [17, 5, 39, 30]),
    "one to several": ([11, 11, 12], [12, 13, 11]),
}


@pytest.mark.parametrize(("name", "kind"), EVERY)
@pytest.mark.parametrize("move", MOVES)
def test_positions_move_as_if_all_were_read_before_any_is_written(name, kind, move):
    moved = Moved.of(name, kind)
    from_, to = MOVES[move]
    expected = moved.all()
    before = [array.clone() for array in expected]
    for array, old in zip(expected, before, strict=True):
        array[to] = old[from_]
    moved.backend.copy_kv(moved.kv, int32(*from_), int32(*to))
    assert same(moved.all(), expected)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_pages_go_to_other_pages_of_another_and_nothing_else_is_touched(name, kind):
    moved, other = Moved.of(name, kind), Moved.of(name, kind)
    moved.backend.scatter_kv(moved.kv, np.arange(PAGES, dtype=np.int32), moved.rows(2))
    expected, new = other.all(), moved.all()
    for page, into in ((4, 0), (1, 3)):
        for array, from_ in zip(expected, new, strict=True):
            array[into * PAGE : into * PAGE + PAGE] = from_[page * PAGE : page * PAGE + PAGE]
    other.backend.scatter_kv(other.kv, int32(0, 3), moved.backend.gather_kv(moved.kv, int32(4, 1)))
    assert same(other.all(), expected)
    # Rows that do not lie one behind the other.
    apart = KVRows(*(None if x is None else strided(x) for x in arrays_of(moved.backend.gather_kv(moved.kv, int32(4, 1)))))
    other.backend.scatter_kv(other.kv, int32(0, 3), apart)
    assert same(other.all(), expected)
    other.backend.scatter_kv(other.kv, int32(), moved.backend.gather_kv(moved.kv, int32()))
    assert same(other.all(), expected)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_backends_lay_out_what_they_gather_alike(name, kind):
    native, reference = Moved.of(name, kind), Moved.of("reference", kind)
    assert same(native.all(), reference.all())
    rows = native.backend.gather_kv(native.kv, int32(2, 0))
    assert all(torch.as_tensor(x).is_contiguous() for x in arrays_of(rows) if x is not None)
    assert tuple(rows.keys.shape) == (2 * PAGE, LAYERS, HEADS.kv_heads, HEADS.dim)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_gathered_pages_may_go_to_pages_of_another_size(name):
    moved = Moved.of(name, "int8")
    other = moved.backend.new_kv(LAYERS, 3, 2 * PAGE, HEADS, "int8")
    moved.backend.scatter_kv(other, int32(2), moved.backend.gather_kv(moved.kv, int32(3, 1)))
    expected = [array[[*range(3 * PAGE, 4 * PAGE), *range(PAGE, 2 * PAGE)]] for array in moved.all()]
    assert same(bits(moved.backend.gather_kv(other, int32(2))), expected)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_what_is_not_there_or_twice_or_of_another_shape_is_refused(name):
    moved = Moved.of(name, "int8")
    copy, gather, scatter = (getattr(moved.backend, op) for op in ("copy_kv", "gather_kv", "scatter_kv"))
    before = moved.all()
    rows = moved.backend.gather_kv(moved.kv, int32(0))
    for call, words in [
        (lambda: copy(moved.kv, int32(0, 40), int32(1, 2)), "from_slots from 0 to 40: they must be from 0 to 39"),
        (lambda: copy(moved.kv, int32(0, 1), int32(1, -1)), "to_slots from -1 to 1"),
        (lambda: copy(moved.kv, int32(0, 1), int32(2, 2)), "to_slots name 2 more than once"),
        (lambda: copy(moved.kv, int32(0, 1), int32(2)), r"from_slots \[2\] and to_slots \[1\]"),
        (lambda: copy(moved.kv, np.array([0]), np.array([1])), "from_slots must be int32 of one dimension, it is int64"),
        (lambda: gather(moved.kv, int32(5)), "pages from 5 to 5: they must be from 0 to 4"),
        (lambda: gather(moved.kv, np.zeros((1, 1), np.int32)), "pages must be int32 of one dimension"),
        (lambda: scatter(moved.kv, int32(1, 1), rows), "pages name 1 more than once"),
        (lambda: scatter(moved.kv, int32(1, 2), rows), r"keys \[8, 3, 2, 12\] of \S+: these pages take \[16, 3, 2, 12\]"),
        (lambda: scatter(moved.kv, int32(1), KVRows(rows.keys, rows.values, None)), "rows without scales, for pages with"),
        (lambda: scatter(moved.kv, int32(1), KVRows(rows.scales, rows.values, rows.scales)), "keys"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert same(moved.all(), before)


def test_one_launch_reaches_layers_only_where_they_lie_at_equal_distances():
    moved = Moved.of("triton", "f16")
    first, _, third = moved.kv
    with pytest.raises(ValueError, match="equal distances"):
        moved.backend.copy_kv([third, first, third], int32(0), int32(1))
    expected = moved.all()
    for array in expected:
        array[4, 1:] = array[30, 1:]
    moved.backend.copy_kv(moved.kv[1:], int32(30), int32(4))
    assert same(moved.all(), expected)
