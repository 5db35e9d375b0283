"""The checks of `triton_parity.py` for mixtures of experts: what they give beside the reference, in any company to the bit, and how tokens
are sorted. `Company` is what they need of those checks."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from headrace.kernels.reference.experts import experts as reference_experts
from headrace.kernels.reference.experts import route as reference_route
from headrace.kernels.reference.linear import prepare
from headrace.kernels.triton import TritonBackend, TritonOps
from headrace.kernels.triton.experts import Routing, route
from headrace.kernels.weights import Weight
from tests.kernels.paged import dense, random

EXPERTS, USED = 5, 2
CPU = torch.device("cpu")


class Company(Protocol):
    backend: TritonBackend
    ops: TritonOps
    device: torch.device
    dtype: torch.dtype
    full: bool


def checks(
    company: Company, kinds: list[str], weight_of: Callable[[str, int, int], Weight], error_of: Callable, bound: float
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, what gives the error, and the most that it may be."""
    few = [(1, 96, 64), (40, 96, 64), (70, 160, 96)]
    for kind in kinds:
        # Where inputs are rounded to 8 bits, a last bit before that may decide a step; with a static scale, one that is no row's own.
        most = max(4 * bound if kind.endswith("static") else bound, 3e-2) if " x " in kind else bound
        for rows, *sizes in [*few, (700, 640, 1088)] if company.full else few:
            name = f"experts {kind} {'x'.join(map(str, (rows, *sizes)))}"
            yield name, lambda a=(kind, *sizes), n=rows: Mixture(company, weight_of, *a).error(n, error_of), most
        yield f"experts {kind} rows alone and together", lambda kind=kind: Mixture(company, weight_of, kind, 160, 1088).rows(), 0
    yield "experts sorted", lambda: sorted_wrongly(company), 0
    yield "experts chosen", lambda: chosen_wrongly(company), 1e-6


class Mixture:
    """Experts of one kind of weight, of which one is never chosen."""

    def __init__(self, company: Company, weight_of: Callable[[str, int, int], Weight], kind: str, hidden: int, width: int) -> None:
        self.company, self.hidden = company, hidden

        def own(n: int, k: int, seed: int) -> Weight:
            return weight_of(kind, n, k).take(np.random.default_rng(seed).permutation(n))

        self.gate_up = [[own(width, hidden, e), own(width, hidden, 100 + e)] for e in range(EXPERTS)]
        self.down = [[own(hidden, width, 200 + e)] for e in range(EXPERTS)]
        router = random(EXPERTS, hidden, seed=9) / hidden**0.5
        router[3, 0] = -100.0
        self.router = dense(router)

    @property
    def rounds(self) -> bool:
        """Whether the weights' format wants inputs rounded."""
        return self.down[0][0].inputs is not None

    def inputs(self, rows: int) -> torch.Tensor:
        x = random(rows, self.hidden, seed=rows)
        x[:, 0] = 1.0
        return x.to(self.company.dtype)

    def prepared(self) -> tuple:
        backend = self.company.backend
        backend._prepared.clear()
        layers = [backend.prepare_experts(name, EXPERTS, lambda w=w: w) for name, w in (("gate_up", self.gate_up), ("down", self.down))]
        return backend.prepare("router", lambda: [self.router]), *layers

    def given(self, x: torch.Tensor, parts: tuple) -> torch.Tensor:
        router, gate_up, down = parts
        ops = self.company.ops
        x = x.to(self.company.device)
        return ops.experts(x, ops.route(x, router, USED, True), gate_up, down, "silu")

    def error(self, rows: int, error_of: Callable) -> Any:
        """What `error_of` says of the op beside the reference."""
        x = self.inputs(rows)
        activations = "auto" if self.rounds else "f32"
        gate_up, down = ([prepare(stack, None, CPU, activations) for stack in stacks] for stacks in (self.gate_up, self.down))
        routing = reference_route(x.float() @ torch.from_numpy(self.router.dequantize()).T, USED, True)
        assert not (routing.experts == 3).any(), "one expert is to have no token"
        return error_of(self.given(x, self.prepared()), reference_experts(x.float(), routing, gate_up, down, "silu"))

    def rows(self) -> int:
        """Few tokens an expert, more, and many where that is quick."""
        total = 800 if self.company.full else 70
        x, parts = self.inputs(total), self.prepared()
        whole = self.given(x, parts)
        cuts = [(0, 1), (5, 6), (3, 19), (1, 40), (20, 36), *([(30, 94), (7, 260)] if self.company.full else [])]
        return sum(int((self.given(x[a:b].contiguous(), parts) != whole[a:b]).sum()) for a, b in cuts)


def sorted_wrongly(company: Company) -> int:
    """Of some batches, those whose pairs are not sorted, or not each in one tile of its expert, or that have a tile beside all pairs."""
    wrong = 0
    for tokens, used, experts in [(1, 8, 128), (3, 2, 3), (40, 2, 5), (33, 8, 40), (260, 4, 6), (64, 1, 1)]:
        logits = random(tokens, experts, seed=tokens)
        logits[:, experts // 2 :] -= 2.0
        routing = route(logits.to(company.device), used, True)
        wrong += not _is_sorted(routing, tokens, used)
    return wrong


def _is_sorted(routing: Routing, tokens: int, used: int) -> bool:
    chosen, order, places = (x.cpu().flatten().tolist() for x in (routing.chosen, routing.tiles.order, routing.places))
    if order != sorted(range(tokens * used), key=lambda pair: (chosen[pair], pair)) or [order[place] for place in places] != [
        *range(tokens * used)
    ]:
        return False
    seen: list[int] = []
    for expert, begin, end in routing.tiles.table.cpu().tolist():
        if (
            not 0 <= begin <= end <= len(order)
            or (begin == end and end)
            or end - begin > routing.tiles.tokens
            or any(chosen[order[place]] != expert for place in range(begin, end))
        ):
            return False
        seen += range(begin, end)
    return sorted(seen) == [*range(tokens * used)]


def chosen_wrongly(company: Company) -> float:
    """How far weights are from the reference's; 1 where the choice is another."""
    apart, logits = [], random(9, 21, seed=4) * 3
    logits[0] = 0.0
    logits[1, 5:9] = 7.0
    logits[2, 3] = torch.nan
    logits[3, 4], logits[3, 5] = -0.0, 0.0
    for used, renormalize in ((1, False), (6, True), (6, False), (21, True)):
        got, expected = route(logits.to(company.device), used, renormalize), reference_route(logits, used, renormalize)
        known = [row for row in range(9) if row != 2]
        if not torch.equal(got.chosen.cpu()[known].long(), expected.experts[known]):
            return 1.0
        if got.chosen[2, 0] != 3 or not got.weights[2].isnan().all():
            return 1.0
        apart.append(float((got.weights.cpu() - expected.weights)[known].abs().max()))
    return float(np.max(apart))
