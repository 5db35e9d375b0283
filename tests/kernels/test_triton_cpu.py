"""The CPU backend of Triton: kernels of all kinds run on CPU tensors, numbers are rounded as on a GPU, and faults are found."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU, so the CPU's backend is not active", allow_module_level=True)

import triton.language as tl  # noqa: E402

from headrace.kernels.triton_cpu.tile_ir import Unsupported  # noqa: E402


@triton.jit
def convert_kernel(X, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n).to(Y.dtype.element_ty), mask=at < n)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    convert_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), BLOCK=4096)
    return y


def same_numbers(got: torch.Tensor, expected: torch.Tensor) -> bool:
    got, expected = got.float(), expected.float()
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got[~got.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_of_16_bits_is_read_as_torch_reads_it_and_comes_back(dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = converted(patterns, torch.float32)
    assert same_numbers(wide, patterns.float())
    assert same_numbers(converted(wide, dtype), patterns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_are_rounded_to_the_nearest_and_ties_to_even(dtype):
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-12, 8, 1 << 16)
    # Halfway between neighbours, and beside that.
    exact = x.to(dtype).float()
    ties = (exact + torch.nextafter(exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()) / 2
    for values in (x, ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(torch.inf))):
        assert same_numbers(converted(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits_are_rounded_to_the_nearest_and_saturate(dtype):
    patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    assert same_numbers(converted(patterns, torch.float32), patterns.float())
    largest = torch.finfo(dtype).max
    x = torch.randn(1 << 15, generator=torch.Generator().manual_seed(2)) * torch.logspace(-8, 6, 1 << 15)
    finite = patterns.float()[patterns.float().isfinite()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2
    for values in (x, ties, finite):
        assert same_numbers(converted(values, dtype), values.clamp(-largest, largest).to(dtype))


@triton.jit
def product_kernel(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + m[:, None] * K + k[None, :]), tl.load(B + k[:, None] * N + n[None, :])
    tl.store(C + m[:, None] * N + n[None, :], tl.dot(a, b, out_dtype=C.dtype.element_ty))


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize(
    ("left", "right"),
    [*((one, one) for one in (torch.float32, torch.bfloat16, torch.float16, torch.int8)), (FP8[0], FP8[0]), (FP8[1], FP8[0])],
)
def test_products_are_exact_up_to_the_order_of_their_sums(left, right):
    dice, limit = torch.Generator().manual_seed(3), 128 if left not in FP8 else 9
    a = torch.randint(-limit, limit, (16, 64), generator=dice).float().to(left)
    b = torch.randint(-limit, limit, (64, 32), generator=dice).float().to(right)
    c = torch.empty(16, 32, dtype=torch.int32 if left == torch.int8 else torch.float32)
    product_kernel[(1,)](a, b, c, M=16, N=32, K=64)
    assert torch.equal(c.double(), a.double() @ b.double())


@triton.jit
def products_kernel(A, B, C, OUT, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    s, m, n, k = tl.arange(0, S)[:, None, None], tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + s * M * K + m[None, :, None] * K + k[None, None, :])
    b = tl.load(B + s * N * K + n[None, :, None] * K + k[None, None, :])
    at = s * M * N + m[None, :, None] * N + n[None, None, :]
    tl.store(OUT + at, tl.dot(a, tl.permute(b, [0, 2, 1]), tl.load(C + at), out_dtype=C.dtype.element_ty))


@pytest.mark.parametrize(("dtype", "total"), [(torch.bfloat16, torch.float32), (torch.int8, torch.int32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("shape", [(4, 16, 32, 64), (2, 1, 2, 4), (1, 4, 1, 16)])
def test_products_of_batches_are_added_to_what_is_given(dtype, total, shape):
    s, m, n, k = shape
    dice = torch.Generator().manual_seed(4)
    a, b, c = (torch.randint(-128, 128, one, generator=dice) for one in ((s, m, k), (s, n, k), (s, m, n)))
    out = torch.empty(s, m, n, dtype=total)
    products_kernel[(1,)](a.to(dtype), b.to(dtype), c.to(total), out, *shape)
    assert torch.equal(out.long(), a @ b.transpose(1, 2) + c)


@triton.jit
def control_kernel(X, Y, n, limit, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    turns = 0
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < n, other=0.0)
        if tl.max(x, 0) > limit:
            total += x
            turns += 1
        else:
            total -= x
    highest, where = tl.max(total, 0, return_indices=True)
    while turns > 3:
        turns -= 3
    tl.store(Y, tl.sum(total, 0))
    tl.store(Y + 1, highest)
    tl.store(Y + 2, where.to(tl.float32))
    tl.store(Y + 3, turns.to(tl.float32))


def test_loops_branches_and_reductions_do_what_they_say():
    x, y = torch.randint(-9, 10, (1000,), generator=torch.Generator().manual_seed(4)).float(), torch.empty(4)
    control_kernel[(1,)](x, y, 1000, 8.5, BLOCK=64)
    total, turns = torch.zeros(64), 0
    for part in torch.nn.functional.pad(x, (0, 24)).view(-1, 64):
        total, turns = (total + part, turns + 1) if part.max() > 8.5 else (total - part, turns)
    while turns > 3:
        turns -= 3
    assert y.tolist() == [total.sum(), total.max(), total.argmax(), turns]


@triton.jit
def repeated_kernel(X, Y, CODES, OUT, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    at = tl.arange(0, BLOCK)
    one, x, i = tl.load(X), tl.load(X + at), tl.load(CODES + at)
    for _ in tl.static_range(TIMES):
        one = one * one - one
        x = x * x - x
        i = i * i - (i >> 3)
    tl.store(Y + at, x)
    tl.store(Y + BLOCK, one)
    tl.store(OUT + at, i)


def test_values_that_are_used_again_are_computed_once():
    # Written out where they are used, they would double with every step.
    x, y = torch.rand(16, generator=torch.Generator().manual_seed(6)), torch.empty(17)
    i, j = torch.arange(16, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    repeated_kernel[(1,)](x, y, i, j, BLOCK=16, TIMES=60)
    for _ in range(60):
        x, i = x * x - x, i * i - (i >> 3)
    assert torch.equal(y, torch.cat([x, x[:1]]))
    assert torch.equal(j, i)


@triton.jit
def capped(x, limit):
    largest = tl.max(x, 0)
    if largest > limit:
        if largest > 2 * limit:
            return x * 0, 2
        return x / largest * limit, 1
    return x, 0


@triton.jit
def capped_kernel(X, Y, HOW, limit, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) == 3:
        return
    y, how = capped(tl.load(X + at), limit)
    tl.store(Y + at, y)
    tl.store(HOW + tl.program_id(0), how)


def test_functions_and_kernels_may_return_early():
    x = torch.tensor([[1.0, 2.0], [8.0, 2.0], [9.0, 1.0], [1.0, 1.0]])
    y, how = torch.full((4, 2), -1.0), torch.full((4,), -1, dtype=torch.int32)
    capped_kernel[(4,)](x, y, how, 4.0, BLOCK=2)
    assert y.tolist() == [[1.0, 2.0], [4.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]
    assert how.tolist() == [0, 1, 2, -1]


@triton.jit
def divide_kernel(X, D, Y, Z, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, d = tl.load(X + at), tl.load(D + at)
    tl.store(Y + at, x // d, mask=d != 0)
    tl.store(Z + at, x % d, mask=d != 0)


def test_elements_that_are_masked_may_divide_by_zero():
    x = torch.tensor([7, -7, 7, -(2**31)], dtype=torch.int32)
    d = torch.tensor([2, 2, 0, -1], dtype=torch.int32)
    y, z = torch.full((4,), 99, dtype=torch.int32), torch.full((4,), 99, dtype=torch.int32)
    divide_kernel[(1,)](x, d, y, z, BLOCK=4)
    # Toward zero, as in C; what has no number wraps.
    assert y.tolist() == [3, -3, 99, -(2**31)]
    assert z.tolist() == [1, -1, 99, 0]


@triton.jit
def truncating_kernel(X, Y):
    tl.store(Y, tl.load(X).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_a_rounding_that_it_does_not_do_is_refused():
    with pytest.raises(Unsupported, match="rounding toward zero"):
        truncating_kernel[(1,)](torch.ones(1), torch.ones(1, dtype=torch.bfloat16))


@triton.jit
def assembly_kernel(X, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    y = tl.inline_asm_elementwise("add.f32 $0, $1, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(X + tl.arange(0, BLOCK), y)


def test_what_cannot_be_lowered_is_refused_by_name():
    with pytest.raises(
        Unsupported, match=r"assembly_kernel: tt\.elementwise_inline_asm has no lowering on the CPU .*test_triton_cpu\.py:\d+"
    ):
        assembly_kernel[(1,)](torch.ones(16), BLOCK=16)


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.setenv("HEADRACE_TRITON_CHECK", "1")


@triton.jit
def pages_kernel(pages, KV, OUT, count, SHIFT: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr):
    i, d = tl.program_id(0), tl.arange(0, D)
    page = tl.load(pages + i) + SHIFT
    if MASK:
        x = tl.load(KV + page * D + d, mask=i < count, other=0.0)
    else:
        x = tl.load(KV + page * D + d)
    tl.store(OUT + i * D + d, x)


@triton.jit
def racing_kernel(OUT, APART: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0)
    tl.store(OUT + i * APART + tl.arange(0, B), tl.full([B], 1.0, tl.float32) * i)


@triton.jit
def uneven_kernel(OUT, WIDE):
    if tl.program_id(0) == 0:
        tl.store(OUT, 1.0)
    else:
        tl.store(WIDE + 1, tl.full([], 3, tl.int16))


def paged(last: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor([0, 1, 2, last], dtype=torch.int32), torch.randn(4, 32), torch.empty(4, 32)


def test_checks_pass_what_is_right(checks):
    pages, kv, out = paged()
    pages_kernel[(4,)](pages, kv, out, 4, SHIFT=0, MASK=False, D=32)
    assert torch.equal(out, kv)
    racing_kernel[(4,)](out, APART=32, B=32)
    assert out[:, 0].tolist() == [0, 1, 2, 3]


def test_checks_find_an_index_of_a_page_that_is_off_by_one(checks):
    said = r"pages_kernel: program \(3, 0, 0\) accesses 512 bytes from the begin of KV.*test_triton_cpu\.py:\d+"
    with pytest.raises(IndexError, match=said):
        pages_kernel[(4,)](*paged(), 4, SHIFT=1, MASK=False, D=32)


def test_checks_find_a_missing_mask(checks):
    with pytest.raises(IndexError, match="KV"):
        pages_kernel[(4,)](*paged(1000), 3, SHIFT=0, MASK=False, D=32)
    pages_kernel[(4,)](*paged(1000), 3, SHIFT=0, MASK=True, D=32)


def test_checks_find_programs_that_write_one_place(checks):
    with pytest.raises(MemoryError, match=r"racing_kernel: programs race: \(1, 0, 0\) writes byte 64 of OUT, at .*test_triton_cpu\.py:\d+"):
        racing_kernel[(4,)](torch.empty(4, 32), APART=16, B=32)


def test_checks_find_programs_that_write_parts_of_one_place(checks):
    out = torch.empty(4, 32)
    with pytest.raises(MemoryError, match="uneven_kernel: programs race"):
        uneven_kernel[(2,)](out, out.view(torch.int16))


def test_checks_know_the_memory_of_a_tensor_that_is_seen_as_another_type(checks):
    codes = torch.randint(0, 120, (64,), generator=torch.Generator().manual_seed(6)).to(torch.uint8)
    out = torch.empty(64)
    convert_kernel[(1,)](triton.reinterpret(codes, tl.float8e4nv), out, 64, BLOCK=64)
    assert torch.equal(out, codes.view(torch.float8_e4m3fn).float())
    with pytest.raises(IndexError, match="64 bytes from the begin of X"):
        convert_kernel[(1,)](triton.reinterpret(codes, tl.float8e4nv), out, 65, BLOCK=128)


@triton.jit
def slipping_kernel(X, Y, ROUND: tl.constexpr):
    x = tl.load(X + tl.arange(0, 64))
    if ROUND:
        tl.store(Y + tl.arange(0, 64), x.to(tl.bfloat16))
    else:
        cut = x.to(tl.int32, bitcast=True) & -65536
        tl.store(Y + tl.arange(0, 64), cut.to(tl.float32, bitcast=True).to(tl.bfloat16))


@pytest.mark.parametrize("rounds", [True, False])
def test_a_slip_in_rounding_shows_beside_torch(rounds):
    x, y = torch.randn(64), torch.empty(64, dtype=torch.bfloat16)
    slipping_kernel[(1,)](x, y, ROUND=rounds)
    assert torch.equal(y, x.to(torch.bfloat16)) == rounds


def test_activations_beyond_float16_stay_finite_beside_weights_of_float16():
    from headrace.kernels.triton import TritonBackend, TritonOps
    from headrace.kernels.weights import Dense

    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).half()
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    x[0, 3] = 70000
    weight = TritonBackend("cpu").prepare("w", lambda: [Dense(values.numpy())])
    y, expected = TritonOps(torch.bfloat16, torch.float32).linear(x, weight), x.float() @ values.float().t()
    assert y.isfinite().all()
    assert (y - expected).norm() / expected.norm() < 1e-2
