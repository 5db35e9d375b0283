"""What `scripts/kernel-report` runs: the kernels as they are launched at the shapes of real models, compiled for GPUs that are not here.

    shapes of a model ─▶ launches on meta tensors ─▶ kernels.aot ─▶ table, and the budget that a change may not exceed

A budget holds, for each launch and target, the registers, spills, shared memory and share of wide loads that it had when the budget was
written. A kernel may need up to SLACK more registers; spills may not grow, tensor core instructions may not go missing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from headrace.kernels.aot import MOST_SHARED, TARGETS, Compiled, compiling_for
from headrace.kernels.ops import HeadShape
from headrace.kernels.reference.rope import Rope
from headrace.kernels.triton import TritonOps, drafts, experts, moves, rejection, sampling
from headrace.kernels.triton.pages import KVPages
from headrace.kernels.triton.products import Tiles as ExpertTiles
from headrace.kernels.triton.sampling import Draws
from headrace.kernels.triton.step import StepTokens, Tiles
from headrace.kernels.triton.tiles import QUERY_ROWS
from headrace.kernels.triton.weights import DeviceWeight
from headrace.kernels.weights import InputRounding
from scripts.lib import step_model
from scripts.lib.step_model import plain_llama

META = torch.device("meta")
BUDGET = Path(__file__).parents[2] / "kernels" / "triton" / "budget.json"
SLACK = 16
"""Registers by which compilers differ without anybody having changed a kernel."""
LEAST_WIDE = 0.05
"""By how much the share of wide loads may fall."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One rank's share of a model."""

    hidden: int
    heads: HeadShape
    mlp: int
    vocabulary: int
    qk_norm: bool = False
    experts: int = 0
    """Of which a token uses USED, each of width `mlp`. Of such a model only what stands in for an MLP is compiled."""


USED = 8

MODELS = {
    "Llama-3-8B": Shape(4096, HeadShape(32, 8, 128), 14336, 128256),
    "Llama-3-70B/TP8": Shape(8192, HeadShape(8, 1, 128), 3584, 16032),
    "Qwen3-32B/TP4": Shape(5120, HeadShape(16, 2, 128), 6400, 37984, qk_norm=True),
    "Qwen3-30B-A3B": Shape(2048, HeadShape(32, 4, 128), 768, 151936, qk_norm=True, experts=128),
}

LLAMA_8B = plain_llama(4096, 32, 8, 14336, 32, 128256, 128)

Launch = Callable[[TritonOps], object]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


FORMS = ("bf16", "e4m3", "e4m3 blocks", "int8 x int8", "int8", "int4")
"""Weights: float8 with inputs that are too (one scale a row, or blocks of 128), int8 with inputs in int8, and integers in groups of 128
with inputs in bfloat16."""
NO_FLOAT8 = ("sm_80", "gfx942")
"""Targets that know no e4m3fn."""


def weight(n: int, k: int, form: str, target: str) -> list[DeviceWeight]:
    """A weight of one of FORMS as it is held on the target."""
    if form == "bf16":
        return [DeviceWeight("floats", empty(n, k), k)]
    if form.startswith("e4m3"):
        group, spread = (128, 128) if "blocks" in form else (0, 1)
        codes = empty(n, k, dtype=torch.uint8 if target in NO_FLOAT8 else torch.float8_e4m3fn)
        scales = empty(k // group if group else 1, n // spread, dtype=torch.float32)
        return [DeviceWeight("e4m3", codes, k, None, scales, None, group, spread, 0, InputRounding("e4m3", group or None))]
    if form == "int8 x int8":
        scales = empty(1, n, dtype=torch.float32)
        return [DeviceWeight("bytes", empty(n, k, dtype=torch.int8), k, None, scales, None, 0, 1, 0, InputRounding("int8"))]
    scales = empty(k // 128, n, dtype=torch.float16)
    if form == "int8":
        return [DeviceWeight("bytes", empty(n, k, dtype=torch.int8), k, None, scales, None, 128)]
    return [DeviceWeight("nibbles", empty(n, k // 2, dtype=torch.uint8), k, None, scales, None, 128, 1, -8)]


def tokens_of(count: int, requests: int, context: int, heads: HeadShape) -> StepTokens:
    group = heads.query_heads // heads.kv_heads
    integers = lambda *shape: empty(*shape, dtype=torch.int32)  # noqa: E731
    tiles = Tiles(integers(requests * -(-count // requests // max(1, QUERY_ROWS // group)) or 1, 3))
    each = integers(count)
    return StepTokens(
        each, each, each, integers(requests + 1), integers(requests, context // 16), -(-context // 256), (), known_tiles={group: tiles}
    )


def expert_launches(shape: Shape, target: str) -> Iterator[tuple[str, Launch]]:
    """What a mixture of experts launches in place of an MLP."""
    integers = lambda *shape: empty(*shape, dtype=torch.int32)  # noqa: E731
    layers = {"gate up": (2 * shape.mlp, shape.hidden, USED), "down": (shape.hidden, shape.mlp, 0)}
    for count in (1, 64, 2048):
        pairs = count * USED
        tile, most = experts.tiles_of(pairs, shape.experts)
        yield f"route x{count}", lambda ops, n=count: experts.route(empty(n, shape.experts, dtype=torch.float32), USED, True)
        for form in FORMS:
            for name, (n, k, used) in layers.items():
                rows, tiles = count if used else pairs, ExpertTiles(integers(most, 3), integers(pairs), used, tile)
                weights = [replace(part, experts=shape.experts) for part in weight(n * shape.experts, k, form, target)]
                yield (
                    f"experts {name} {form} x{count}",
                    lambda ops, x=(rows, k), t=tiles, w=weights: experts.products(empty(*x), t, w, ops.results),
                )
    yield (
        "combine",
        lambda ops: experts.combine(empty(64 * USED, shape.hidden), integers(64 * USED), empty(64, USED, dtype=torch.float32)),
    )


def launches(shape: Shape, target: str) -> Iterator[tuple[str, Launch]]:
    """Name and call of every launch of a step that differs in more than its grid: decoding one request, 64, and a prompt of 2048."""
    heads, width = shape.heads, (shape.heads.query_heads + 2 * shape.heads.kv_heads) * shape.heads.dim
    if shape.experts:
        yield from expert_launches(shape, target)
        return
    layers = {"qkv": (width, shape.hidden), "gate up": (2 * shape.mlp, shape.hidden), "down": (shape.hidden, shape.mlp)}
    for form in FORMS:
        for name, (n, k) in layers.items():
            if form != "bf16" and name == "qkv":
                # Nothing there that is not in the one split along K, or in the other.
                continue
            for count in (1, 64, 2048):
                yield (
                    f"linear {name} {form} x{count}",
                    lambda ops, a=(count, n, k, form): ops.linear(empty(a[0], a[2]), weight(*a[1:], target)),
                )
    yield "embed", lambda ops: ops.embed(tokens_of(64, 64, 256, heads), weight(shape.vocabulary, shape.hidden, "bf16", target))
    norm = empty(shape.hidden, dtype=torch.float32)
    yield "add_rmsnorm", lambda ops: ops.add_rmsnorm(empty(64, shape.hidden), empty(64, shape.hidden, dtype=torch.float32), norm, 1e-5)
    yield "gated", lambda ops: ops.gated(empty(64, 2 * shape.mlp), "silu")
    yield "sampling", lambda ops: sampling_launches(shape.vocabulary)
    yield "drafts", lambda ops: draft_launches(shape.vocabulary)
    table = Rope(empty(8192, heads.dim // 2, dtype=torch.float32), empty(8192, heads.dim // 2, dtype=torch.float32), False)
    qk_norm = empty(heads.dim, dtype=torch.float32) if shape.qk_norm else None
    for kind in ("bf16", "int8", "fp8"):
        kv = KVPages.new(256, 16, heads, META, kind)
        if kind == "fp8" and target in NO_FLOAT8:
            kv = KVPages(kv.keys.view(torch.uint8), kv.values.view(torch.uint8), kv.scales)
        for gather in (True, False):
            yield f"{'gather' if gather else 'scatter'}_kv {kind}", lambda ops, a=(kv, gather): move_launch(*a)
        yield (
            f"rope_write_kv {kind}",
            lambda ops, kv=kv: ops.rope_write_kv(
                empty(64, width), heads, table, qk_norm, qk_norm, 1e-5, kv, tokens_of(64, 64, 2048, heads)
            ),
        )
        for name, count, requests in (("decode", 1, 1), ("prefill", 4096, 4)):
            yield (
                f"attention {kind} {name}",
                lambda ops, kv=kv, a=(count, requests): ops.attention(
                    empty(a[0], heads.query_heads * heads.dim, dtype=kv.multiplied_as), heads, kv, tokens_of(*a, 2048, heads), 0.1, None
                ),
            )


def sampling_launches(vocabulary: int) -> None:
    """Launch the kernels that sample."""
    logits, one = empty(32, vocabulary, dtype=torch.float32), empty(32, dtype=torch.float32)
    integers = empty(32, dtype=torch.int64)
    draws = Draws(one, integers, empty(32, dtype=torch.float64), one, integers)
    sampling.order(logits, one, one, True)
    sampling.weigh(logits, one, draws, empty(32, sampling.HEAD, dtype=torch.int64))
    sampling.random_numbers(integers, integers)


def draft_launches(vocabulary: int) -> None:
    """Launch the kernels that verify 32 trees of 64 rows."""
    count, requests = 32 * 64, 32
    integers = lambda *shape: empty(*shape, dtype=torch.int64)  # noqa: E731
    each = integers(count)
    trees = drafts.DeviceTrees(integers(requests + 1), each, each, integers(requests + 1), each, 64, integers(2 * count + requests))
    drafts.launch(trees, each)
    one, rows = empty(count, dtype=torch.float32), empty(count, vocabulary, dtype=torch.float32)
    rejection.launch(rejection.Ready(rows, one, one, each, each, rows, each, each, each), trees)


def move_launch(kv: KVPages, gather: bool) -> None:
    """Launch the kernel that moves 64 positions of these pages, in 32 layers."""
    layers = [kv] * 32
    moves.move(layers, empty(64, dtype=torch.int32), moves.rows_of(layers, 64), gather)


def compiled(model: str, target: str, every: int = 1) -> Iterator[tuple[str, Compiled]]:
    """The kernels of the model's launches, or of each `every`-th of them, by the launch's name."""
    ops = TritonOps(torch.bfloat16, torch.bfloat16)
    for name, launch in list(launches(MODELS[model], target))[::every]:
        with compiling_for(target) as kernels:
            launch(ops)
        for kernel in kernels:
            yield f"{name}: {kernel.name}", kernel


def decode_steps() -> list[step_model.Step]:
    """Of Llama-3-8B, see `step_model.table`."""
    return step_model.table(lambda form: lambda n, k: weight(n, k, form, "sm_90"), LLAMA_8B, step_model.Shapes(LLAMA_8B))


def figures(kernel: Compiled) -> dict:
    if kernel.error is not None:
        return {"error": kernel.error.strip().splitlines()[-1][:160]}
    return {
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared": kernel.shared,
        "wide_loads": round(kernel.wide_loads, 3),
        "tensor_core": sorted(kernel.tensor_core),
    }


def broken(name: str, target: str, kernel: Compiled, budget: dict | None) -> Iterator[str]:
    """What is wrong with a kernel, beside its budget and by itself."""
    where = f"{target} {name}"
    if kernel.error is not None:
        if budget is None or "error" not in budget:
            yield f"{where}: does not compile: {figures(kernel)['error']}"
        return
    if kernel.shared > MOST_SHARED[target]:
        yield f"{where}: takes {kernel.shared} bytes of shared memory, the device has {MOST_SHARED[target]}"
    if budget is None:
        yield f"{where}: has no budget: scripts/kernel-report --write"
        return
    if "error" in budget:
        return
    if kernel.registers > budget["registers"] + SLACK:
        yield f"{where}: takes {kernel.registers} registers, its budget is {budget['registers']}"
    if kernel.spills > budget["spills"]:
        yield f"{where}: spills {kernel.spills} bytes, its budget is {budget['spills']}"
    if kernel.wide_loads < budget["wide_loads"] - LEAST_WIDE:
        yield f"{where}: loads {kernel.wide_loads:.0%} of its bytes 16 at a time, its budget is {budget['wide_loads']:.0%}"
    if missing := set(budget["tensor_core"]) - set(kernel.tensor_core):
        yield f"{where}: no longer uses {', '.join(sorted(missing))}"


def check(models: list[str], targets: list[str], say: Callable[[str], None] = lambda line: None, every: int = 1) -> tuple[list[str], dict]:
    """What breaks the committed budget, and the figures as they are now, by target and launch: all, or each `every`-th launch."""
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    wrong: list[str] = []
    now: dict[str, dict[str, dict]] = {}
    for target in targets:
        for model in models:
            for name, kernel in compiled(model, target, every):
                name = f"{model} {name}"
                now.setdefault(target, {})[name] = figures(kernel)
                wrong += broken(name, target, kernel, budget.get(target, {}).get(name))
                say(line_of(target, name, kernel))
    return wrong, now


def line_of(target: str, name: str, kernel: Compiled) -> str:
    if kernel.error is not None:
        return f"{target:7} {name:70} {figures(kernel)['error']}"
    cores = ", ".join(f"{count} {opcode}" for opcode, count in sorted(kernel.tensor_core.items()))
    return (
        f"{target:7} {name:70} {kernel.registers:4} registers {kernel.spills:5} spilled {kernel.shared / 1024:6.1f} KiB shared "
        f"{kernel.wide_loads:4.0%} wide  {cores}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/kernel-report", description="Compile the Triton kernels for GPUs that are not here.")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="exit with 1 where the budget is broken")
    group.add_argument("--write", action="store_true", help="make what there is now the budget, for these models and targets")
    group.add_argument(
        "--step", action="store_true", help="instead: what decode steps of Llama-3-8B move, and a model of how long they take"
    )
    group.add_argument("--roofline", action="store_true", help="--step, with what each kernel of a step could reach (a model too)")
    arguments = parser.parse_args()
    if arguments.step or arguments.roofline:
        print(
            f"Llama-3-8B, requests of 2,048 tokens, keys and values in bfloat16, by the data sheet of the {step_model.H100.name} (a model):"
        )
        for one in decode_steps():
            print("\n".join([step_model.line_of(one), *(step_model.roofline_of(one) if arguments.roofline else ())]))
        return
    wrong, now = check(arguments.model, arguments.target, lambda line: print(line, flush=True))
    if arguments.write:
        known = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
        for target, kernels in now.items():
            written = tuple(f"{model} " for model in arguments.model)
            others = {name: one for name, one in known.get(target, {}).items() if not name.startswith(written)}
            known[target] = dict(sorted((others | kernels).items()))
        BUDGET.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    for line in wrong if arguments.check else ():
        print("over budget:", line, file=sys.stderr)
    sys.exit(bool(arguments.check and wrong))


if __name__ == "__main__":
    main()
