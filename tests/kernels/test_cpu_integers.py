"""Products of integer weights with activations of 8 bits: as the reference rounds them, and the same bits in any company, with any
threads and on any instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.eager import NativeOps, ReferenceOps
from tests.kernels.paged import dense, grouped_int, random, scaled_float, with_zeros

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
ENGINES = {isa: [NativeOps(threads, isa, "int8") for threads in (1, 3)] for isa in cpu.INSTRUCTION_SETS}
REFERENCE = ReferenceOps("int8")
WIDTH = 1280  # more than is unpacked at once


def weight(bits: int, low: int, group: int = 32, minimum: bool = False, levels: bool = False, outputs: int = 83, inputs: int = WIDTH):
    draw = torch.Generator().manual_seed(bits + group)
    codes = torch.randint(low, low + 2**bits, (outputs, inputs), generator=draw, dtype=torch.int16).to(torch.int8)
    codes[0, 0], codes[-1, -1] = low, low + 2**bits - 1

    def scales(seed: int) -> torch.Tensor:
        values = random(outputs, inputs // group, seed=seed)
        if not levels:
            return values.half().float()
        together = 256 // group
        factors = values[:, ::together].half().float().repeat_interleave(together, 1)
        return factors * torch.randint(1, 64, values.shape, generator=draw)

    return grouped_int(codes, scales(1), scales(2) if minimum else None, group, bits)


WEIGHTS = {
    "Q4_0": weight(4, -8),
    "Q4_1": weight(4, 0, minimum=True),
    "Q5_0": weight(5, -16),
    "Q5_1": weight(5, 0, minimum=True),
    "Q8_0": weight(8, -128),
    "Q4_K": weight(4, 0, minimum=True, levels=True),
    "Q5_K": weight(5, 0, minimum=True, levels=True),
    "Q6_K": weight(6, -32, 16, levels=True),
    "groups of 128": weight(4, -8, 128),
    "8 bits and minimums": weight(8, -128, minimum=True),
    "zeros of 4 bits": with_zeros(83, WIDTH, 128, 4, random(83, WIDTH // 128).half().float()),
    "zeros of 8 bits": with_zeros(83, WIDTH, WIDTH, 8, random(83, 1).half().float()),
}


@pytest.fixture(scope="module", params=ENGINES)
def engines(request) -> list[NativeOps]:
    return ENGINES[request.param]


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 64, 101])
def test_products_are_those_of_the_reference(engines, form, rows):
    x, bias = random(rows, WIDTH, seed=rows), random(83, seed=7)
    ours = engines[-1].linear(x, engines[-1].prepare([WEIGHTS[form]], bias))
    theirs = REFERENCE.linear(x, REFERENCE.prepare([WEIGHTS[form]], bias))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max())


@pytest.mark.parametrize("form", WEIGHTS)
@given(rows=st.integers(1, 210), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_rows_do_not_know_each_other(engines, form, rows, seed):
    x = random(rows, WIDTH, seed=seed)
    packed = engines[0].prepare([WEIGHTS[form]])
    whole = engines[0].linear(x, packed)
    some = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: 1 + seed % rows]
    for ops in engines:
        assert torch.equal(ops.linear(x[some], packed), whole[some])
        assert torch.equal(ops.linear(x[-1:], packed), whole[-1:])


@pytest.mark.parametrize("form", WEIGHTS)
def test_all_instruction_sets_give_the_same_bits(form):
    x = random(21, WIDTH) * torch.logspace(-3, 3, WIDTH)
    first, *others = [ops[0].linear(x, ops[0].prepare([WEIGHTS[form]])) for ops in ENGINES.values()]
    for other in others:
        assert torch.equal(first, other)


def test_layers_of_several_forms_take_each_as_it_is(engines):
    parts = [WEIGHTS["Q4_K"], WEIGHTS["Q4_K"], WEIGHTS["Q6_K"], dense(random(7, WIDTH)), WEIGHTS["Q8_0"]]
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


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_largest_codes_do_not_overflow(engines, bits):
    low = -(2 ** (bits - 1))
    codes = torch.full((16, 64), low, dtype=torch.int8)
    packed = engines[0].prepare([grouped_int(codes, torch.ones(16, 2), None, 32, bits)])
    for sign in (1.0, -1.0):
        for rows in (1, 12):
            x = torch.full((rows, 64), 127.0 * sign)
            assert torch.equal(engines[0].linear(x, packed), torch.full((rows, 16), 127.0 * sign * low * 64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_row_alone(engines, bad):
    packed, x = engines[0].prepare([WEIGHTS["Q4_1"]]), random(12, WIDTH)
    clean = engines[0].linear(x, packed)
    x[5, 700] = bad
    spoilt = engines[0].linear(x, packed)
    assert spoilt[5].isnan().all()
    keep = torch.arange(12) != 5
    assert torch.equal(spoilt[keep], clean[keep])


def test_weights_that_ask_for_integer_inputs_get_them_and_those_of_float8_keep_theirs():
    ops, x = NativeOps(activations="auto"), random(3, WIDTH)
    integers, floats = ops.prepare([weight(8, -128, WIDTH)]), ops.prepare([scaled_float(83, WIDTH, (83, WIDTH), torch.ones(1, 1))])
    assert integers.activations == "int8"
    assert floats.activations == ("bf16" if ops.isa == "amx" else "f32")
    assert torch.equal(ops.linear(x, integers), ENGINES[ops.isa][0].linear(x, ENGINES[ops.isa][0].prepare([weight(8, -128, WIDTH)])))


def test_zeros_and_tiny_numbers_give_zeros(engines):
    packed = engines[0].prepare([WEIGHTS["Q4_1"]])
    for x in (torch.zeros(3, WIDTH), torch.full((3, WIDTH), 1e-40)):
        assert torch.equal(engines[0].linear(x, packed), torch.zeros(3, 83))
