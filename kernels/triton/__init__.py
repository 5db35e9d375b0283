"""The Triton backend: the op table on NVIDIA and AMD GPUs, one op a file.

`tiles.py` is the table of sizes; `step.py` and `pages.py` hold what the kernels read; `graphs.py` replays steps that only decode. Results
of an op are the next op's inputs on the device; the host waits for nothing until tokens are sampled.

Activations between ops are of one type, bfloat16 unless float32 is asked for, the residual stream and the logits float32; every sum is
float32. Integer weights are multiplied as whole numbers, and their sums scaled.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from headrace.kernels.drafts import DraftTrees, Verified
from headrace.kernels.kv_rows import KVRows
from headrace.kernels.ops import Batch, HeadShape, Model, RopeTable, Sampled, SamplingBatch
from headrace.kernels.reference.rope import Rope
from headrace.kernels.room import host_room
from headrace.kernels.triton import attention as attention_op
from headrace.kernels.triton import experts as experts_op
from headrace.kernels.triton import moves, sampling
from headrace.kernels.triton.drafts import verify
from headrace.kernels.triton.embed import embed
from headrace.kernels.triton.gated import gated
from headrace.kernels.triton.graphs import Graphs
from headrace.kernels.triton.linear import linear
from headrace.kernels.triton.norm import add_rmsnorm, rmsnorm
from headrace.kernels.triton.pages import TYPES, KVPages, page_bytes
from headrace.kernels.triton.rejection import rejection_sample
from headrace.kernels.triton.rope import rope_write_kv
from headrace.kernels.triton.step import StepTokens
from headrace.kernels.triton.weights import DeviceWeight, prepare
from headrace.kernels.weights import Weight

Prepared = list[DeviceWeight]

SPARE = 0.08
"""Share of a device's memory that pages leave to everything else."""


class TritonOps:
    """`headrace.kernels.ops.Ops`: activations are of `dtype`, what a linear layer gives is of `results`."""

    def __init__(self, dtype: torch.dtype, results: torch.dtype) -> None:
        self.dtype, self.results = dtype, results

    def embed(self, tokens: StepTokens, table: Prepared, scale: float = 1.0) -> torch.Tensor:
        return embed(tokens.ids, table, scale)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rmsnorm(x, weight, eps, self.dtype)

    def add_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rmsnorm(x, residual, weight, eps, self.dtype)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + x

    def linear(self, x: torch.Tensor, weight: Prepared) -> torch.Tensor:
        return linear(x, weight, self.results)

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return gated(gate_up, activation)

    def route(self, x: torch.Tensor, router: Prepared, used: int, renormalize: bool) -> experts_op.Routing:
        return experts_op.route(linear(x, router, torch.float32), used, renormalize)

    def experts(self, x: torch.Tensor, routing: experts_op.Routing, gate_up: Prepared, down: Prepared, activation: str) -> torch.Tensor:
        return experts_op.experts(x, routing, gate_up, down, activation, self.results)

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        heads: HeadShape,
        rope: Rope,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv: KVPages,
        tokens: StepTokens,
    ) -> torch.Tensor:
        return rope_write_kv(qkv, heads, rope, q_norm, k_norm, eps, kv, tokens)

    def attention(
        self, q: torch.Tensor, heads: HeadShape, kv: KVPages, tokens: StepTokens, scale: float, window: int | None
    ) -> torch.Tensor:
        return attention_op.attention(q, heads, kv, tokens, scale, window, self.dtype)


class TritonBackend:
    """`headrace.kernels.ops.Backend`, whose docstrings hold here. `dtype` is that of activations: torch.bfloat16, float16 or float32;
    with `rounds_inputs`, those of layers whose weights ask for it are rounded to 8 bits before they are multiplied."""

    name = "triton"
    kv_types = tuple(TYPES)

    def __init__(self, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, rounds_inputs: bool = True) -> None:
        self.device, self.dtype, self._rounds_inputs = torch.device(device), dtype, rounds_inputs
        self._prepared: dict[str, Prepared] = {}
        self.step_tokens = 256 if self.device.type == "cpu" else 4096
        self.vocabulary = 0
        """Rows of the embedding table."""

    def keep(self, folder: Path, version: str) -> None:
        """Nothing is kept: weights go to the device as they are stored."""

    def prepare(self, name: str, weights: Callable[[], Sequence[Weight]], bias: np.ndarray | None = None) -> Prepared:
        if name not in self._prepared:
            self._prepared[name] = prepare(weights(), bias, self.device, self._rounds_inputs)
        return self._prepared[name]

    def prepare_experts(self, name: str, experts: int, weights: Callable[[], Sequence[Sequence[Weight]]]) -> Prepared:
        if name not in self._prepared:
            self._prepared[name] = experts_op.prepare_experts(experts, weights(), self.device, self._rounds_inputs)
        return self._prepared[name]

    def prepare_table(self, name: str, weight: Callable[[], Weight]) -> Prepared:
        table = self.prepare(name, lambda: [weight()])
        self.vocabulary = sum(part.outputs for part in table)
        return table

    def prepare_vector(self, values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def prepare_rope(self, table: RopeTable) -> Rope:
        cos, sin = (torch.tensor(values, dtype=torch.float32, device=self.device) for values in (table.cos, table.sin))
        return Rope(cos, sin, table.interleaved)

    def new_kv(self, layers: int, pages: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> list[KVPages]:
        return KVPages.layers(layers, pages, page_size, heads, self.device, dtype)

    def page_bytes(self, layers: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> int:
        return page_bytes(layers, page_size, heads, dtype)

    def copy_kv(self, kv: Sequence[KVPages], from_slots: np.ndarray, to_slots: np.ndarray) -> None:
        moves.copy_kv(kv, from_slots, to_slots)

    def gather_kv(self, kv: Sequence[KVPages], pages: np.ndarray) -> KVRows:
        return moves.gather_kv(kv, pages)

    def scatter_kv(self, kv: Sequence[KVPages], pages: np.ndarray, rows: KVRows) -> None:
        moves.scatter_kv(kv, pages, rows)

    def kv_room(self) -> int:
        """What is free on the device, less room for activations and graphs."""
        if self.device.type == "cpu":
            return host_room()
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, free - int(SPARE * total))

    def compile(self, model: Model, kv: Sequence[KVPages]) -> "TritonProgram":
        return TritonProgram(self, model, kv)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
        return sampling.sample(logits, batch)

    def score(self, logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
        return sampling.score(logits, tokens, top)

    def verify(self, trees: DraftTrees, tokens: Sequence[int] | torch.Tensor) -> Verified:
        return verify(trees, tokens)

    def rejection_sample(self, logits: torch.Tensor, batch: SamplingBatch, trees: DraftTrees, probabilities: torch.Tensor) -> Verified:
        return rejection_sample(logits, batch, trees, probabilities)


class TritonProgram:
    """`headrace.kernels.ops.Program`: the model, called step by step, or replayed as a graph where the device has them."""

    def __init__(self, backend: TritonBackend, model: Model, kv: Sequence[KVPages]) -> None:
        self._model, self._kv, self._device = model, kv, backend.device
        self._vocabulary = backend.vocabulary
        self._ops = TritonOps(backend.dtype, backend.dtype)
        self._head = TritonOps(backend.dtype, torch.float32)
        self._states: tuple[torch.Tensor, ...] = ()
        self._graphs = Graphs(self._whole, self._device, kv[0].page_size) if self._device.type == "cuda" else None

    @torch.inference_mode()
    def run(self, batch: Batch, picks: np.ndarray) -> torch.Tensor:
        check_indices(batch, picks, self._vocabulary, self._kv[0])
        if self._graphs is not None and self._graphs.fits(batch):
            self._states, logits = self._graphs.replay(batch)
            return logits if len(picks) == len(logits) else logits.index_select(0, self._rows(picks))
        self._states = self._model.forward(self._ops, StepTokens.of(batch, self._device), self._kv)
        return self.logits(picks)

    @torch.inference_mode()
    def logits(self, picks: np.ndarray) -> torch.Tensor:
        assert self._states, "a step comes before its logits"
        rows = self._rows(picks)
        return self._finish([state.index_select(0, rows) for state in self._states])

    def _whole(self, tokens: StepTokens) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        states = self._model.forward(self._ops, tokens, self._kv)
        return states, self._finish(states)

    def _finish(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._model.logits(self._head, self._model.finish(self._ops, *states))

    def _rows(self, picks: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(picks).to(self._device)


def check_indices(batch: Batch, picks: np.ndarray, vocabulary: int, kv: KVPages) -> None:
    """ValueError where a kernel would read or write beside what there is."""
    tokens, pages = len(batch.ids), kv.keys.shape[0]
    limits = {"ids": (batch.ids, vocabulary), "slots": (batch.slots, pages * kv.page_size), "pages": (batch.pages, pages)}
    limits |= {"positions": (batch.positions, batch.pages.shape[1] * kv.page_size), "picks": (picks, tokens)}
    for name, (values, limit) in limits.items():
        if values.size and not (values.min() >= 0 and values.max() < limit):
            raise ValueError(f"{name} from {values.min()} to {values.max()}: they must be from 0 to {limit - 1}")
    starts = batch.query_start
    if starts[0] != 0 or starts[-1] != tokens or (np.diff(starts) < 0).any() or len(starts) != len(batch.pages) + 1:
        raise ValueError(f"query_start {starts.tolist()} does not part {tokens} tokens among {len(batch.pages)} requests")
