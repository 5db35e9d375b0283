"""What `scripts/kernel-report --step` and `--roofline` tell: the bytes that a decode step moves and the operations it does, launch by
launch, and how long a card would take for them at the least. A model, not a measurement.

    decoder on meta tensors ─▶ launches, caught ─▶ bytes of their tensors, each read or written once ─┐
    weights, keys and values, each once ─────────────────────────────────────────────────────────────┴▶ share of what must move

Of pages, embeddings and rotations only what the requests need is counted. What programs of one launch read again is taken to come from
the card's cache. A launch takes the longer of its bytes at the card's bandwidth and its operations at its rate, and launches follow each
other without a gap; see `scripts/gpu-check decode` for what a card does.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from headrace.kernels.triton import TritonBackend, TritonOps
from headrace.kernels.triton.pages import KVPages
from headrace.kernels.triton.step import StepTokens, Tiles
from headrace.kernels.triton.tiles import KV_SPLIT
from headrace.kernels.triton.weights import DeviceWeight
from headrace.workers.model.config import DecoderConfig, LayerConfig, RopeConfig
from headrace.workers.model.decoder import Decoder, head_shape
from headrace.workers.model.names import HUGGINGFACE

META = torch.device("meta")
PAGE = 16


@dataclass(frozen=True, slots=True)
class Card:
    """By its data sheet."""

    name: str
    bytes_s: float
    operations_s: dict[str, float]
    """Of each form of weights: products in bfloat16, or in float8."""


H100 = Card("H100 SXM", 3.35e12, {"bf16": 989e12, "e4m3": 1979e12, "int4": 989e12})


@dataclass(slots=True)
class Work:
    """Of one kernel in a step, or of one on weights of one shape."""

    kernel: str
    launches: int = 0
    moved: float = 0.0
    """Bytes of all launches."""
    operations: float = 0.0

    @property
    def intensity(self) -> float:
        """Operations a byte (the roofline model, doi:10.1145/1498765.1498785)."""
        return self.operations / self.moved


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step of `requests`, each with `context` tokens."""

    form: str
    requests: int
    context: int
    must: float
    """Bytes of weights and of keys and values."""
    moved: float
    operations: float
    seconds: float
    """At the least, all launches."""
    floor: float
    """Seconds that `must` takes."""
    work: list[Work]
    """By kernel."""


class Weightless(TritonBackend):
    """Prepares weights of the right shapes that hold nothing."""

    def __init__(self, make: Callable[[int, int], list[DeviceWeight]]) -> None:
        super().__init__("meta")
        self._make = make

    def prepare(self, name, weights, bias=None):
        shapes = [weight.shape for weight in weights()]
        return self._make(sum(n for n, _ in shapes), shapes[0][1])

    def prepare_table(self, name, weight):
        return [DeviceWeight("floats", torch.empty(weight().shape, dtype=torch.bfloat16, device=META), weight().shape[1])]


@contextmanager
def caught(launches: list[tuple[str, dict[str, torch.Tensor]]]):
    """Launches inside are noted with their tensors, and do nothing."""
    run = JITFunction.run

    def note(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = zip(self.arg_names, arguments, strict=False)
        launches.append((self.fn.__name__, {name: one for name, one in named if isinstance(one, torch.Tensor)}))

    JITFunction.run = note  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


def step(config: DecoderConfig, checkpoint: Any, form: str, make: Callable[[int, int], list[DeviceWeight]], requests: int, context: int,
         kv_dtype: str = "bf16", card: Card = H100) -> Step:  # fmt: skip
    """Of a model with weights of one form, which `make` gives by shape [N, K]; `checkpoint` says the shapes."""
    backend, heads = Weightless(make), head_shape(config)
    decoder = Decoder(config, HUGGINGFACE, checkpoint, backend, config.context)
    kv = [KVPages.new(requests * context // PAGE, PAGE, heads, META, kv_dtype) for _ in decoder.layers]
    each = torch.empty(requests, dtype=torch.int32, device=META)
    pages = torch.empty(requests, context // PAGE, dtype=torch.int32, device=META)
    single = Tiles(torch.empty(requests, 3, dtype=torch.int32, device=META))
    tokens = StepTokens(each, each, each, each, pages, -(-context // KV_SPLIT), (), None, single)
    launches: list[tuple[str, dict[str, torch.Tensor]]] = []
    with caught(launches), torch.inference_mode():
        ops = TritonOps(torch.bfloat16, torch.bfloat16)
        hidden = decoder.finish(ops, *decoder.forward(ops, tokens, kv))
        decoder.logits(TritonOps(torch.bfloat16, torch.float32), hidden)
    pools = {id(x) for one in kv for x in (one.keys, one.values, one.scales) if x is not None}
    must, seconds, work = Counter(), 0.0, {}
    for name, tensors in launches:
        size, done = 0.0, 0.0
        for argument, x in tensors.items():
            nbytes = x.numel() * x.itemsize
            if id(x) in pools and name == "rope_write_kv_kernel":
                nbytes /= context
            elif (name == "embed_kernel" and argument == "W") or argument in ("cos", "sin"):
                nbytes = requests * x.shape[1] * x.itemsize
            elif argument in ("W", "scales", "w_scales", "minimums") or id(x) in pools:
                must[id(x)] = nbytes
            size += nbytes
        if "W" in tensors and name != "embed_kernel":
            values = tensors["W"]
            done = 2.0 * requests * values.numel() * (2 if form == "int4" and values.dtype == torch.uint8 else 1)
        elif name == "attention_kernel":
            done = 4.0 * requests * heads.query_heads * heads.dim * context
        title = f"{name} {' × '.join(map(str, tensors['W'].shape))}" if "W" in tensors else name
        one = work.setdefault(title, Work(title))
        one.launches, one.moved, one.operations = one.launches + 1, one.moved + size, one.operations + done
        seconds += max(size / card.bytes_s, done / card.operations_s[form])
    every, all_work = float(sum(must.values())), list(work.values())
    moved, operations = sum(one.moved for one in all_work), sum(one.operations for one in all_work)
    return Step(form, requests, context, every, moved, operations, seconds, every / card.bytes_s, all_work)


def table(make: Callable[[str], Callable[[int, int], list[DeviceWeight]]], config: DecoderConfig, checkpoint: Any) -> list[Step]:
    """Steps with weights of each form, of 1, 32 and 128 requests of 2,048 tokens."""
    return [step(config, checkpoint, form, make(form), requests, 2048) for form in H100.operations_s for requests in (1, 32, 128)]


def line_of(one: Step) -> str:
    return (
        f"  {one.form:5} {one.requests:4} requests: {one.seconds * 1e3:6.2f} ms, {one.requests / one.seconds:7.0f} tok/s; moves "
        f"{one.moved / 1e9:6.2f} GB, of which {one.must / one.moved:5.1%} must move ({one.floor * 1e3:.2f} ms); "
        f"{one.operations / 1e12:5.2f} TFLOP"
    )


def roofline_of(one: Step, card: Card = H100) -> list[str]:
    """A line for each kernel of the step: what it could reach at most, and what holds it back."""
    ridge, lines = card.operations_s[one.form] / card.bytes_s, []
    for work in one.work:
        least = max(work.moved / card.bytes_s, work.operations / card.operations_s[one.form])
        lines.append(
            f"    {work.kernel:34} {work.launches:4} launches {work.moved / 1e6:9.1f} MB {work.intensity:7.1f} FLOP/byte, at most "
            f"{min(work.intensity * card.bytes_s, card.operations_s[one.form]) / 1e12:6.1f} TFLOP/s ({least * 1e6:7.1f} µs), bound by "
            f"{'memory' if work.intensity < ridge else 'products'}"
        )
    return lines


def plain_llama(hidden: int, heads: int, kv_heads: int, mlp: int, layers: int, vocabulary: int, head_dim: int) -> DecoderConfig:
    """A plain Llama of these sizes."""
    frequencies = (10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    layer = LayerConfig(None, RopeConfig(frequencies, False))
    return DecoderConfig("llama", vocabulary, hidden, heads, kv_heads, head_dim, mlp, 8192, 1e-5, "silu", head_dim**-0.5, (layer,) * layers)


class Shapes:
    """A checkpoint of a plain Llama that knows the shapes of its tensors and holds none."""

    format, metadata = "huggingface", {}

    def __init__(self, c: DecoderConfig) -> None:
        q, kv, n = c.heads * c.head_dim, c.kv_heads * c.head_dim, HUGGINGFACE
        self.shapes: dict[str, tuple[int, ...]] = {n.embedding: (c.vocab_size, c.hidden), n.head: (c.vocab_size, c.hidden)}
        self.shapes[n.final_norm] = (c.hidden,)
        for layer in range(len(c.layers)):
            each = {n.q: (q, c.hidden), n.k: (kv, c.hidden), n.v: (kv, c.hidden), n.o: (c.hidden, q), n.gate: (c.mlp, c.hidden)}
            each |= {n.up: (c.mlp, c.hidden), n.down: (c.hidden, c.mlp), n.attention_norm: (c.hidden,), n.mlp_norm: (c.hidden,)}
            self.shapes |= {name.format(layer): shape for name, shape in each.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def weight(self, name: str) -> Any:
        return torch.empty(self.shapes[name], device=META)

    def vector(self, name: str) -> np.ndarray:
        return np.ones(self.shapes[name], np.float32)
