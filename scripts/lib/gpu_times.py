"""What `scripts/gpu-check` times: products, experts, attention, sampling and whole decode steps, at the sizes of real models with random
weights.

Each section gives what there is to measure, one after the other. Times are medians of replayed graphs, or of calls that wait for the
device; bytes and operations are those that must be moved and done, so that a share of 100% is the card's own limit as measured here.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import triton

from headrace.kernels.ops import Batch, HeadShape
from headrace.kernels.triton import TritonBackend, TritonOps, TritonProgram
from headrace.kernels.triton.experts import route
from headrace.kernels.triton.pages import KVPages
from headrace.kernels.triton.step import StepTokens
from headrace.kernels.triton.weights import DeviceWeight
from headrace.kernels.weights import Dense, InputRounding, Weight
from headrace.workers.model.config import DecoderConfig
from headrace.workers.model.decoder import Decoder, head_shape
from headrace.workers.model.names import HUGGINGFACE
from scripts.lib.step_model import Shapes, plain_llama
from tests.kernels.draws import batch_of
from tests.kernels.paged import dense

DEVICE = torch.device("cuda")

Items = Iterator[tuple[str, Callable[[], None]]]
"""What there is to do, by name."""

LLAMA_8B = plain_llama(4096, 32, 8, 14336, 32, 128256, 128)
LAYERS = {"qkv": (6144, 4096), "output": (4096, 4096), "gate up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)}
"""Llama-3-8B's: outputs and inputs."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """An MLP of experts."""

    name: str
    hidden: int
    width: int
    experts: int
    used: int


MIXTURES = (Mixture("Qwen3-30B-A3B", 2048, 768, 128, 8), Mixture("Mixtral-8x7B", 4096, 14336, 8, 2))


class RandomCheckpoint(Shapes):
    """Weights of a plain Llama, the same for the same name."""

    def __init__(self, described: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__(described)
        self.dtype = dtype

    def weight(self, name: str) -> Weight:
        values = torch.randn(self.shapes[name], generator=torch.Generator().manual_seed(sum(name.encode()))) / self.shapes[name][1] ** 0.5
        return dense(values.to(self.dtype))


class OnDevice(TritonBackend):
    """Makes weights of the right sizes on the device itself, where many gigabytes are no matter."""

    def __init__(self, checkpoint: RandomCheckpoint, form: str) -> None:
        super().__init__(str(DEVICE))
        self.form = form
        checkpoint.weight = lambda name: Dense(np.broadcast_to(np.float32(0), checkpoint.shapes[name]))  # type: ignore[method-assign]

    def prepare(self, name, weights, bias=None):
        shapes = [weight.shape for weight in weights()]
        return [random_weight(sum(n for n, _ in shapes), shapes[0][1], self.form)]


FORMS = {"bf16": 16, "e4m3": 8, "e4m3 blocks": 8, "int8 x int8": 8, "int8": 8, "int4": 4}
"""Weights that are timed, and bits of a code. e4m3, with inputs that are too: one scale a row, or blocks of 128.
int8 x int8: inputs likewise. int8 and int4: groups of 128, inputs in bfloat16."""


def random_weight(n: int, k: int, form: str) -> DeviceWeight:
    """A weight of one of FORMS."""
    if form == "bf16":
        return DeviceWeight("floats", torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5, k)
    groups = 1 if form in ("e4m3", "int8 x int8") else k // 128
    spread = 128 if form == "e4m3 blocks" else 1
    scales = torch.full((groups, n // spread), 0.2 / k**0.5 / (1 if form == "int4" else 16), device=DEVICE)
    if form.startswith("e4m3"):
        values = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        group = 0 if groups == 1 else 128
        return DeviceWeight("e4m3", values, k, None, scales, None, group, spread, 0, InputRounding("e4m3", group or None))
    values = torch.randint(0, 256, (n, k // 2 if form == "int4" else k), device=DEVICE, dtype=torch.uint8)
    if form == "int8 x int8":
        return DeviceWeight("bytes", values.view(torch.int8), k, None, scales, None, 0, 1, 0, InputRounding("int8"))
    if form == "int8":
        return DeviceWeight("bytes", values.view(torch.int8), k, None, scales.half(), None, 128)
    return DeviceWeight("nibbles", values, k, None, scales.half(), None, 128, 1, -8)


@dataclass(frozen=True, slots=True)
class Peaks:
    bytes_s: float
    operations_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """What sections are given."""

    results: dict[str, Any]
    """What they fill: the JSON of the run."""
    peak: Peaks
    only: str = ""
    """What the title of a check of parity must contain."""
    model: str | None = None
    """The one that is served."""
    earlier: dict[str, Any] = field(default_factory=dict)
    """The JSON of an earlier run."""


def milliseconds(work: Callable[[], Any]) -> float:
    """The median."""
    return triton.testing.do_bench_cudagraph(work, rep=40, return_mode="median")


def device_name() -> str | None:
    """None without a GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peaks() -> Peaks:
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return Peaks(moved, 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3)


def steps(lengths: list[int], positions: list[int], width: int) -> Batch:
    """Requests with so many tokens each, from these positions on; pages in order."""
    total = sum(lengths)
    pages = np.arange(len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)
    places = [np.arange(p, p + n) for n, p in zip(lengths, positions, strict=True)]
    slots = np.concatenate([pages[r, at // 16] * 16 + at % 16 for r, at in enumerate(places)])
    ids = np.random.default_rng(total).integers(0, 100, total)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Batch(*(np.ascontiguousarray(x, np.int32) for x in (ids, np.concatenate(places), slots, starts)), pages)


def products(run: Run) -> Items:
    """Every layer of Llama-3-8B, with weights of every form."""
    for form in FORMS:
        for name in LAYERS:
            yield f"{name} {form}", lambda a=(name, form): product(run.results.setdefault("products", []), run.peak, *a)


def product(rows: list[dict], peak: Peaks, name: str, form: str) -> None:
    ops, (n, k), bits = TritonOps(torch.bfloat16, torch.bfloat16), LAYERS[name], FORMS[form]
    weights = [[random_weight(n, k, form)] for _ in range(copies(n * k * bits // 8))]
    for tokens in (1, 16, 64, 128, 2048) if form == "bf16" or name == "gate up" else (1, 16, 64):
        x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)
        took = milliseconds(lambda: [ops.linear(x, weight) for weight in weights]) / len(weights) * 1e-3  # noqa: B023
        row = {"layer": name, "weights": form, "rows": tokens}
        if form == "bf16":
            row["torch_us"] = milliseconds(lambda: [x @ w[0].values.t() for w in weights]) / len(weights) * 1e3  # noqa: B023
        rows.append(row | shares(took, n * k * bits / 8 + 2 * tokens * (n + k), 2 * tokens * n * k, peak))
        print(line_of(f"{name:8} {form:12} {tokens:5} rows", rows[-1]), flush=True)


def experts(run: Run) -> Items:
    """MLPs of experts, with weights of every form."""
    for mixture in MIXTURES:
        for form in FORMS:
            yield f"{mixture.name} {form}", lambda a=(mixture, form): mixture_times(run.results.setdefault("experts", []), run.peak, *a)


def mixture_times(rows: list[dict], peak: Peaks, mixture: Mixture, form: str) -> None:
    """Chosen at random, so that 64 tokens need the weights of nearly all."""
    ops, bits = TritonOps(torch.bfloat16, torch.bfloat16), FORMS[form]
    hidden, width, count, used = mixture.hidden, mixture.width, mixture.experts, mixture.used
    each = 3 * hidden * width * bits / 8
    layers = [
        [[replace(random_weight(count * n, k, form), experts=count)] for n, k in ((2 * width, hidden), (hidden, width))]
        for _ in range(copies(count * each))
    ]
    for tokens in (1, 16, 64, 2048):
        x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
        logits = torch.randn(tokens, count, device=DEVICE)
        needed = len(route(logits, used, True).chosen.unique())

        def work(x=x, logits=logits) -> None:
            for gate_up, down in layers:
                ops.experts(x, route(logits, used, True), gate_up, down, "silu")

        took = milliseconds(work) / len(layers) * 1e-3
        row = {"model": mixture.name, "weights": form, "rows": tokens, "experts": needed}
        rows.append(row | shares(took, needed * each + 4 * tokens * hidden, 6 * tokens * used * hidden * width, peak))
        print(line_of(f"{mixture.name:14} {form:12} {tokens:5} rows, {needed:4} experts", rows[-1]), flush=True)


ATTENTIONS = [("bf16", requests, 1, context) for requests, context in ((1, 2048), (1, 8192), (32, 2048), (128, 2048))]
ATTENTIONS += [("int8", 32, 1, 2048), ("fp8", 32, 1, 2048), ("bf16", 1, 2048, 2048), ("bf16", 4, 512, 4096)]
"""Of the pages, requests, new tokens of each, and all of its tokens."""
HEADS = HeadShape(32, 8, 128)


def attentions(run: Run) -> Items:
    for kind, requests, fresh, context in ATTENTIONS:
        name = f"{kind} {requests}x{fresh} of {context}"
        yield name, lambda a=(kind, requests, fresh, context): attention(run.results.setdefault("attention", []), run.peak, *a)


def attention(rows: list[dict], peak: Peaks, kind: str, requests: int, fresh: int, context: int) -> None:
    ops, width, inner = TritonOps(torch.bfloat16, torch.bfloat16), context // 16, HEADS.query_heads * HEADS.dim
    kv = KVPages.new(requests * width, 16, HEADS, DEVICE, kind)
    if kv.scales is None:
        kv.keys.normal_(), kv.values.normal_()
    else:
        # Bytes below 127 are numbers in float8 too.
        for x in (kv.keys, kv.values):
            x.view(torch.int8).random_(-127, 127)
        kv.scales.fill_(0.01)
    tokens = StepTokens.of(steps([fresh] * requests, [context - fresh] * requests, width), DEVICE)
    q = torch.randn(requests * fresh, inner, device=DEVICE, dtype=kv.multiplied_as)
    tokens.tiles(HEADS.query_heads // HEADS.kv_heads)
    took = milliseconds(lambda: ops.attention(q, HEADS, kv, tokens, HEADS.dim**-0.5, None)) * 1e-3
    position = 2 * HEADS.kv_heads * (HEADS.dim * kv.keys.element_size() + (4 if kv.scales is not None else 0))
    moved = requests * (context * position + fresh * inner * 4)
    done = requests * 4 * inner * (fresh * context - fresh * (fresh - 1) // 2)
    rows.append({"kv": kind, "requests": requests, "fresh": fresh, "context": context} | shares(took, moved, done, peak))
    print(line_of(f"{kind:5} {requests:4} requests of {context:5}, {fresh:5} new", rows[-1]), flush=True)


def decoding(run: Run) -> Items:
    """Whole decode steps of Llama-3-8B, through the program and its graphs."""
    for form in ("bf16", "e4m3", "int4"):
        yield form, lambda form=form: decode_steps(run.results.setdefault("decode", []), run.peak, form)


def decode_steps(rows: list[dict], peak: Peaks, form: str) -> None:
    # What an earlier form has left: a program and its graphs know each other.
    gc.collect()
    torch.cuda.empty_cache()
    heads, bits = head_shape(LLAMA_8B), FORMS[form] + (2 / 16 if form == "int4" else 0)
    backend = OnDevice(checkpoint := RandomCheckpoint(LLAMA_8B, torch.bfloat16), form)
    decoder = Decoder(LLAMA_8B, HUGGINGFACE, checkpoint, backend, 8192)
    program = TritonProgram(backend, decoder, backend.new_kv(32, 128 * 129, 16, heads, "bf16"))
    for each in (1, 32, 128):
        batch, picks = steps([1] * each, [2047] * each, 129), np.arange(each, dtype=np.int32)
        step = seconds(lambda: program.run(batch, picks).argmax(-1).tolist(), 20, 5)  # noqa: B023
        floor = (7.504e9 * bits / 8 + each * 2048 * 2 * 8 * 128 * 2 * 32) / peak.bytes_s
        rows.append({"weights": form, "requests": each, "ms": step * 1e3, "floor_ms": floor * 1e3})
        print(
            f"  {form:5} {each:3} requests at 2048: {step * 1e3:6.2f} ms a step, {each / step:6.0f} tok/s; "
            f"weights and KV once: {floor * 1e3:.2f} ms ({floor / step:.0%})",
            flush=True,
        )
    prompt, last = steps([2048], [0], 129), np.array([2047], np.int32)
    took = seconds(lambda: program.run(prompt, last).argmax(-1).tolist(), 2, 1)
    rows.append({"weights": form, "prompt": 2048, "ms": took * 1e3})
    print(f"  {form:5} a prompt of 2048: {took * 1e3:.1f} ms, {2048 * 2 * 7.0e9 / took / 1e12:.0f} TFLOP/s", flush=True)


ASKED = {"greedy": {"temperature": 0.0}, "top p": {"top_p": 0.9}, "top p, logprobs": {"top_p": 0.9, "logprobs": 5}}
ASKED["penalties"] = {"top_p": 0.9, "repetition_penalty": 1.1, "output": tuple(range(500))}


def samplings(run: Run) -> Items:
    """Milliseconds, of the host too, to sample rows of Llama-3's vocabulary."""
    for name in ASKED:
        yield name, lambda name=name: sampling(run.results.setdefault("sampling", []), name)


def sampling(rows: list[dict], name: str) -> None:
    backend = TritonBackend(str(DEVICE))
    for count in (1, 32, 128):
        logits = torch.randn(count, LLAMA_8B.vocab_size, device=DEVICE) * 3
        batch = batch_of(*({"seed": seed} | ASKED[name] for seed in range(count)))
        took = seconds(lambda: backend.sample(logits, batch), 12, 3)  # noqa: B023
        rows.append({"rows": count, "asked": name, "ms": took * 1e3})
        print(f"  {count:4} rows, {name:16} {took * 1e3:6.2f} ms", flush=True)


def copies(size: float) -> int:
    """Of a weight of so many bytes, so that none is found in the cache."""
    return max(1, min(6, int((400 << 20) / size)))


def seconds(work: Callable[[], Any], times: int, first: int) -> float:
    """The median of so many calls, which wait for the device themselves, without the `first`."""
    took = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return float(np.median(took[first:]))


def shares(took: float, moved: float, done: float, peak: Peaks) -> dict[str, float]:
    """Of what the card can do, for so many bytes and operations in so many seconds."""
    rates = {"gb_s": moved / took / 1e9, "tflop_s": done / took / 1e12}
    return {"us": took * 1e6} | rates | {"bytes_share": moved / took / peak.bytes_s, "operations_share": done / took / peak.operations_s}


def line_of(what: str, row: dict) -> str:
    torch_s = f"   torch {row['torch_us']:8.1f} µs" if "torch_us" in row else ""
    return (
        f"  {what}: {row['us']:8.1f} µs {row['gb_s']:6.0f} GB/s {row['bytes_share']:5.0%} {row['tflop_s']:7.1f} TFLOP/s "
        f"{row['operations_share']:5.0%}{torch_s}"
    )
