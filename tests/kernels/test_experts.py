"""Mixtures of experts: the reference against the formula, the native ops against the reference, every row the same bits in any company."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.reference.experts import route
from headrace.kernels.weights import Weight
from tests.kernels.eager import NativeOps, ReferenceOps
from tests.kernels.paged import dense, grouped_int, random, values_of

EXPERTS, USED, HIDDEN, WIDTH = 11, 3, 96, 64
REFERENCE = ReferenceOps()


def integers(n: int, k: int, seed: int, bits: int, group: int = 32, minimum: bool = False) -> Weight:
    low = 0 if minimum else -(2 ** (bits - 1))
    codes = torch.randint(low, low + 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int16).to(torch.int8)
    scales, minimums = (random(n, k // group, seed=seed + s).half().float() / 2**bits / 4 for s in (1, 2))
    return grouped_int(codes, scales, minimums if minimum else None, group, bits)


FORMS = {
    "float32": lambda n, k, seed: dense(random(n, k, seed=seed) / k**0.5),
    "bfloat16": lambda n, k, seed: dense((random(n, k, seed=seed) / k**0.5).bfloat16()),
    "4 bits and minimums": lambda n, k, seed: integers(n, k, seed, 4, minimum=True),
    "4 bits": lambda n, k, seed: integers(n, k, seed, 4),
    "6 bits": lambda n, k, seed: integers(n, k, seed, 6, 16),
    "8 bits": lambda n, k, seed: integers(n, k, seed, 8),
}


def stacks(gate: str, up: str, down: str, hidden: int = HIDDEN, width: int = WIDTH, experts: int = EXPERTS):
    """Gate and up, and down, of each expert."""
    seeds = [100 * expert for expert in range(experts)]
    gate_up = [[FORMS[gate](width, hidden, seed), FORMS[up](width, hidden, seed + 10)] for seed in seeds]
    return gate_up, [[FORMS[down](hidden, width, seed + 20)] for seed in seeds]


def prepared(ops, forms: tuple[str, str, str], **sizes):
    gate_up, down = stacks(*forms, **sizes)
    hidden = sizes.get("hidden", HIDDEN)
    router = ops.prepare([dense(random(len(down), hidden, seed=9) / hidden**0.5 * 3)])
    return router, ops.prepare_experts(gate_up), ops.prepare_experts(down)


def mixture(ops, x: torch.Tensor, parts, used: int = USED, renormalize: bool = True, activation: str = "silu") -> torch.Tensor:
    router, gate_up, down = parts
    return ops.mixture(x, router, used, renormalize, gate_up, down, activation)


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_reference_computes_the_formula(renormalize):
    gate_up, down = stacks("float32", "float32", "float32")
    parts, x = prepared(REFERENCE, ("float32", "float32", "float32")), random(23, HIDDEN, seed=1)
    shares = torch.softmax(x.double() @ (random(EXPERTS, HIDDEN, seed=9) / HIDDEN**0.5 * 3).double().T, -1)
    weights, chosen = shares.topk(USED)
    if renormalize:
        weights /= weights.sum(-1, keepdim=True)
    expected = torch.zeros(23, HIDDEN, dtype=torch.float64)
    for row in range(23):
        for weight, expert in zip(weights[row], chosen[row].tolist(), strict=True):
            gate, up = (values_of(one).double() @ x[row].double() for one in gate_up[expert])
            expected[row] += weight * (values_of(down[expert][0]).double() @ (F.silu(gate) * up))
    assert (mixture(REFERENCE, x, parts, renormalize=renormalize) - expected).abs().max() < 1e-5


def test_equal_logits_go_to_the_lower_expert_and_what_is_not_a_number_shows():
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, -0.0, 0.0, -1.0], [1.0, float("nan"), 3.0, 2.0]])
    routing = route(logits, 3, True)
    assert routing.experts.tolist() == [[1, 2, 0], [0, 1, 2], [1, 2, 3]]
    assert routing.weights[1].tolist() == pytest.approx([1 / 3] * 3)
    assert routing.weights[2].isnan().all()
    assert route(logits, 1, False).weights[1].item() == pytest.approx(1 / (3 + 0.36787944))


@pytest.mark.parametrize("used", [0, 12])
def test_a_number_of_experts_that_there_is_not_is_refused(used):
    with pytest.raises(ValueError, match=f"{used} of 11 experts cannot be used"):
        mixture(REFERENCE, random(1, HIDDEN), prepared(REFERENCE, ("float32", "float32", "float32")), used)


@pytest.mark.parametrize("form", ["float32", "4 bits and minimums"])
def test_a_row_of_the_reference_does_not_know_who_else_goes_to_its_experts(form):
    parts, x = prepared(REFERENCE, (form, form, form)), random(70, HIDDEN, seed=5)
    whole = mixture(REFERENCE, x, parts)
    for first, last in ((0, 1), (5, 6), (3, 19), (20, 70)):
        assert torch.equal(mixture(REFERENCE, x[first:last], parts), whole[first:last])


cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
ENGINES = {
    (isa, activations): [NativeOps(threads, isa, activations) for threads in (1, 3)]
    for isa in cpu.INSTRUCTION_SETS
    for activations in ("f32", "int8", "bf16")
}
MIXED = [
    ("float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("4 bits and minimums", "4 bits and minimums", "6 bits"),
    ("4 bits", "8 bits", "4 bits"),
    ("6 bits", "float32", "8 bits"),
]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def engines(request) -> list[NativeOps]:
    return ENGINES[request.param]


@pytest.mark.parametrize("forms", MIXED, ids="|".join)
@pytest.mark.parametrize("rows", [1, 40])
def test_native_experts_give_what_the_reference_gives(engines, forms, rows):
    reference = ReferenceOps(engines[0].backend._activations)
    x = random(rows, HIDDEN, seed=rows)
    for renormalize, activation in ((True, "silu"), (False, "gelu_tanh")):
        expected = mixture(reference, x, prepared(reference, forms), USED, renormalize, activation)
        got = mixture(engines[-1], x, prepared(engines[-1], forms), USED, renormalize, activation)
        # Where activations are rounded, a last bit before it may decide a step of the rounding.
        bound = 1e-5 if engines[0].backend._activations == "f32" else 1e-2
        assert (got - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("forms", MIXED, ids="|".join)
@given(rows=st.integers(1, 90), seed=st.integers(0, 1000))
@settings(max_examples=2)
def test_a_row_does_not_know_who_else_goes_to_its_experts(engines, forms, rows, seed):
    parts, x = prepared(engines[0], forms), random(rows, HIDDEN, seed=seed)
    whole = mixture(engines[0], x, parts)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    some = order[: 1 + seed % rows]
    for ops in engines:
        for chosen in (order, some, order[:1]):
            assert torch.equal(mixture(ops, x[chosen], parts), whole[chosen])


def test_widths_need_not_be_whole_panels_and_one_expert_is_a_plain_mlp(engines):
    x = random(5, 40, seed=2)
    gate_up, down = stacks("float32", "float32", "float32", 40, 13, 1)
    ops = engines[-1]
    router = ops.prepare([dense(random(1, 40, seed=3))])
    plain = ops.linear(ops.gated(ops.linear(x, ops.prepare(gate_up[0])), "silu"), ops.prepare(down[0]))
    assert torch.equal(mixture(ops, x, (router, ops.prepare_experts(gate_up), ops.prepare_experts(down)), 1), plain)


def test_native_choices_are_by_logit_then_by_number(engines):
    """Experts that give their own number: what is added up tells which were chosen, and how they count."""
    ops, experts = engines[-1], 9
    logits = torch.tensor([[1.0, 2, 2, 1, 0, 0, 0, 0, 0], [0.0, -0.0, 0, -1, -1, -1, -1, -1, -1], [3.0, 1, 2, -5, 9, 9, 9, 9, -5]])
    x = torch.cat([logits, torch.ones(3, 1)], 1)  # the last input is what experts read
    router = ops.prepare([dense(torch.cat([torch.eye(experts), torch.zeros(experts, 1)], 1))])
    one = torch.zeros(2, experts + 1)
    one[:, -1] = 50.0  # silu(50) is 50
    gate_up = ops.prepare_experts([[dense(one[:1]), dense(one[1:])] for _ in range(experts)])
    down = ops.prepare_experts([[dense(F.one_hot(torch.tensor([[e]]), experts)[0].T.float() / 2500)] for e in range(experts)])
    for renormalize in (True, False):
        got = ops.mixture(x, router, 3, renormalize, gate_up, down, "silu")
        expected = route(logits, 3, renormalize)
        weights = torch.zeros(3, experts).scatter(1, expected.experts, expected.weights)
        assert (got - weights).abs().max() < 1e-6
    x[0, 4] = torch.nan
    got = ops.mixture(x, router, 3, True, gate_up, down, "silu")
    assert got[0].isnan().any() and not got[1:].isnan().any()


def test_experts_that_differ_in_form_or_number_are_refused():
    ops = NativeOps(1)
    gate_up, _ = stacks("float32", "float32", "float32")
    with pytest.raises(ValueError, match="experts must have weights of one form"):
        ops.prepare_experts([*gate_up[:2], [FORMS["4 bits"](WIDTH, HIDDEN, 1)] * 2])
    with pytest.raises(ValueError, match="there are weights of 11 experts: it must be 12"):
        ops.backend.prepare_experts("w", 12, lambda: gate_up)
    with pytest.raises(ValueError, match="the router chooses among 11 experts, there are 11 and 2"):
        router, gate_up, _ = prepared(ops, ("float32", "float32", "float32"))
        mixture(ops, random(1, HIDDEN), (router, gate_up, ops.prepare_experts([[FORMS["float32"](HIDDEN, WIDTH, 1)]] * 2)))


def test_experts_are_kept_and_mapped(tmp_path):
    forms = ("4 bits and minimums", "4 bits", "6 bits")
    gate_up, down = stacks(*forms)
    x, outs = random(7, HIDDEN), []
    for kept in (False, True):
        ops = NativeOps(1)
        ops.backend.keep(tmp_path, "1")
        store = ops.backend._store
        assert store is not None

        def asked(weights, kept=kept):
            assert not kept, "what is kept is not asked for"
            return weights

        router = ops.backend.prepare("router", lambda: [dense(random(EXPERTS, HIDDEN, seed=9))])
        layers = [
            ops.backend.prepare_experts(name, EXPERTS, lambda w=weights: asked(w)) for name, weights in (("gate", gate_up), ("down", down))
        ]
        outs.append(mixture(ops, x, (router, *layers)))
        if not kept:
            store._write(store._fresh)
    assert torch.equal(*outs)
