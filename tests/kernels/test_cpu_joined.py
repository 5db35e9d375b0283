"""Neighbours on a tape that become one op give what they give apart, to the last bit; what others read is left to them."""

import pytest
import torch

from tests.kernels.eager import NativeOps
from tests.kernels.paged import grouped, random

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
from headrace.kernels.cpu.recorder import Recorder  # noqa: E402

HIDDEN, MLP = 1344, 160
"""Some stretches of unpacked inputs; a number of steps that threads cannot share evenly."""
ROWS = [1, 3, 4, 8, 9, 16, 17, 33, 48, 200, 400]


@pytest.fixture(scope="module", params=cpu.INSTRUCTION_SETS)
def engines(request) -> list[NativeOps]:
    return [NativeOps(threads, request.param, "int8") for threads in (1, 2, 3)]


FORMS = {
    "4 bits": (32, 4, -8, False),
    "4 bits and minimums": (32, 4, 0, True),
    "6 bits in groups of 16": (16, 6, -32, False),
    "6 bits and minimums": (32, 6, 0, True),
    "8 bits": (32, 8, -128, False),
    "8 bits and minimums": (32, 8, -128, True),
}


def names(recorder: Recorder) -> list[str]:
    return [work.op for work in recorder.works()]


def both_ways(ops: NativeOps, record, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str], list[str]]:
    """Results where the last value alone is wanted, and where all are; and the ops of either tape."""
    tapes: list[Recorder] = []

    def wanted(all_of_them: bool):
        def recorded(recorder: Recorder, *values):
            tapes.append(recorder)
            given = record(recorder, *values)
            return given if all_of_them else given[-1:]

        return recorded

    joined = ops._run(wanted(False), list(inputs))
    apart = ops._run(wanted(True), list(inputs))
    return joined, apart, names(tapes[0]), names(tapes[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("activation", "biased"), [("silu", True), ("gelu_tanh", False)])
def test_a_product_and_its_gates(engines, form, activation, biased):
    weights = [grouped(MLP, HIDDEN, *FORMS[form]), grouped(MLP, HIDDEN, *FORMS[form])]
    gate_up = engines[0].prepare(weights, random(2 * MLP, seed=3) if biased else None)
    down = engines[0].prepare([grouped(96, MLP, *FORMS[form])])

    def record(recorder, x):
        halves = recorder.linear(x, gate_up)
        inner = recorder.gated(halves, activation)
        return [halves, inner, recorder.linear(inner, down)]

    for ops in engines:
        for rows in ROWS:
            joined, apart, one, many = both_ways(ops, record, random(rows, HIDDEN, seed=rows))
            assert one == ["input", "quantize", "linear_gated", "linear"]
            assert many == ["input", "quantize", "linear", "gated", "quantize", "linear"]
            assert torch.equal(joined[0], apart[2])


def test_halves_of_two_kinds_are_gated_after_their_product(engines):
    gate_up = engines[0].prepare([grouped(MLP, HIDDEN, 32, 4, 0, True), grouped(MLP, HIDDEN, 32, 8, -128, True)])
    down = engines[0].prepare([grouped(96, MLP, 32, 4, 0, True)])

    def record(recorder, x):
        halves = recorder.linear(x, gate_up)
        inner = recorder.gated(halves, "silu")
        return [halves, inner, recorder.linear(inner, down)]

    for rows in ROWS:
        joined, apart, one, _ = both_ways(engines[1], record, random(rows, HIDDEN, seed=rows))
        assert one == ["input", "quantize", "linear", "gated", "linear"]
        assert torch.equal(joined[0], apart[2])


@pytest.mark.parametrize("form", ["4 bits and minimums", "6 bits in groups of 16"])
def test_a_norm_and_what_it_is_quantized_for(engines, form):
    weight = engines[0].prepare([grouped(96, MLP, *FORMS[form])])
    norm = engines[0]._vector(random(MLP, seed=7))

    def record(recorder, x, residual):
        normed = recorder.rmsnorm(x, norm, 1e-6)
        after, total = recorder.add_rmsnorm(recorder.linear(normed, square), residual, norm, 1e-6)
        return [normed, after, total, recorder.linear(after, weight)]

    square = engines[0].prepare([grouped(MLP, MLP, *FORMS[form])])
    for ops in engines:
        for rows in ROWS:
            joined, apart, one, many = both_ways(ops, record, random(rows, MLP, seed=rows), random(rows, MLP, seed=rows + 1))
            assert one == ["input", "input", "rmsnorm", "linear", "add_rmsnorm", "linear"]
            assert many == ["input", "input", "rmsnorm", "quantize", "linear", "add_rmsnorm", "quantize", "linear"]
            assert torch.equal(joined[0], apart[3])


def test_who_reads_the_same_codes_reads_them_together(engines):
    weight = engines[0].prepare([grouped(96, MLP, *FORMS["4 bits and minimums"])])
    other = engines[0].prepare([grouped(96, MLP, *FORMS["8 bits and minimums"])])
    third = engines[0].prepare([grouped(96, MLP, *FORMS["4 bits"])])
    tapes = []

    def record(recorder, x):
        tapes.append(recorder)
        return [recorder.linear(x, one) for one in (weight, other, third)]

    x = random(5, MLP)
    results = engines[1]._run(record, [x])
    # Without minimums, sums are not scaled.
    assert names(tapes[0]) == ["input", "quantize", "linear", "linear", "quantize", "linear"]
    for result, one in zip(results, (weight, other, third), strict=True):
        assert torch.equal(result, engines[1].linear(x, one))


def test_two_readers_of_floats_get_them(engines):
    weight = engines[0].prepare([grouped(96, MLP, *FORMS["4 bits"])])
    norm = engines[0]._vector(random(MLP, seed=7))
    tapes = []

    def record(recorder, x):
        tapes.append(recorder)
        normed = recorder.rmsnorm(x, norm, 1e-6)
        return [recorder.linear(normed, weight), recorder.add(normed, x)]

    x = random(5, MLP)
    _, added = engines[1]._run(record, [x])
    assert names(tapes[0]) == ["input", "rmsnorm", "quantize", "linear", "add"]
    assert torch.equal(added, engines[1].rmsnorm(x, random(MLP, seed=7), 1e-6) + x)
