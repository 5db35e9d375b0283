"""Tensor descriptors, block pointers, tuples, assertions and prints on the CPU's backend of Triton."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU, so the CPU's backend is not active", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402


def window(x: torch.Tensor, row: int, column: int, rows: int, columns: int, outside: float = 0) -> torch.Tensor:
    """A block of x; what lies outside is `outside`."""
    block = torch.full((rows, columns), outside, dtype=x.dtype)
    for i in range(max(0, -row), min(rows, x.shape[0] - row)):
        for j in range(max(0, -column), min(columns, x.shape[1] - column)):
            block[i, j] = x[row + i, column + j]
    return block


@triton.jit
def descriptors_kernel(X, PASSED, Y, rows, columns, stride, row, column, M: tl.constexpr, N: tl.constexpr, NAN: tl.constexpr):
    made = tl.make_tensor_descriptor(X, [rows, columns], [stride, 1], [M, N], padding_option="nan" if NAN else "zero")
    out = tl.make_tensor_descriptor(Y, [2 * M, N], [N, 1], [M, N])
    out.store([0, 0], made.load([row, column]))
    out.store([M, 0], PASSED.load([row, column]))
    PASSED.store([row - 1, column + 3], made.load([0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize(("row", "column"), [(2, 4), (-3, 20), (12, -5)])
def test_descriptors_read_nothing_outside_and_write_nothing_there(dtype, row, column):
    x = torch.randint(-99, 99, (13, 24), generator=torch.Generator().manual_seed(1)).to(dtype)
    other = x.flip(1).contiguous()
    y, before, nan = torch.empty(16, 16, dtype=dtype), other.clone(), dtype.is_floating_point
    passed = TensorDescriptor.from_tensor(other, [8, 16])
    descriptors_kernel[(1,)](x, passed, y, 13, 21, 24, row, column, M=8, N=16, NAN=nan)
    torch.testing.assert_close(y[:8], window(x[:, :21], row, column, 8, 16, torch.nan if nan else 0), equal_nan=True)
    assert torch.equal(y[8:], window(before, row, column, 8, 16))
    expected = before.clone()
    for i in range(8):
        for j in range(16):
            if 0 <= row - 1 + i < 13 and 0 <= column + 3 + j < 24:
                expected[row - 1 + i, column + 3 + j] = x[i, j]
    assert torch.equal(other, expected)


@triton.jit
def blocks_kernel(X, Y, rows, columns, M: tl.constexpr, N: tl.constexpr):
    block = tl.make_block_ptr(X, (rows, columns), (columns, 1), (0, 0), (M, N), (1, 0))
    total = tl.zeros([M, N], tl.float32)
    for _ in range(0, columns, N):
        total += tl.load(block, boundary_check=(0, 1), padding_option="zero")
        block = tl.advance(block, (0, N))
    tl.store(Y + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], total)


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_advance():
    x, y = torch.randint(-9, 9, (13, 43), generator=torch.Generator().manual_seed(2)).float(), torch.empty(16, 8)
    blocks_kernel[(1,)](x, y, 13, 43, M=16, N=8)
    assert torch.equal(y, sum(window(x, 0, begin, 16, 8) for begin in range(0, 43, 8)))


@triton.jit
def rows_kernel(X, PLACES, Y, ADDED, rows, N: tl.constexpr):
    one = tl.make_tensor_descriptor(X, [rows, N], [N, 1], [1, N])
    places = tl.load(PLACES + tl.arange(0, 8))
    got = one.gather(places, 0)
    tl.store(Y + tl.program_id(0) * 8 * N + tl.arange(0, 8)[:, None] * N + tl.arange(0, N)[None, :], got)
    added = tl.make_tensor_descriptor(ADDED, [4, N], [N, 1], [8, N])
    added.atomic_add([0, 0], got)


def test_descriptors_gather_rows_and_add_atomically():
    x, y, added = torch.arange(80.0).view(5, 16), torch.empty(3, 8, 16), torch.ones(4, 16)
    places = torch.tensor([4, 0, 0, 3, 9, 1, 2, -1], dtype=torch.int32)
    rows_kernel[(3,)](x, places, y, added, 5, N=16)
    expected = torch.stack([x[place] if 0 <= place < 5 else torch.zeros(16) for place in places.tolist()])
    assert torch.equal(y, expected.expand(3, 8, 16))
    assert torch.equal(added, 1 + 3 * expected[:4])


@triton.jit
def tuples_kernel(PAIR, OUT, N: tl.constexpr):
    x, by = PAIR
    tl.store(OUT + tl.arange(0, N), tl.load(x + tl.arange(0, N)) * by)


def test_tuples_are_taken_apart():
    x, out = torch.arange(16.0), torch.empty(16)
    tuples_kernel[(1,)]((x, 3), out, N=16)
    assert torch.equal(out, x * 3)


@triton.jit
def asserting_kernel(X, OUT, limit, N: tl.constexpr):
    tl.static_assert(N <= 64, "N is too large")
    x = tl.load(X + tl.program_id(0) * N + tl.arange(0, N))
    tl.device_assert(x < limit, 'a "value" is 100% too large')
    tl.device_assert(tl.program_id(0) < 9, "too many programs")
    tl.store(OUT + tl.program_id(0) * N + tl.arange(0, N), x)


def test_an_assertion_that_fails_ends_the_launch_and_says_where(monkeypatch):
    x, out = torch.arange(64.0), torch.zeros(64)
    asserting_kernel[(4,)](x, out, 64.0, N=16, debug=True)
    assert torch.equal(out, x)
    said = r'asserting_kernel: program \(2, 0, 0\): a "value" is 100% too large, at .*test_triton_cpu_descriptors\.py:\d+'
    with pytest.raises(AssertionError, match=said):
        asserting_kernel[(3,)](x, out.zero_(), 40.0, N=16, debug=True)
    assert out[32:].count_nonzero() == 0
    # As on a GPU, assertions are there where they are asked for; checked launches ask.
    asserting_kernel[(3,)](x, out, 40.0, N=16)
    monkeypatch.setenv("HEADRACE_TRITON_CHECK", "1")
    with pytest.raises(AssertionError, match="too large"):
        asserting_kernel[(3,)](x, out, 40.0, N=16)


def test_a_static_assertion_fails_when_the_kernel_is_compiled():
    with pytest.raises(triton.compiler.errors.CompileTimeAssertionFailure, match="N is too large"):
        asserting_kernel[(1,)](torch.zeros(128), torch.zeros(128), 1.0, N=128)


@triton.jit
def printing_kernel(X, U):
    x, u = tl.load(X + tl.arange(0, 2)), tl.load(U)
    tl.device_print("x is", x)
    tl.device_print("100% of", u, tl.program_id(1))
    tl.device_print("hex", u, hex=True)
    tl.device_print("done")


def test_values_are_printed_with_their_places(capfd):
    printing_kernel[(1, 2)](torch.tensor([1.5, -2.0]), torch.tensor([-1], dtype=torch.int32).view(torch.uint32))
    said = capfd.readouterr().out.splitlines()
    for y in (0, 1):
        pid = f"pid (0, {y}, 0)"
        expected = [f"{pid} idx (0) x is: 1.500000", f"{pid} idx (1) x is: -2.000000", f"{pid} idx () 100% of: (operand 0) 4294967295"]
        expected += [f"{pid} idx () 100% of: (operand 1) {y}", f"{pid} idx () hex: 0xffffffff", f"{pid} done"]
        assert [line for line in said if line.startswith(pid)] == expected
