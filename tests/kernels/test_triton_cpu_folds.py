"""Scans, sorts, reductions of several values, histograms, gathers and reshapes on the CPU's backend of Triton, beside torch."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU, so the CPU's backend is not active", allow_module_level=True)

import triton.language as tl  # noqa: E402


def dice(*shape: int, seed: int = 1, low: int = -9, high: int = 10) -> torch.Tensor:
    """Integers: their sums are exact in every order."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@triton.jit
def affine(scale, shift, then_scale, then_shift):
    return scale * then_scale, shift * then_scale + then_shift


@triton.jit
def largest(value, place, other, other_place):
    wins = (other > value) | ((other == value) & (other_place > place))
    return tl.where(wins, other, value), tl.where(wins, other_place, place)


@triton.jit
def scans_kernel(X, Y, OUT, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, A)[:, None, None] * B * C + tl.arange(0, B)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    x, y, step = tl.load(X + at), tl.load(Y + at), A * B * C
    tl.store(OUT + at, tl.cumsum(x, 0))
    tl.store(OUT + at + step, tl.cumsum(x, 1, reverse=True))
    tl.store(OUT + at + 2 * step, tl.cumprod(y, 2))
    scale, shift = tl.associative_scan((y, x), 1, affine)
    tl.store(OUT + at + 3 * step, scale)
    tl.store(OUT + at + 4 * step, shift)
    scale, shift = tl.associative_scan((y, x), 0, affine, reverse=True)
    tl.store(OUT + at + 5 * step, shift)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (8, 16, 4)),
        pytest.param(torch.int64, (2, 32, 1), marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, (4, 4, 2), marks=pytest.mark.slow),
    ],
)
def test_scans_go_along_every_axis_both_ways_and_carry_several_values(dtype, shape):
    x, y = dice(*shape).to(dtype), dice(*shape, seed=2, low=-1, high=2).to(dtype)
    out = torch.empty(6, *shape, dtype=dtype)
    scans_kernel[(1,)](x, y, out, *shape)

    def scanned(axis: int, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        places = list(range(shape[axis]))[:: -1 if reverse else 1]
        scales, shifts = torch.empty_like(y), torch.empty_like(x)
        scale, shift = y.select(axis, places[0]), x.select(axis, places[0])
        for place in places:
            if place != places[0]:
                # The addend is rounded as the kernel's own steps are.
                scale, shift = scale * y.select(axis, place), shift * y.select(axis, place) + x.select(axis, place)
            scales.select(axis, place).copy_(scale)
            shifts.select(axis, place).copy_(shift)
        return scales, shifts

    assert torch.equal(out[0], x.cumsum(0).to(dtype))
    assert torch.equal(out[1], x.flip(1).cumsum(1).flip(1).to(dtype))
    assert torch.equal(out[2], y.cumprod(2).to(dtype))
    assert all(torch.equal(got, expected) for got, expected in zip(out[3:5], scanned(1, False), strict=True))
    assert torch.equal(out[5], scanned(0, True)[1])


@triton.jit
def sorts_kernel(X, UP, DOWN, TOP, BACK, ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    r, n, k = tl.arange(0, ROWS)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)[None, :]
    x = tl.load(X + r * N + n)
    tl.store(UP + r * N + n, tl.sort(x))
    tl.store(DOWN + r * N + n, tl.sort(x, descending=True))
    tl.store(TOP + r * K + k, tl.topk(x, K))
    tl.store(BACK + r * N + n, tl.flip(x, 1))


@pytest.mark.parametrize(
    "dtype", [torch.float16, *(pytest.param(one, marks=pytest.mark.slow) for one in (torch.float32, torch.int32, torch.int64))]
)
def test_tiles_are_sorted_and_their_largest_are_found(dtype):
    x = dice(4, 64, low=-1000, high=1000).to(dtype)
    up, down, back, top = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), torch.empty(4, 8, dtype=dtype)
    sorts_kernel[(1,)](x, up, down, top, back, ROWS=4, N=64, K=8)
    assert torch.equal(up, x.sort(1).values)
    assert torch.equal(down, x.sort(1, descending=True).values)
    assert torch.equal(top, x.topk(8, 1).values)
    assert torch.equal(back, x.flip(1))


@triton.jit
def pairs_kernel(X, V, PLACES, ROWS: tl.constexpr, N: tl.constexpr):
    r, n = tl.arange(0, ROWS), tl.arange(0, N)
    x = tl.load(X + r[:, None] * N + n[None, :])
    place = tl.broadcast_to(n[None, :], [ROWS, N])
    last, last_place = tl.reduce((x, place), 1, largest)
    tl.store(V + r, last)
    tl.store(PLACES + r, last_place)
    tl.store(PLACES + ROWS + r, tl.argmax(x, 1))
    tl.store(PLACES + 2 * ROWS + r, tl.argmin(x, 1))
    tl.store(PLACES + 3 * ROWS + n, tl.argmax(x, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16])
def test_the_first_or_the_last_of_equals_is_found(dtype):
    x = dice(8, 32, low=-3, high=4).to(dtype)
    values, places = torch.empty(8, dtype=dtype), torch.empty(3 * 8 + 32, dtype=torch.int32)
    pairs_kernel[(1,)](x, values, places, ROWS=8, N=32)
    wide = x.double()
    first = lambda hit: hit.int().argmax(1)  # noqa: E731
    most, least = wide == wide.amax(1, keepdim=True), wide == wide.amin(1, keepdim=True)
    assert torch.equal(values.double(), wide.amax(1))
    assert places[:8].tolist() == (31 - first(most.flip(1))).tolist()
    assert places[8:16].tolist() == first(most).tolist()
    assert places[16:24].tolist() == first(least).tolist()
    assert places[24:].tolist() == first((wide == wide.amax(0)).t()).tolist()


@triton.jit
def places_kernel(X, PLACES, BINS, GOT, SHAPED, N: tl.constexpr, M: tl.constexpr):
    n, m = tl.arange(0, N), tl.arange(0, M)
    x = tl.load(X + n)
    tl.store(BINS + m, tl.histogram(x, M))
    tl.store(BINS + M + m, tl.histogram(x, M, mask=n % 3 == 0))
    two = tl.load(X + tl.reshape(n, [N // 4, 4]))
    rows = tl.load(PLACES + m[:, None] * 4 + tl.arange(0, 4)[None, :])
    tl.store(GOT + m[:, None] * 4 + tl.arange(0, 4)[None, :], tl.gather(two, rows, 0))
    columns = tl.load(PLACES + tl.arange(0, N // 4)[:, None] * 2 + tl.arange(0, 2)[None, :]) % 4
    tl.store(GOT + M * 4 + tl.arange(0, N // 4)[:, None] * 2 + tl.arange(0, 2)[None, :], tl.gather(two, columns, 1))
    both = tl.join(x, x * 10)
    left, right = tl.split(both)
    tl.store(SHAPED + tl.arange(0, 2 * N), tl.interleave(right, left))
    tl.store(SHAPED + 2 * N + tl.arange(0, 2 * N), tl.cat(x, right, can_reorder=True))
    turned = tl.permute(tl.reshape(both, [2, N // 2, 2]), [2, 0, 1])
    tl.store(SHAPED + 4 * N + tl.arange(0, 2 * N), tl.reshape(turned, [2 * N]))
    tl.store(SHAPED + 6 * N + tl.arange(0, 2), tl.join(tl.sum(x, 0), tl.max(x, 0)))


def test_elements_are_counted_gathered_and_placed():
    x, i = dice(64, low=-2, high=34).int(), dice(128, low=0, high=16, seed=3).int()
    bins, got, shaped = torch.empty(2, 32).int(), torch.empty(160).int(), torch.empty(6 * 64 + 2).int()
    places_kernel[(1,)](x, i, bins, got, shaped, N=64, M=32)

    def counts(values: torch.Tensor) -> list[int]:
        return [int((values == place).sum()) for place in range(32)]

    assert bins.tolist() == [counts(x), counts(x[::3])]
    two, rows, columns = x.view(16, 4), i.view(32, 4).long(), i[:32].view(16, 2).long() % 4
    assert torch.equal(got[:128].view(32, 4), two.gather(0, rows))
    assert torch.equal(got[128:].view(16, 2), two.gather(1, columns))
    both = torch.stack([x, x * 10], 1)
    assert torch.equal(shaped[:128], both.flip(1).reshape(-1))
    assert torch.equal(shaped[128:256], torch.cat([x, x * 10]))
    assert torch.equal(shaped[256:384], both.view(2, 32, 2).permute(2, 0, 1).reshape(-1))
    assert shaped[384:].tolist() == [x.sum(), x.max()]


@triton.jit
def outside_kernel(X, PLACES, Y):
    n = tl.arange(0, 8)
    tl.store(Y + n, tl.gather(tl.load(X + n), tl.load(PLACES + n), 0))


def test_a_gather_of_what_a_tile_does_not_have_fails_the_launch():
    with pytest.raises(IndexError, match=r"outside_kernel: program \(0, 0, 0\) gathers element 9 of 8, at .*test_triton_cpu_folds\.py:\d+"):
        outside_kernel[(1,)](torch.ones(8), torch.tensor([0, 1, 9, 3, 4, 5, 6, 7], dtype=torch.int32), torch.empty(8))
