"""Every op of the Triton backend against the reference, on a GPU or in Triton's interpreter: run as a program, since Triton decides when
it is imported how kernels run.

    python -m tests.kernels.triton_parity --device cuda              all types
    TRITON_INTERPRET=1 python -m tests.kernels.triton_parity --device cpu    float32 alone: the interpreter rounds other types wrongly

Prints a line of JSON for each check, `{"check": …, "type": …, "error": …, "largest": …, "bound": …, "ok": …}`, and ends with 1 if one
fails. Errors are ‖out − reference‖ / ‖reference‖, with the largest |out − reference| beside them; those of invariance are counts of values
that are not the same bits. `scripts/kernel-parity` makes a table of them.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random as random_numbers
from typing import NamedTuple

import numpy as np
import torch

from headrace.kernels.ops import Batch, HeadShape, RopeTable
from headrace.kernels.reference import sampling
from headrace.kernels.reference.linear import prepare as prepare_reference
from headrace.kernels.triton import TritonBackend, TritonOps
from headrace.kernels.triton.pages import SCALED, TYPES, KVPages
from headrace.kernels.triton.step import StepTokens
from headrace.kernels.weights import GroupedInt, InputRounding, ScaledFloat, Weight
from tests.kernels.drafts_parity import checks as drafts_checks
from tests.kernels.draws import batch_of, logits_of, settings
from tests.kernels.eager import ReferenceOps
from tests.kernels.experts_parity import checks as experts_checks
from tests.kernels.paged import Paged, dense, paged, random

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
ROUNDED_ONCE = {torch.float32: 2e-6, torch.float16: 2.9e-4, torch.bfloat16: 2.3e-3}
"""Where nothing but the result is rounded to the type: to the nearest makes 2.1e-4 and 1.7e-3, cutting makes twice as much."""
REFERENCE = ReferenceOps()


FLOAT8_BOUND = 4e-4
"""Hopper's tensor cores add float8 products in some 14 bits."""
EIGHT_BITS = ("int8 x int8", "e4m3 x e4m3", "e4m3 x e4m3 static", "e4m3 x e4m3 blocks")
"""Weights with inputs that are rounded to 8 bits."""


def weight_of(kind: str, n: int, k: int) -> Weight:
    """A weight of some numbers, the same for the same arguments."""
    if kind in (*EIGHT_BITS, "e4m3 blocks"):
        return eight_bits(kind, n, k)
    if kind == "int4 zeros":
        dice = np.random.default_rng(n + k)
        scales = dice.uniform(0.01, 0.1, (n, k // 32)).astype(np.float16).astype(np.float32)
        return GroupedInt(dice.integers(0, 16, (n, k), np.int8), scales, None, 32, 4, dice.integers(0, 16, (n, k // 32), np.int8))
    if kind == "int4 in long groups":
        scales = np.random.default_rng(n).uniform(0.01, 0.1, (n, 1)).astype(np.float32)
        return GroupedInt(np.random.default_rng(n + k).integers(-8, 8, (n, k), np.int8), scales, None, k, 4)
    if kind == "int4":
        dice = np.random.default_rng(n + k)
        codes = dice.integers(0, 16, (n, k), np.int8)
        scales, minimums = (
            dice.uniform(low, high, (n, k // 32)).astype(np.float16).astype(np.float32) for low, high in ((0.01, 0.1), (-0.5, 0))
        )
        return GroupedInt(codes, scales, minimums, 32, 4)
    if kind == "int8":
        dice = np.random.default_rng(n + k)
        return GroupedInt(
            dice.integers(-128, 128, (n, k), np.int8), dice.uniform(0.001, 0.01, (n, k // 32)).astype(np.float32), None, 32, 8
        )
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[kind]
    return dense((random(n, k, seed=n + k) / k**0.5).to(dtype))


def eight_bits(kind: str, n: int, k: int) -> Weight:
    """One of EIGHT_BITS, or float8 in blocks with inputs as they are."""
    dice = np.random.default_rng(n + k)
    if kind == "int8 x int8":
        scales = dice.uniform(0.001, 0.01, (n, 1)).astype(np.float32)
        return GroupedInt(dice.integers(-127, 128, (n, k), np.int8), scales, None, k, 8, None, InputRounding("int8"))
    codes = (random(n, k, seed=n + k) * 40).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if "blocks" in kind:
        outputs = 64 if n % 128 else 128
        scales = dice.uniform(0.001, 0.01, (-(-n // outputs), -(-k // 128))).astype(np.float32)
        return ScaledFloat(codes, scales, (outputs, 128), InputRounding("e4m3", 128) if "x" in kind else None)
    if "static" in kind:
        return ScaledFloat(codes, np.full((1, 1), 0.003, np.float32), (n, k), InputRounding("e4m3", None, 0.011))
    return ScaledFloat(codes, dice.uniform(0.001, 0.01, (n, 1)).astype(np.float32), (1, k), InputRounding("e4m3"))


class Difference(NamedTuple):
    """Of values from what they should be."""

    relative: float
    """Norm of the differences beside that of what should be."""
    largest: float
    """The largest difference."""


def error_of(got: torch.Tensor, expected: torch.Tensor) -> Difference:
    got, expected = got.float().cpu(), expected.float().cpu()
    apart = got - expected
    return Difference(float(apart.norm() / expected.norm().clamp_min(1e-30)), float(apart.abs().max()))


def worst(differences: Iterable[Difference]) -> Difference:
    """The largest of each; NaN where there is one, which `max` may pass over."""
    return Difference(*np.max(list(differences), 0).tolist())


class Checks:
    """All checks on one device for activations of one type."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.backend = TritonBackend(device, dtype)
        self.ops = TritonOps(dtype, dtype)
        self.device, self.dtype = torch.device(device), dtype
        self.full = device != "cpu"

    def all(self) -> Iterator[tuple[str, Callable[[], float | Difference], float]]:
        """Name, what gives the error, and the most that it may be."""
        bound, once = BOUNDS[self.dtype], ROUNDED_ONCE[self.dtype]
        kinds = ["float32"] if self.dtype == torch.float32 else ["bfloat16" if self.dtype == torch.bfloat16 else "float16"]
        shapes = [(64, 96), (100, 576), (72, 2048 + 32), (256, 640)]
        kinds += ["int4", "int8", "int4 zeros", "int4 in long groups", "e4m3 blocks", *EIGHT_BITS]
        for kind in kinds:
            for n, k in shapes if "blocks" in kind else shapes[:3]:
                for rows in (1, 17, 150) if self.full and (n, k) == shapes[-1] else (1, 17) if (n, k) == shapes[1] else (17,):
                    # A last bit before that may decide to which code an input is rounded.
                    most = max(bound, FLOAT8_BOUND) if kind in EIGHT_BITS else once
                    yield f"linear {kind} {rows}x{n}x{k}", lambda a=(kind, rows, n, k): self.linear(*a), most
            yield f"linear {kind} rows alone and together", lambda kind=kind: self.linear_rows(kind), 0
        yield "linear stacked with bias", self.stacked, bound
        yield "embed", self.embed, once
        yield "rmsnorm", lambda: self.norm(False), once
        yield "add_rmsnorm", lambda: self.norm(True), once
        for activation in ("silu", "gelu_tanh"):
            yield f"gated {activation}", lambda a=activation: self.gated(a), once
        if self.dtype == torch.float32:
            for shape in ("flat", "peaked", "ties", "infinite"):
                yield f"sampling {shape}", lambda shape=shape: self.sampling(shape), 0
            yield from drafts_checks(self.backend)
        pages = ["f32"] if self.dtype == torch.float32 else ["f16", "bf16"]
        for heads in (HeadShape(6, 2, 24), HeadShape(4, 4, 64), HeadShape(8, 2, 128)):
            for kind in [*pages, *SCALED]:
                worse = {"int8": 1.2e-2, "fp8": 5e-2}.get(kind, 0)
                stored = max(once, ROUNDED_ONCE[torch.bfloat16] if kind == "bf16" else 0)
                yield f"rope_write_kv {heads} {kind}", lambda a=(heads, kind): self.rope(*a), max(stored, worse)
                for window in (None, 40):
                    yield f"attention {heads} {kind} window {window}", lambda a=(heads, kind, window): self.attention(*a), max(bound, worse)
                if kind in SCALED:
                    yield f"attention {heads} {kind} of small values", lambda a=(heads, kind, None, 1e-4): self.attention(*a), 2e-3
                yield f"attention {heads} {kind} rows alone and together", lambda a=(heads, kind): self.attention_rows(*a), 0
                yield f"attention {heads} {kind} trees as paths", lambda a=(heads, kind): self.trees(*a), 0
        for kind in [*pages, *SCALED]:
            worse = {"int8": 1.2e-2, "fp8": 5e-2}.get(kind, 0)
            heads = HeadShape(9, 3, 64)
            yield f"attention {heads} {kind} at ends of pages", lambda a=(heads, kind): self.attention_at_ends(*a), max(bound, worse)
        yield "linear of no rows", self.no_rows, 0
        yield from experts_checks(self, [kinds[0], "int4", "int8", *EIGHT_BITS], weight_of, error_of, bound)

    def on(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return x.to(self.device, dtype or self.dtype)

    def prepared(self, *weights: Weight, bias: np.ndarray | None = None):
        self.backend._prepared.clear()
        return self.backend.prepare("w", lambda: weights, bias)

    def linear(self, kind: str, rows: int, n: int, k: int) -> Difference:
        weight, x = weight_of(kind, n, k), random(rows, k).to(self.dtype)
        expected = REFERENCE.linear(x.float(), prepare_reference([weight], None, torch.device("cpu"), "auto" if weight.inputs else "f32"))
        return error_of(self.ops.linear(self.on(x), self.prepared(weight)), expected)

    def linear_rows(self, kind: str) -> float:
        n, k, rows = (512, 4096, 300) if self.full else (128, 2080, 140)
        w, x = self.prepared(weight_of(kind, n, k)), self.on(random(rows, k))
        whole = self.ops.linear(x, w)
        # One, few, some and many tokens have kernels of their own, of which those of many alone add up the splits of K.
        cuts = [(0, 1), (5, 6), (3, 19), (1, 18), (20, 36), (30, 94), (7, 140), *([(100, 300)] if self.full else [])]
        return sum(int((self.ops.linear(x[a:b].contiguous(), w) != whole[a:b]).sum()) for a, b in cuts)

    def stacked(self) -> Difference:
        kind = "float32" if self.dtype == torch.float32 else "bfloat16"
        weights, bias = [weight_of(kind, n, 96) for n in (48, 16, 16)] + [weight_of("int8", 24, 96)], random(104, seed=3)
        x = random(5, 96).to(self.dtype)
        expected = REFERENCE.linear(x.float(), REFERENCE.prepare(weights, bias))
        return error_of(self.ops.linear(self.on(x), self.prepared(*weights, bias=bias.numpy())), expected)

    def embed(self) -> Difference:
        found = []
        for kind in ("float32", "bfloat16", "int4", "int8", "e4m3 blocks", "int8 x int8"):
            weight, ids = weight_of(kind, 50, 96), torch.tensor([3, 49, 0, 3], dtype=torch.int32)
            expected = REFERENCE.embed(ids, REFERENCE.prepare_table(weight), 2.5)
            got = self.ops.embed(StepTokens(*[ids.to(self.device)] * 5, 1, ()), self.prepared(weight), 2.5)
            found.append(error_of(got, expected))
        return worst(found)

    def norm(self, residual: bool) -> Difference:
        x, r, w = random(9, 100).to(self.dtype), random(9, 100, seed=1), random(100, seed=2)
        weight = self.backend.prepare_vector(w.numpy())
        if not residual:
            return error_of(self.ops.rmsnorm(self.on(x), weight, 1e-5), REFERENCE.rmsnorm(x.float(), w, 1e-5))
        got = self.ops.add_rmsnorm(self.on(x), self.on(r, torch.float32), weight, 1e-5)
        return worst(error_of(*pair) for pair in zip(got, REFERENCE.add_rmsnorm(x.float(), r, w, 1e-5), strict=True))

    def gated(self, activation: str) -> Difference:
        x = (random(7, 2 * 90) * 4).to(self.dtype)
        return error_of(self.ops.gated(self.on(x), activation), REFERENCE.gated(x.float(), activation))

    def sampling(self, shape: str) -> float:
        """Rows that get another token, or other log-probabilities, than the reference gives them."""
        dice, wrong = random_numbers(1), 0
        for vocabulary in (700, 5000):
            logits = logits_of(shape, 12, vocabulary, 1)
            batch = batch_of(*(settings(dice, vocabulary) for _ in range(12)))
            got, expected = self.backend.sample(self.on(logits, torch.float32), batch), sampling.sample(logits, batch)
            wrong += sum(a != b for a, b in zip(got.tokens, expected.tokens, strict=True))
            wrong += sum(a != b for a, b in zip(got.logprobs, expected.logprobs, strict=True))
        return wrong

    def pages_of(self, batch: Paged) -> KVPages:
        """The batch's pages on the device, NaN where no token has been written."""
        kv = batch.kv
        return KVPages(*(None if x is None else x.to(self.device) for x in (kv.keys, kv.values, kv.scales)))

    def tokens(self, batch: Batch) -> StepTokens:
        return StepTokens.of(batch, self.device)

    def rope(self, heads: HeadShape, kind: str) -> Difference:
        found = []
        for interleaved in (False, True):
            for norms in (False, True):
                batch = paged(heads, 16, [20, 3, 33, 16, 48], [20, 1, 7, 16, 0])
                width = (heads.query_heads + 2 * heads.kv_heads) * heads.dim
                qkv = random(batch.tokens, width, seed=5).to(self.dtype)
                angles = random(48, heads.dim // 2 - 2 * (not interleaved), seed=6)
                table = RopeTable(angles.cos().numpy(), angles.sin().numpy(), interleaved)
                weights = [random(heads.dim, seed=s) if norms else None for s in (8, 9)]
                expected_kv = batch.empty()
                expected = REFERENCE.rope_write_kv(qkv.float(), heads, table, *weights, 1e-5, expected_kv, batch.extents)
                kv = KVPages.new(len(batch.kv.keys), 16, heads, self.device, kind)
                on_device = [None if w is None else w.to(self.device) for w in weights]
                tokens = self.tokens(batch.extents.batch())
                got = self.ops.rope_write_kv(self.on(qkv), heads, self.backend.prepare_rope(table), *on_device, 1e-5, kv, tokens)
                found.append(error_of(got, expected))
                for which, (room, right) in enumerate(((kv.keys, expected_kv.keys), (kv.values, expected_kv.values))):
                    room = room.float().cpu()
                    if kv.scales is not None:
                        room *= kv.scales[:, :, which].cpu()[..., None]
                    written = ~right.isnan()
                    found.append(error_of(room[written], right[written]))
                    assert not room[~written].any(), "something was written beside the slots"
        return worst(found)

    def attend(self, batch: Paged, q: torch.Tensor, window: int | None, extents: Batch | None = None) -> torch.Tensor:
        kv = self.pages_of(batch)
        tokens = self.tokens(extents or batch.extents.batch())
        return self.ops.attention(self.on(q, kv.multiplied_as), batch.heads, kv, tokens, batch.heads.dim**-0.5, window)

    def attention(self, heads: HeadShape, kind: str, window: int | None, scale: float = 1.0) -> Difference:
        contexts = ([700, 5, 130, 64, 1], [1, 5, 40, 1, 1]) if self.full else ([300, 5, 40], [1, 5, 30])
        batch = paged(heads, 16, *contexts)
        batch.kv.values.mul_(scale)
        batch = batch.stored(kind)
        q = batch.query().to(TYPES["f16" if kind in SCALED else kind])
        expected = REFERENCE.attention(q.float(), heads, batch.kv, batch.extents, heads.dim**-0.5, window)
        return error_of(self.attend(batch, q, window), expected)

    def attention_at_ends(self, heads: HeadShape, kind: str) -> Difference:
        """Contexts that end with a page or a split, or begin one, and a request without rows."""
        batch = paged(heads, 16, [16, 32, 33, 48, 257, 256], [16, 1, 2, 0, 1, 17]).stored(kind)
        q = batch.query().to(TYPES["f16" if kind in SCALED else kind])
        expected = REFERENCE.attention(q.float(), heads, batch.kv, batch.extents, heads.dim**-0.5, None)
        return error_of(self.attend(batch, q, None), expected)

    def no_rows(self) -> int:
        """Ops that give rows where there are none."""
        heads = HeadShape(2, 1, 16)
        batch = paged(heads, 16, [20], [0]).stored("f32")
        given = [
            self.ops.linear(self.on(torch.empty(0, 96)), self.prepared(weight_of("float32", 64, 96))),
            self.ops.rmsnorm(self.on(torch.empty(0, 96)), self.backend.prepare_vector(np.ones(96, np.float32)), 1e-5),
            self.ops.gated(self.on(torch.empty(0, 96)), "silu"),
            self.attend(batch, batch.query(), None),
        ]
        return sum(x.numel() for x in given)

    def attention_rows(self, heads: HeadShape, kind: str) -> float:
        """Chunks of one, of some, and all at once, alone and among others."""
        contexts = ([600, 90], [200, 1]) if self.full else ([290, 20], [40, 1])
        batch = paged(heads, 16, *contexts).stored(kind)
        q, wrong = batch.query(), 0
        for window in (None, 100):
            whole = self.attend(batch, q, window)
            for first, last in ((0, 1), (3, 4), (2, 30), (31, 40)):
                rows, part = batch.part(0, first, last)
                wrong += int((self.attend(part, q[rows], window) != whole[rows]).sum())
        return wrong

    def trees(self, heads: HeadShape, kind: str) -> float:
        batch = paged(heads, 16, [280, 20], [9, 1]).stored(kind).as_tree(0, [-1, 0, 0, 1, 2, 1, 5, -1, 7])
        q = batch.query()
        whole, wrong = self.attend(batch, q, None), 0
        for row in range(9):
            path = batch.path(0, row)
            wrong += int((self.attend(path, q[row : row + 1], None) != whole[row : row + 1]).sum())
        return wrong


@dataclass(frozen=True, slots=True)
class Check:
    """One of all checks on a device."""

    name: str
    dtype: torch.dtype
    error: Callable[[], float | Difference]
    bound: float

    @property
    def type(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return f"{self.name} {self.type}"

    def outcome(self) -> dict:
        """Its line."""
        line, begun = {"check": self.name, "type": self.type, "bound": self.bound}, time.perf_counter()
        try:
            found = self.error()
            error, largest = found if isinstance(found, Difference) else (found, None)
            line |= {"error": error, "largest": largest, "ok": error <= self.bound}
        except Exception as failure:
            line |= {"error": None, "ok": False, "why": f"{failure!r}"[:400], "where": traceback.format_exc()[-1500:]}
        return line | {"seconds": round(time.perf_counter() - begun, 4)}


def every(device: str) -> list[Check]:
    """All checks, in the same order every time."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    dtypes = [torch.float32] if interpreted else [torch.bfloat16, torch.float16, torch.float32]
    checks = [Check(name, dtype, error, bound) for dtype in dtypes for name, error, bound in Checks(device, dtype).all()]
    if interpreted:
        # It multiplies matrices by a BLAS, whose rows know their neighbours, and rounds to float8 wrongly.
        return [check for check in checks if check.bound and "e4m3 x" not in check.name and "fp8" not in check.name]
    return checks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th check from the I-th on")
    parser.add_argument("--asked", action="store_true", help="those whose number in the list of all a line of stdin says, as it comes")
    arguments = parser.parse_args()
    checks = every(arguments.device)
    if arguments.asked:
        chosen: Iterable[Check] = (checks[int(line)] for line in sys.stdin)
    else:
        first, step = arguments.shard
        chosen = [check for check in checks if arguments.only in check.name][first::step]
    failed = 0
    for check in chosen:
        line = check.outcome()
        failed += not line["ok"]
        print(json.dumps(line), flush=True)
        if arguments.asked and "why" in line:
            # What broke a kernel may have broken the device for this process.
            break
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
