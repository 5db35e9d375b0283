"""Atomics on the CPU's backend of Triton: exact beside numpy whatever the threads, ordered where they say so, and races found."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU, so the CPU's backend is not active", allow_module_level=True)

import triton.language as tl  # noqa: E402

PROGRAMS, PLACES, KEPT = 200, 16, 13


@triton.jit
def integers_kernel(X, V, OLD, BLOCK: tl.constexpr, KEPT: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v, kept = tl.load(V + tl.program_id(0) * BLOCK + at), at < KEPT
    tl.store(OLD + tl.program_id(0) * BLOCK + at, tl.atomic_add(X + at, v, mask=kept))
    tl.atomic_max(X + BLOCK + at, v, mask=kept, sem="relaxed")
    tl.atomic_min(X + 2 * BLOCK + at, v, mask=kept, sem="acquire")
    tl.atomic_and(X + 3 * BLOCK + at, v, mask=kept, sem="release")
    tl.atomic_or(X + 4 * BLOCK + at, v, mask=kept, scope="sys")
    tl.atomic_xor(X + 5 * BLOCK + at, v, mask=kept)
    tl.atomic_add(X + 6 * BLOCK, tl.atomic_xchg(X + 7 * BLOCK, tl.sum(v, 0).to(v.dtype)))


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint64, *(pytest.param(one, marks=pytest.mark.slow) for one in (torch.uint32, torch.int64))]
)
def test_integers_are_changed_by_all_programs_at_once(dtype):
    dice, numpy_dtype = torch.Generator().manual_seed(1), {"torch.uint32": "uint32", "torch.uint64": "uint64"}.get(str(dtype))
    signed = torch.int32 if dtype.itemsize == 4 else torch.int64
    bits = dtype.itemsize * 8 - 1
    v = torch.randint(-(1 << bits), (1 << bits) - 1, (PROGRAMS, PLACES), dtype=torch.int64, generator=dice).to(signed)
    start = torch.randint(-(1 << 20), 1 << 20, (8, PLACES), generator=dice).to(signed)
    x, old = start.clone().view(dtype), torch.zeros_like(v).view(dtype)
    integers_kernel[(PROGRAMS,)](x, v.view(dtype), old, BLOCK=PLACES, KEPT=KEPT)

    unsigned = numpy_dtype is not None
    as_numbers = lambda t: t.numpy().view(numpy_dtype) if unsigned else t.numpy()  # noqa: E731
    got, begun, values = as_numbers(x.view(signed)), as_numbers(start), as_numbers(v)
    assert (got[:6, KEPT:] == begun[:6, KEPT:]).all()
    got, kept, first = got[:, :KEPT], values[:, :KEPT], begun[:, :KEPT]
    assert (got[0] == first[0] + kept.sum(0, dtype=kept.dtype)).all()
    assert (got[1] == kept.max(0).clip(first[1])).all()
    assert (got[2] == kept.min(0).clip(None, first[2])).all()
    all_, any_, odd = first[3].copy(), first[4].copy(), first[5].copy()
    for row in kept:
        all_, any_, odd = all_ & row, any_ | row, odd ^ row
    assert (got[3] == all_).all()
    assert (got[4] == any_).all()
    assert (got[5] == odd).all()
    # Whatever the order of exchanges, nothing is lost: what was taken out and what is in are what was there and what was put in.
    put = (first[6:8, :1].sum(0) + values.sum(dtype=values.dtype)).astype(values.dtype)
    assert (got[6:8, :1].sum(0).astype(values.dtype) == put).all()
    # Each program saw another state: the differences between states in some order are what was added.
    seen = sorted(int(one) for one in as_numbers(old.view(signed))[:, 0])
    assert len(set(seen)) == PROGRAMS


@triton.jit
def floats_kernel(X, V, BLOCK: tl.constexpr, LIMITS: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(V + tl.program_id(0) * BLOCK + at)
    tl.atomic_add(X + at, v, mask=at < BLOCK - 1)
    if LIMITS:
        tl.atomic_max(X + BLOCK + at, v)
        tl.atomic_min(X + 2 * BLOCK + at, v)
        tl.atomic_xchg(X + 3 * BLOCK + at, v)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, *(pytest.param(one, marks=pytest.mark.slow) for one in (torch.float64, torch.float16))]
)
def test_floats_are_added_and_compared_by_all_programs_at_once(dtype):
    # Sums of few small integers: exact in every order.
    v = torch.randint(-1, 2, (100, PLACES), generator=torch.Generator().manual_seed(2)).to(dtype)
    v[7] = -0.0
    limits = dtype.itemsize >= 4
    x = torch.zeros(4, PLACES, dtype=dtype)
    floats_kernel[(100,)](x, v, BLOCK=PLACES, LIMITS=limits)
    assert torch.equal(x[0, :-1].double(), v.double().sum(0)[:-1])
    assert x[0, -1] == 0
    if limits:
        assert torch.equal(x[1], v.max(0).values.clamp(min=0))
        assert torch.equal(x[2], v.min(0).values.clamp(max=0))
        assert x[3].abs().max() <= 1


@triton.jit
def locked_kernel(LOCK, COUNT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    while tl.atomic_cas(LOCK, 0, 1, sem="acquire") == 1:
        pass
    tl.store(COUNT + at, tl.load(COUNT + at) + 1)
    tl.atomic_xchg(LOCK, 0, sem="release")


@triton.jit
def last_kernel(X, PARTS, ARRIVED, OUT, BLOCK: tl.constexpr):
    i, programs, at = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    tl.store(PARTS + i * BLOCK + at, tl.load(X + i * BLOCK + at) * 2)
    if tl.atomic_add(ARRIVED, 1) == programs - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(programs):
            total += tl.load(PARTS + part * BLOCK + at)
        tl.store(OUT + at, total)


@triton.jit
def turns_kernel(FLAG, OUT):
    i = tl.program_id(0)
    while tl.load(FLAG, volatile=True) != i:
        pass
    tl.store(OUT + i, tl.atomic_add(FLAG, 1))


@triton.jit
def swap_kernel(X, EXPECTED, VALUE, OLD, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OLD + at, tl.atomic_cas(X + at, tl.load(EXPECTED + at), tl.load(VALUE + at)))


def test_a_lock_keeps_programs_apart():
    lock, count = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int64)
    locked_kernel[(300,)](lock, count, BLOCK=64)
    assert count.tolist() == [300] * 64
    assert lock.item() == 0


def test_the_last_to_arrive_sees_what_all_have_stored():
    x, parts, arrived, out = torch.ones(150, 32), torch.empty(150, 32), torch.zeros(1, dtype=torch.int32), torch.zeros(32)
    last_kernel[(150,)](x, parts, arrived, out, BLOCK=32)
    assert out.tolist() == [300.0] * 32


def test_programs_may_wait_for_those_before_them():
    flag, out = torch.zeros(1, dtype=torch.int32), torch.full((90,), -1, dtype=torch.int32)
    turns_kernel[(90,)](flag, out)
    assert out.tolist() == list(range(90))


def test_what_is_exchanged_is_compared_by_its_bits():
    x = torch.tensor([0.0, -0.0, torch.nan, 2.0])
    expected, value, old = torch.tensor([0.0, 0.0, torch.nan, 3.0]), torch.full((4,), 9.0), torch.empty(4)
    before = x.clone()
    swap_kernel[(1,)](x, expected, value, old, BLOCK=4)
    assert torch.equal(old.view(torch.int32), before.view(torch.int32))
    assert x.tolist() == [9.0, -0.0, 9.0, 2.0]


@triton.jit
def reset_kernel(X, SEM: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(X, 0)
    tl.atomic_add(X, 1, sem=SEM)


@triton.jit
def counted_kernel(X, OUT):
    tl.atomic_add(X + tl.arange(0, 16) % 3, 1, sem="relaxed")
    tl.store(OUT + tl.program_id(0), tl.load(X + 7))


@triton.jit
def peeking_kernel(X, OUT):
    tl.atomic_add(X, 1, sem="relaxed")
    tl.store(OUT + tl.program_id(0), tl.load(X))


@triton.jit
def shifted_kernel(X, BY: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(X + at + BY)
    tl.store(X + at, x)


@triton.jit
def hasty_kernel(PARTS, ARRIVED, OUT, SEM: tl.constexpr, SCOPE: tl.constexpr):
    i = tl.program_id(0)
    tl.store(PARTS + i, i)
    if tl.atomic_add(ARRIVED, 1, sem=SEM, scope=SCOPE) == tl.num_programs(0) - 1:
        tl.store(OUT, tl.sum(tl.load(PARTS + tl.arange(0, 4)), 0))


@triton.jit
def careless_kernel(LOCK, COUNT):
    while tl.atomic_cas(LOCK, 0, 1) == 1:
        pass
    tl.atomic_xchg(LOCK, 0)
    tl.store(COUNT, tl.load(COUNT) + 1)


@triton.jit
def crossing_kernel(X, Y, B: tl.constexpr):
    tl.store(Y + tl.arange(0, B), tl.load(X + tl.arange(0, B) + B))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.setenv("HEADRACE_TRITON_CHECK", "1")


def test_checks_pass_what_is_ordered(checks):
    test_a_lock_keeps_programs_apart()
    test_the_last_to_arrive_sees_what_all_have_stored()
    test_programs_may_wait_for_those_before_them()
    counted_kernel[(9,)](zeros(8), zeros(9))
    shifted_kernel[(9,)](zeros(9, 16), BY=0, B=16)
    hasty_kernel[(4,)](zeros(4), zeros(1), zeros(1), SEM="acq_rel", SCOPE="gpu")


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (
            lambda: reset_kernel[(4,)](zeros(1), SEM="acq_rel"),
            ["reset_kernel: programs race: (1, 0, 0) updates atomically byte 0 of X", "(0, 0, 0) writes it"],
        ),
        (
            lambda: reset_kernel[(4,)](zeros(1), SEM="relaxed"),
            ["reset_kernel: programs race: (1, 0, 0) updates atomically byte 0 of X", "(0, 0, 0) writes it"],
        ),
        (lambda: peeking_kernel[(4,)](zeros(1), zeros(4)), ["updates atomically byte 0 of X", "(0, 0, 0) reads it"]),
        (
            lambda: shifted_kernel[(4,)](zeros(5, 16), BY=1, B=16),
            ["shifted_kernel: programs race: (1, 0, 0) writes byte 64 of X", "(0, 0, 0) reads it"],
        ),
        (
            lambda: shifted_kernel[(4,)](zeros(80)[16:], BY=-1, B=16),
            ["shifted_kernel: programs race: (1, 0, 0) reads byte 124 of X", "(0, 0, 0) writes it"],
        ),
        (
            lambda: hasty_kernel[(4,)](zeros(4), zeros(1), zeros(1), SEM="relaxed", SCOPE="gpu"),
            ["hasty_kernel: programs race: (3, 0, 0) reads byte 0 of PARTS"],
        ),
        (
            lambda: hasty_kernel[(4,)](zeros(4), zeros(1), zeros(1), SEM="release", SCOPE="gpu"),
            ["hasty_kernel: programs race: (3, 0, 0) reads byte 0 of PARTS"],
        ),
        (
            lambda: hasty_kernel[(4,)](zeros(4), zeros(1), zeros(1), SEM="acq_rel", SCOPE="cta"),
            ["hasty_kernel: programs race: (1, 0, 0) writes byte 0 of ARRIVED"],
        ),
        (
            lambda: careless_kernel[(4,)](zeros(1), zeros(1)),
            ["careless_kernel: programs race: (1, 0, 0) reads byte 0 of COUNT", "(0, 0, 0) writes it"],
        ),
        (
            lambda: crossing_kernel[(1,)](zeros(32), zeros(8), B=16),
            ["crossing_kernel: program (0, 0, 0) accesses 32 bytes from the begin of Y"],
        ),
    ],
)
def test_checks_find_what_nothing_orders(checks, launch, said):
    with pytest.raises((MemoryError, IndexError), match=r"test_triton_cpu_atomics\.py:\d+") as found:
        launch()
    for words in said:
        assert words in str(found.value)
