"""Arithmetic on the CPU's backend of Triton: integers of every width and sign, conversions, bit patterns, functions, random numbers."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU, so the CPU's backend is not active", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

from headrace.kernels.philox import philox4x32  # noqa: E402

N = 256


@triton.jit
def integers_kernel(A, B, OUT, SAID, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(OUT + at, a // b)
    tl.store(OUT + N + at, a % b)
    tl.store(OUT + 2 * N + at, a >> (b & 7))
    tl.store(OUT + 3 * N + at, a << (b & 7))
    tl.store(OUT + 4 * N + at, a * b - a)
    tl.store(OUT + 5 * N + at, tl.minimum(a, b) ^ tl.maximum(a, b))
    tl.store(OUT + 6 * N + at, ~a | -b)
    tl.store(SAID + at, a < b)
    tl.store(SAID + N + at, a >= b)
    tl.store(SAID + 2 * N + at, a.to(tl.float32) > b.to(tl.float32))


def patterns(dtype: np.dtype, seed: int) -> np.ndarray:
    """Numbers of all sizes, the extremes among them."""
    bits, dice = np.dtype(dtype).itemsize * 8, np.random.default_rng(seed)
    words = dice.integers(0, 2**64, N, dtype=np.uint64) >> dice.integers(64 - bits, 64, N, dtype=np.uint64)
    words[:4] = [1, 2 ** (bits - 1), 2**bits - 1, 2 ** (bits - 1) - 1]
    return words.astype(f"u{bits // 8}").view(dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integers_are_divided_shifted_and_compared_by_their_sign(dtype):
    dice = np.random.default_rng(1)
    a, b = patterns(dtype, 2), dice.permutation(patterns(dtype, 3))
    b[b == 0] = 7
    b[5] = np.array(-1).astype(dtype)
    out, said = np.zeros((7, N), dtype), np.zeros((3, N), np.int8)
    tensors = [torch.from_numpy(one) for one in (a, b, out, said)]
    integers_kernel[(1,)](*tensors, N=N)
    with np.errstate(all="ignore"):
        # Toward zero, as in C, where numpy takes the floor; the smallest by -1 wraps.
        wide_a, wide_b = [int(one) for one in a], [int(one) for one in b]
        quotients = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(wide_a, wide_b, strict=True)]
        remainders = [x - y * q for x, y, q in zip(wide_a, wide_b, quotients, strict=True)]
        wrapped = lambda values: np.array([value % 2**64 for value in values], np.uint64).astype(dtype)  # noqa: E731
        assert (out[0] == wrapped(quotients)).all()
        assert (out[1] == wrapped(remainders)).all()
        assert (out[2] == a >> (b & 7)).all()
        assert (out[3] == a << (b & 7)).all()
        assert (out[4] == a * b - a).all()
        assert (out[5] == np.minimum(a, b) ^ np.maximum(a, b)).all()
        assert (out[6] == ~a | (np.zeros((), dtype) - b)).all()
        assert (said == [a < b, a >= b, a.astype(np.float32) > b.astype(np.float32)]).all()


@triton.jit
def products_kernel(A, B, OUT, SHIFTED, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(OUT + at, tl.umulhi(a, b))
    tl.store(SHIFTED + at, a << b)
    tl.store(SHIFTED + N + at, a >> b)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_high_halves_of_products_are_those_of_unsigned_numbers_and_wide_shifts_leave_nothing(dtype):
    a, b = patterns(dtype, 4), patterns(dtype, 5)[::-1].copy()
    out, shifted = np.zeros(N, dtype), np.zeros((2, N), dtype)
    products_kernel[(1,)](*[torch.from_numpy(one) for one in (a, b, out, shifted)], N=N)
    bits = a.itemsize * 8
    as_unsigned = lambda one: [int(x) % 2**bits for x in one]  # noqa: E731
    assert as_unsigned(out) == [x * y >> bits for x, y in zip(as_unsigned(a), as_unsigned(b), strict=True)]
    left = [(x << y) % 2**bits if y < bits else 0 for x, y in zip(as_unsigned(a), as_unsigned(b), strict=True)]
    right = [(int(x) >> min(y, bits)) % 2**bits for x, y in zip(a, as_unsigned(b), strict=True)]
    assert [as_unsigned(one) for one in shifted] == [left, right]


@triton.jit
def conversions_kernel(X, BYTE, SHORT, INT, UINT, LONG, ULONG, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(BYTE + at, x.to(tl.int8))
    tl.store(SHORT + at, x.to(tl.uint16))
    tl.store(INT + at, x.to(tl.int32))
    tl.store(UINT + at, x.to(tl.uint32))
    tl.store(LONG + at, x.to(tl.int64))
    tl.store(ULONG + at, x.to(tl.uint64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_become_integers_toward_zero_and_stay_within_them(dtype):
    dice = np.random.default_rng(6)
    x = (dice.standard_normal(N) * 10.0 ** dice.integers(-2, 22, N)).astype(dtype)
    x[:8] = [np.nan, np.inf, -np.inf, -0.5, 2.0**31, -(2.0**31), 2.0**63, 255.9]
    outs = [np.zeros(N, one) for one in ("int8", "uint16", "int32", "uint32", "int64", "uint64")]
    conversions_kernel[(1,)](*[torch.from_numpy(one) for one in (x, *outs)], N=N)
    for out in outs:
        least, most = np.iinfo(out.dtype).min, np.iinfo(out.dtype).max
        expected = [0 if one != one else most if one > most else least if one < least else int(one) for one in x.tolist()]
        assert out.tolist() == expected, out.dtype


@triton.jit
def patterns_kernel(X, Y, Z, WORD: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    word = tl.load(X + at).to(WORD, bitcast=True)
    tl.store(Y + at, word)
    tl.store(Z + at, (word ^ 1).to(X.dtype.element_ty, bitcast=True))


@pytest.mark.parametrize(
    ("dtype", "word"),
    [(torch.bfloat16, tl.int16), (torch.float16, tl.uint16), (torch.float8_e4m3fn, tl.uint8), (torch.float8_e5m2, tl.int8)],
)
def test_narrow_floats_keep_their_patterns_when_they_are_cast_by_bits(dtype, word):
    bits = dtype.itemsize * 8
    plain = torch.arange(-(1 << bits - 1), 1 << bits - 1).to(torch.int16 if bits == 16 else torch.int8)
    x, seen, odd = plain.view(dtype), torch.zeros_like(plain), torch.zeros_like(plain).view(dtype)
    unsigned = torch.uint16 if bits == 16 else torch.uint8
    patterns_kernel[(plain.numel() // N,)](x, seen.view(unsigned) if "uint" in str(word) else seen, odd, WORD=word, N=N)
    # Signalling NaNs of float16 become quiet, as by the instructions that convert them.
    kept = ~x.float().isnan() if dtype == torch.float16 else torch.ones_like(plain, dtype=torch.bool)
    assert torch.equal(seen[kept], plain[kept])
    kept &= ~(plain ^ 1).view(dtype).float().isnan() if dtype == torch.float16 else True
    assert torch.equal(odd.view(plain.dtype)[kept], (plain ^ 1)[kept])


@triton.jit
def narrowed_kernel(X, H, B, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(H + at, x.to(tl.float16))
    tl.store(B + at, tl.full([N], 0.1, tl.bfloat16) * 3)


def test_doubles_are_rounded_once_and_constants_are_numbers_of_their_type():
    # A little above a tie of float16, and a tie in float32.
    x = torch.full((16,), 1 + 2**-11 + 2**-40, dtype=torch.float64)
    h, b = torch.empty(16, dtype=torch.float16), torch.empty(16, dtype=torch.bfloat16)
    narrowed_kernel[(1,)](x, h, b, N=16)
    assert h[0].item() == 1 + 2**-10
    assert torch.equal(b, torch.full((16,), 0.1, dtype=torch.bfloat16) * 3)


@triton.jit
def functions_kernel(X, Y, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    p = tl.abs(y) + 0.1
    tl.store(OUT + at, tl.exp(x))
    tl.store(OUT + N + at, tl.exp2(x))
    tl.store(OUT + 2 * N + at, tl.log(p))
    tl.store(OUT + 3 * N + at, tl.log2(p))
    tl.store(OUT + 4 * N + at, tl.sqrt(p))
    tl.store(OUT + 5 * N + at, tl.rsqrt(p))
    tl.store(OUT + 6 * N + at, tl.fma(x, y, p))
    tl.store(OUT + 7 * N + at, tl.floor(x))
    tl.store(OUT + 8 * N + at, tl.ceil(x))
    tl.store(OUT + 9 * N + at, tl.erf(x))
    tl.store(OUT + 10 * N + at, tl.sin(x))
    tl.store(OUT + 11 * N + at, tl.cos(x))
    tl.store(OUT + 12 * N + at, tl.sigmoid(x))
    tl.store(OUT + 13 * N + at, x % y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_are_those_of_torch(dtype):
    x, y = (torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 4 for seed in (7, 8))
    out = torch.empty(14, N, dtype=dtype)
    functions_kernel[(1,)](x, y, out, N=N)
    p, wide = y.abs() + 0.1, x.double()
    expected = [
        wide.exp(),
        wide.exp2(),
        p.log(),
        p.log2(),
        p.sqrt(),
        p.rsqrt(),
        wide * y.double() + p.double(),
        x.floor(),
        x.ceil(),
        x.erf(),
    ]
    expected += [x.sin(), x.cos(), wide.sigmoid(), torch.fmod(wide, y.double())]
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    for place, one in enumerate(expected):
        torch.testing.assert_close(
            out[place].double(), one.double(), rtol=bound, atol=bound, msg=lambda said, place=place: f"{place}: {said}"
        )
    assert torch.equal(out[13].double(), torch.fmod(wide, y.double()))


@triton.jit
def library_kernel(X, Y, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(OUT + at, libdevice.tanh(x))
    tl.store(OUT + N + at, libdevice.log1p(tl.abs(x)))
    tl.store(OUT + 2 * N + at, libdevice.pow(tl.abs(x), y))
    tl.store(OUT + 3 * N + at, libdevice.round(x))


def test_functions_of_libdevice_are_those_of_torch():
    x, y = (torch.randn(N, generator=torch.Generator().manual_seed(seed)) for seed in (9, 10))
    out = torch.empty(4, N)
    library_kernel[(1,)](x, y, out, N=N)
    away_from_zero = x.sign() * (x.abs() + 0.5).floor()
    torch.testing.assert_close(out, torch.stack([x.tanh(), x.abs().log1p(), x.abs() ** y, away_from_zero]), rtol=1e-5, atol=1e-6)


@triton.jit
def extremes_kernel(X, Y, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(OUT + at, tl.maximum(x, y))
    tl.store(OUT + N + at, tl.minimum(x, y))
    tl.store(OUT + 2 * N + at, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(OUT + 3 * N + at, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(OUT + 4 * N + at, tl.clamp(x, -1.0, 1.0))
    tl.store(OUT + 5 * N + at, tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extremes_pass_over_nans_or_give_them_as_they_are_asked(dtype):
    x = torch.tensor([1.0, torch.nan, 2.0, torch.nan, -3.0, torch.inf, -torch.inf, 0.5], dtype=dtype)
    y = torch.tensor([2.0, 1.0, torch.nan, torch.nan, 4.0, torch.nan, 1.0, -torch.inf], dtype=dtype)
    out = torch.empty(6, 8, dtype=dtype)
    extremes_kernel[(1,)](x, y, out, N=8)
    clamped = x.clamp(-1, 1)
    expected = [torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y), torch.minimum(x, y), clamped.nan_to_num(-1.0), clamped]
    for got, one in zip(out, expected, strict=True):
        torch.testing.assert_close(got, one, rtol=0, atol=0, equal_nan=True)


@triton.jit
def random_kernel(SEED, WORDS, FLOATS, NORMAL, first, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b, c, d = tl.randint4x(tl.load(SEED), first + at)
    tl.store(WORDS + at, a)
    tl.store(WORDS + N + at, b)
    tl.store(WORDS + 2 * N + at, c)
    tl.store(WORDS + 3 * N + at, d)
    tl.store(FLOATS + at, tl.rand(tl.load(SEED), first + at))
    tl.store(NORMAL + at, tl.randn(7, at))


@pytest.mark.parametrize(("seed", "first"), [(3, 5), (0x0123_4567_89AB_CDEF, (1 << 40) + 3)])
def test_random_numbers_are_those_of_philox(seed, first):
    words, floats, normal = torch.empty(4, 64, dtype=torch.int32), torch.empty(64), torch.empty(64)
    random_kernel[(1,)](torch.tensor([seed]), words, floats, normal, first, N=64)
    low = (1 << 32) - 1
    drawn = [philox4x32((at & low, at >> 32, 0, 0), (seed & low, seed >> 32)) for at in range(first, first + 64)]
    assert words.numpy().view(np.uint32).T.tolist() == [list(one) for one in drawn]
    signed = words[0].long()
    assert torch.equal(floats, torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10)
    assert 0.5 < normal.std() < 1.5
