"""Products of weights and activations rounded to bfloat16: as the reference rounds them, and the same bits in any company, with any
threads and on any instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.eager import NativeOps, ReferenceOps
from tests.kernels.paged import dense, random, scaled_float
from tests.kernels.test_cpu_integers import WEIGHTS as INTEGERS
from tests.kernels.test_cpu_integers import WIDTH, weight

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
ENGINES = {isa: [NativeOps(threads, isa, "bf16") for threads in (1, 3)] for isa in cpu.INSTRUCTION_SETS}
REFERENCE = ReferenceOps("bf16")
WEIGHTS = {
    **INTEGERS,
    "float8 in blocks": scaled_float(83, WIDTH, (32, 128), random(3, WIDTH // 128, seed=6)),
    "float8 in groups of 16": scaled_float(83, WIDTH, (1, 16), random(83, WIDTH // 16, seed=6)),
    "groups of 16": weight(4, 0, 16, minimum=True),
    "bfloat16": dense(random(83, WIDTH, seed=5).bfloat16()),
}


@pytest.fixture(scope="module", params=ENGINES)
def engines(request) -> list[NativeOps]:
    return ENGINES[request.param]


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 17, 33, 101])
def test_products_are_those_of_the_reference(engines, form, rows):
    x, bias = random(rows, WIDTH, seed=rows), random(83, seed=7)
    ours = engines[-1].linear(x, engines[-1].prepare([WEIGHTS[form]], bias))
    theirs = REFERENCE.linear(x, REFERENCE.prepare([WEIGHTS[form]], bias))
    # A weight may come to lie on the other side of the middle between two, an error of 1 in 256 in one of the 1,280 of an output.
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=2e-4 * theirs.abs().max())


@pytest.mark.parametrize("form", ["Q4_1", "Q8_0", "Q6_K", "bfloat16"])
def test_the_error_is_that_of_bfloat16(engines, form):
    x = random(40, WIDTH)
    exact = x.double() @ torch.from_numpy(WEIGHTS[form].dequantize()).double().T
    ours = engines[0].linear(x, engines[0].prepare([WEIGHTS[form]]))
    assert (ours - exact).norm() / exact.norm() < 2**-8


@pytest.mark.parametrize("form", WEIGHTS)
@given(rows=st.integers(1, 430), seed=st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_rows_do_not_know_each_other(engines, form, rows, seed):
    x = random(rows, WIDTH, seed=seed)
    packed = engines[0].prepare([WEIGHTS[form]])
    whole = engines[0].linear(x, packed)
    some = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: 1 + seed % rows]
    for ops in engines:
        assert torch.equal(ops.linear(x[some], packed), whole[some])
        assert torch.equal(ops.linear(x[-1:], packed), whole[-1:])


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-36])
def test_all_instruction_sets_give_the_same_bits(form, size):
    x = random(21, WIDTH) * torch.logspace(-3, 3, WIDTH) * size
    first, *others = [ops[0].linear(x, ops[0].prepare([WEIGHTS[form]])) for ops in ENGINES.values()]
    assert first.abs().max() > 0
    for other in others:
        assert torch.equal(first, other)


def test_layers_of_several_forms_take_each_as_it_is(engines):
    parts = [WEIGHTS["Q4_K"], WEIGHTS["Q6_K"], dense(random(7, WIDTH)), WEIGHTS["bfloat16"], WEIGHTS["Q8_0"]]
    bias = random(4 * 83 + 7, seed=3)
    for rows in (1, 20):
        x = random(rows, WIDTH)
        whole = engines[0].linear(x, engines[0].prepare(parts, bias))
        start = 0
        for part in parts:
            end = start + part.shape[0]
            alone = engines[1].linear(x, engines[1].prepare([part], bias[start:end]))
            assert torch.equal(whole[:, start:end], alone)
            start = end


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_row_alone(engines, bad):
    packed, x = engines[0].prepare([WEIGHTS["Q4_1"]]), random(12, WIDTH)
    clean = engines[0].linear(x, packed)
    x[5, 700] = bad
    spoilt = engines[0].linear(x, packed)
    assert not spoilt[5].isfinite().any()
    keep = torch.arange(12) != 5
    assert torch.equal(spoilt[keep], clean[keep])


def test_what_is_not_a_number_stays_so_whatever_its_bits(engines):
    packed, x = engines[0].prepare([WEIGHTS["Q4_1"]]), random(2, WIDTH)
    x.view(torch.int32)[0, 3] = 0x7FFFFFFF
    x.view(torch.int32)[1, 3] = -1
    assert engines[0].linear(x, packed).isnan().all()


def test_the_arithmetic_of_what_follows_is_left_as_it_was(engines):
    packed = engines[0].prepare([WEIGHTS["Q4_1"]])
    engines[0].linear(random(3, WIDTH), packed)
    tiny = torch.full((1, 64), 1e-39)
    assert torch.equal(engines[0].add(tiny, tiny), tiny + tiny)


def test_left_to_itself_the_backend_takes_what_is_fast_for_each_weight():
    for isa in cpu.INSTRUCTION_SETS:
        ops = NativeOps(1, isa, "auto")
        names = [ops.prepare([WEIGHTS[form]]).name for form in ("Q4_1", "Q8_0", "bfloat16")] + [ops.prepare([dense(random(7, WIDTH))]).name]
        assert names == ["int4 × int8", "int8 × int8", f"bf16 × {'bf16' if isa == 'amx' else 'f32'}", "f32 × f32"]
