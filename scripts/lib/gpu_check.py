"""What `scripts/gpu-check` runs: parity, invariance, graphs, and every kernel's share of what the card can do.

A section that fails is told and the next one runs. Times are medians of replayed graphs, or of events around launches; bytes and
operations are those that must be moved and done, so that a share of 100% is the card's own limit as measured here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from headrace.client.bench import Options, bench
from headrace.client.bench.options import WORKLOADS
from headrace.kernels.ops import Batch, HeadShape
from headrace.kernels.reference import ReferenceBackend
from headrace.kernels.triton import TritonBackend, TritonOps, TritonProgram
from headrace.kernels.triton.pages import KVPages
from headrace.kernels.triton.step import StepTokens
from headrace.kernels.triton.weights import DeviceWeight
from headrace.kernels.weights import Dense, InputRounding, Weight
from headrace.workers.model.config import DecoderConfig, LayerConfig, RopeConfig
from headrace.workers.model.decoder import Decoder, head_shape
from headrace.workers.model.names import HUGGINGFACE
from tests.kernels import triton_parity
from tests.kernels.draws import batch_of
from tests.serving import Command

DEVICE = torch.device("cuda")


def config(hidden: int, heads: int, kv_heads: int, mlp: int, layers: int, vocabulary: int, head_dim: int) -> DecoderConfig:
    """A plain Llama of these sizes."""
    frequencies = (10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    layer = LayerConfig(None, RopeConfig(frequencies, False))
    return DecoderConfig("llama", vocabulary, hidden, heads, kv_heads, head_dim, mlp, 8192, 1e-5, "silu", head_dim**-0.5, (layer,) * layers)


LLAMA_8B = config(4096, 32, 8, 14336, 32, 128256, 128)
SMALL = config(256, 8, 2, 704, 4, 1000, 32)


class RandomCheckpoint:
    """Weights of a `config`, the same for the same name."""

    format, metadata = "huggingface", {}

    def __init__(self, described: DecoderConfig, dtype: torch.dtype) -> None:
        c, self.dtype = described, dtype
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        n = HUGGINGFACE
        self.shapes: dict[str, tuple[int, ...]] = {
            n.embedding: (c.vocab_size, c.hidden),
            n.head: (c.vocab_size, c.hidden),
            n.final_norm: (c.hidden,),
        }
        for layer in range(len(c.layers)):
            each = {n.q: (q, c.hidden), n.k: (kv, c.hidden), n.v: (kv, c.hidden), n.o: (c.hidden, q), n.gate: (c.mlp, c.hidden)}
            each |= {n.up: (c.mlp, c.hidden), n.down: (c.hidden, c.mlp), n.attention_norm: (c.hidden,), n.mlp_norm: (c.hidden,)}
            self.shapes |= {name.format(layer): shape for name, shape in each.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def weight(self, name: str) -> Weight:
        values = torch.randn(self.shapes[name], generator=torch.Generator().manual_seed(sum(name.encode()))) / self.shapes[name][1] ** 0.5
        return triton_parity.dense(values.to(self.dtype))

    def vector(self, name: str) -> np.ndarray:
        return np.ones(self.shapes[name], np.float32)


class OnDevice(TritonBackend):
    """Makes weights of the right sizes on the device itself, where many gigabytes are no matter."""

    def __init__(self, checkpoint: RandomCheckpoint, form: str) -> None:
        super().__init__("cuda")
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


@dataclass
class Peaks:
    bytes_s: float
    operations_s: float


def milliseconds(work: Callable[[], Any], graph: bool = True) -> float:
    """The median."""
    bench = triton.testing.do_bench_cudagraph if graph else triton.testing.do_bench
    return bench(work, rep=40, return_mode="median")


def peaks() -> Peaks:
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return Peaks(moved, 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3)


def parity(results: dict, _: Peaks) -> None:
    count = min(14, os.cpu_count() or 1)
    command = [sys.executable, "-m", "tests.kernels.triton_parity", "--shard"]
    parts = [subprocess.Popen([*command, str(part), str(count)], stdout=subprocess.PIPE, text=True) for part in range(count)]
    lines = [json.loads(line) for part in parts for line in part.communicate()[0].splitlines() if line.startswith("{")]
    results["parity"] = lines
    bad = [line for line in lines if not line["ok"]]
    for line in bad[:40]:
        print("  WRONG", {key: value for key, value in line.items() if key != "where"})
        print(line.get("where", "")[-500:] if line is bad[0] else "", flush=True)
    print(f"  {len(lines) - len(bad)} of {len(lines)} checks are right")
    worst: dict[tuple[str, str], float] = {}
    for line in lines:
        if line["error"] is not None and line["bound"]:
            key = line["check"].split()[0], line["type"]
            worst[key] = max(worst.get(key, 0.0), line["error"])
    for (op, kind), error in sorted(worst.items()):
        print(f"  {op:16} {kind:10} relative error at most {error:.1e}")
    if bad:
        results["failed"].append("parity")


def steps(lengths: list[int], positions: list[int], width: int) -> Batch:
    """Requests with so many tokens each, from these positions on; pages in order."""
    total = sum(lengths)
    pages = np.arange(len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)
    places = [np.arange(p, p + n) for n, p in zip(lengths, positions, strict=True)]
    slots = np.concatenate([pages[r, at // 16] * 16 + at % 16 for r, at in enumerate(places)])
    ids = np.random.default_rng(total).integers(0, 100, total)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Batch(*(np.ascontiguousarray(x, np.int32) for x in (ids, np.concatenate(places), slots, starts)), pages)


def model(results: dict, _: Peaks) -> None:
    """A small Llama: against the reference, chunks against the whole, graphs against plain steps, a row alone against in a batch."""
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        checkpoint = RandomCheckpoint(SMALL, dtype)
        heads = head_shape(SMALL)
        made = {}
        for name, backend in (("reference", ReferenceBackend()), ("triton", TritonBackend("cuda", dtype))):
            decoder = Decoder(SMALL, HUGGINGFACE, checkpoint, backend, 2048)
            kind = "f32" if dtype == torch.float32 or name == "reference" else "bf16"
            made[name] = backend.compile(decoder, backend.new_kv(len(decoder.layers), 64 * 24, 16, heads, kind))
        whole = steps([300, 40], [0, 0], 24)
        every = np.arange(340, dtype=np.int32)
        expected = made["reference"].run(whole, every)
        got = made["triton"].run(whole, every)
        error = triton_parity.error_of(got, expected)
        print(
            f"  {dtype}: logits of {len(every)} tokens, relative error {error:.1e}, same most likely token "
            f"{float((got.argmax(-1).cpu() == expected.argmax(-1)).float().mean()):.1%}"
        )
        results[f"model {dtype}"] = error
        if not error <= bound:
            results["failed"].append(f"model {dtype}")
        program, last = made["triton"], got[299].clone()
        for cut in (1, 7, 100, 299):
            program.run(whole_part(whole, 0, cut), np.array([], np.int32))
            rest = whole_part(whole, cut, 300)
            again = program.run(rest, np.array([300 - cut - 1], np.int32))[0]
            if not torch.equal(again, last):
                results["failed"].append(f"chunks {dtype}")
                print(f"  {dtype}: WRONG: the last of 300 tokens after a chunk of {cut} is not the same bits")
        for size in (1, 5, 64):
            ids = [299] * size
            batch = steps([1] * size, ids, 24)
            batch.ids[0], batch.pages[0] = whole.ids[299], whole.pages[0]
            batch.slots[0] = whole.slots[299]
            program.run(whole, np.array([], np.int32))
            alone = program.run(batch, np.arange(size, dtype=np.int32))[0]
            if not torch.equal(alone, last):
                results["failed"].append(f"graph {dtype}")
                print(f"  {dtype}: WRONG: a decoded token among {size} is not the same bits as in its prompt")


def whole_part(batch: Batch, begin: int, end: int) -> Batch:
    return Batch(
        batch.ids[begin:end], batch.positions[begin:end], batch.slots[begin:end], np.array([0, end - begin], np.int32), batch.pages[:1]
    )


SHAPES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)}


def products(results: dict, peak: Peaks) -> None:
    ops = TritonOps(torch.bfloat16, torch.bfloat16)
    rows = results["products"] = []
    print("  Llama-3-8B       weights          rows       µs    GB/s  of peak  TFLOP/s  of peak   torch bf16 µs")
    for form, bits in FORMS.items():
        for name, (n, k) in SHAPES.items():
            # Several, so that none is found in the cache.
            count = max(1, min(6, (400 << 20) // (n * k * bits // 8)))
            weights = [[random_weight(n, k, form)] for _ in range(count)]
            for tokens in (1, 16, 64, 128, 2048) if form == "bf16" or name == "gate up" else (1, 16, 64):
                x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)

                def all_of_them(x=x, weights=weights):
                    for weight in weights:
                        ops.linear(x, weight)

                took = milliseconds(all_of_them) / count * 1e-3
                others = None
                if form == "bf16":
                    others = milliseconds(lambda x=x, weights=weights: [x @ w[0].values.t() for w in weights]) / count * 1e3
                moved, done = n * k * bits / 8 + 2 * tokens * (n + k), 2 * tokens * n * k
                rows.append(
                    {
                        "layer": name,
                        "weights": form,
                        "rows": tokens,
                        "us": took * 1e6,
                        "torch_us": others,
                        "bytes_share": moved / took / peak.bytes_s,
                        "operations_share": done / took / peak.operations_s,
                    }
                )
                print(
                    f"  {name:16} {form:12} {tokens:7} {took * 1e6:8.1f} {moved / took / 1e9:7.0f} {moved / took / peak.bytes_s:7.0%}"
                    f" {done / took / 1e12:8.1f} {done / took / peak.operations_s:7.0%}   {others or 0:8.1f}",
                    flush=True,
                )
            del weights


def attentions(results: dict, peak: Peaks) -> None:
    heads, ops = HeadShape(32, 8, 128), TritonOps(torch.bfloat16, torch.bfloat16)
    rows = results["attention"] = []
    for kind, each, fresh, context in [("bf16", b, 1, c) for b, c in ((1, 2048), (1, 8192), (32, 2048), (128, 2048))] + [
        ("int8", 32, 1, 2048),
        ("fp8", 32, 1, 2048),
        ("bf16", 1, 2048, 2048),
        ("bf16", 4, 512, 4096),
    ]:
        width = context // 16
        kv = KVPages.new(each * width, 16, heads, DEVICE, kind)
        if kind == "bf16":
            kv.keys.normal_(), kv.values.normal_()
        else:
            # Bytes below 127 are numbers in float8 too.
            for x in (kv.keys, kv.values):
                x.view(torch.int8).random_(-127, 127)
            kv.scales.fill_(0.01)
        batch = steps([fresh] * each, [context - fresh] * each, width)
        tokens = StepTokens.of(batch, DEVICE)
        q = torch.randn(each * fresh, 4096, device=DEVICE, dtype=kv.multiplied_as)
        tokens.tiles(4)
        took = milliseconds(lambda: ops.attention(q, heads, kv, tokens, 128**-0.5, None)) * 1e-3  # noqa: B023
        moved = each * context * 2 * 8 * (128 * kv.keys.element_size() + (4 if kv.scales is not None else 0)) + each * fresh * 4096 * 4
        done = each * 4 * 4096 * (fresh * context - fresh * (fresh - 1) // 2)
        rows.append(
            {
                "kv": kind,
                "requests": each,
                "fresh": fresh,
                "context": context,
                "us": took * 1e6,
                "bytes_share": moved / took / peak.bytes_s,
                "operations_share": done / took / peak.operations_s,
            }
        )
        print(
            f"  {kind:5} {each:4} requests of {context:5}, {fresh:5} new: {took * 1e6:8.1f} µs {moved / took / 1e9:6.0f} GB/s "
            f"{moved / took / peak.bytes_s:5.0%}  {done / took / 1e12:6.1f} TFLOP/s {done / took / peak.operations_s:5.0%}",
            flush=True,
        )


def decoding(results: dict, peak: Peaks) -> None:
    """Whole decode steps of Llama-3-8B with random weights, through the program and its graphs."""
    rows = results["decode"] = []
    heads = head_shape(LLAMA_8B)
    for form in ("bf16", "e4m3", "int4"):
        bits = FORMS[form] + (2 / 16 if form == "int4" else 0)
        checkpoint = RandomCheckpoint(LLAMA_8B, torch.bfloat16)
        backend = OnDevice(checkpoint, form)
        decoder = Decoder(LLAMA_8B, HUGGINGFACE, checkpoint, backend, 8192)
        kv = backend.new_kv(32, 128 * 129, 16, heads, "bf16")
        program = TritonProgram(backend, decoder, kv)
        for each in (1, 32, 128):
            batch, picks = steps([1] * each, [2047] * each, 129), np.arange(each, dtype=np.int32)
            took = []
            for _ in range(20):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                program.run(batch, picks).argmax(-1).tolist()
                took.append(time.perf_counter() - begun)
            step = float(np.median(took[5:]))
            weights = 7.504e9 * bits / 8
            floor = (weights + each * 2048 * 2 * 8 * 128 * 2 * 32) / peak.bytes_s
            rows.append({"weights": form, "requests": each, "ms": step * 1e3, "floor_ms": floor * 1e3})
            print(
                f"  {form:5} {each:3} requests at 2048: {step * 1e3:6.2f} ms a step, {each / step:6.0f} tok/s; "
                f"weights and KV once: {floor * 1e3:.2f} ms ({floor / step:.0%})",
                flush=True,
            )
        prompt = steps([2048], [0], 129)
        program.run(prompt, np.array([2047], np.int32)).argmax(-1).tolist()
        begun = time.perf_counter()
        program.run(prompt, np.array([2047], np.int32)).argmax(-1).tolist()
        took_s = time.perf_counter() - begun
        rows.append({"weights": form, "prompt": 2048, "ms": took_s * 1e3})
        print(f"  {form:5} a prompt of 2048: {took_s * 1e3:.1f} ms, {2048 * 2 * 7.0e9 / took_s / 1e12:.0f} TFLOP/s")
        del program, decoder, kv, backend
        torch.cuda.empty_cache()


def serving(results: dict, model_path: str, kernels: str = "triton") -> None:
    """`headrace serve` as a user starts it: the same tokens alone, together, from the cache and after a worker's death, then workloads."""
    prompts = [f"Number {place}: " + "once upon a time there was " * (1 + 7 * place % 23) for place in range(24)]
    bodies = [
        {"prompt": prompt, "max_tokens": 48, "seed": place, "logprobs": 1, "ignore_eos": True} | ({"temperature": 0} if place % 2 else {})
        for place, prompt in enumerate(prompts)
    ]
    with Command("serve", model_path, "--kernels", kernels, "--port", "0", "--kv-dtype", "f16") as served:

        def ask(body: dict) -> tuple:
            status, answer = served.ask("/v1/completions", body)
            assert status == 200, answer
            choice = answer["choices"][0]
            return choice["text"], tuple(choice["logprobs"]["token_logprobs"])

        alone = [ask(body) for body in bodies]
        again = [ask(body) for body in bodies[:6]]
        with ThreadPoolExecutor(len(bodies)) as pool:
            together = list(pool.map(ask, bodies))
            recovering = pool.map(ask, bodies)
            served.until_running(1)
            served.kill("worker-0")
            recovered = list(recovering)
        same = {"cached": again == alone[:6], "together": together == alone, "recovered": recovered == alone}
        results["serving"] = {"same": same, "works": {}}
        print(f"  tokens and logprobs, bit for bit as alone: {same}", flush=True)
        results["failed"] += [f"serving {name}" for name, is_same in same.items() if not is_same]
        for work in ("a", "b", "c", "d"):
            report = bench(Options(url=served.url, work=work, seed=1, **WORKLOADS[work]))  # type: ignore[arg-type]
            figures = {"decode tok/s": report.decode_tok_s, "prompt tok/s": report.prompt_tok_s, "output tok/s": report.output_tok_s}
            figures |= {"ttft ms": report.ttft_ms.p50 if report.ttft_ms else None, "wall s": report.wall_s}
            results["serving"]["works"][work] = figures
            print(f"  {work}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items() if value), flush=True)


def samplings(results: dict, _: Peaks) -> None:
    """Milliseconds, of the host too, to sample rows of Llama-3's vocabulary."""
    backend, rows = TritonBackend("cuda"), results.setdefault("sampling", [])
    asked = {"greedy": {"temperature": 0.0}, "top p": {"top_p": 0.9}, "top p, logprobs": {"top_p": 0.9, "logprobs": 5}}
    asked["penalties"] = {"top_p": 0.9, "repetition_penalty": 1.1, "output": tuple(range(500))}
    for count in (1, 32, 128):
        logits = torch.randn(count, LLAMA_8B.vocab_size, device=DEVICE) * 3
        for name, settings in asked.items():
            batch, took = batch_of(*({"seed": seed} | settings for seed in range(count))), []
            for _ in range(12):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                backend.sample(logits, batch)
                took.append(time.perf_counter() - begun)
            rows.append({"rows": count, "asked": name, "ms": float(np.median(took[3:])) * 1e3})
            print(f"  {count:4} rows, {name:16} {rows[-1]['ms']:6.2f} ms", flush=True)


SECTIONS = {"model": model, "decode": decoding, "products": products, "attention": attentions, "sampling": samplings, "parity": parity}


def sections(names: list[str]) -> Iterator[tuple[str, Callable[[dict, Peaks], None]]]:
    for name, section in SECTIONS.items():
        if not names or name in names:
            yield name, section


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all without any")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", metavar="MODEL", help="serve this model too, and compare and time its answers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU here: run this on a machine with one")
    peak = peaks()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    results |= {"peak_gb_s": peak.bytes_s / 1e9, "peak_tflop_s": peak.operations_s / 1e12, "failed": []}
    print({key: value for key, value in results.items() if key != "failed"}, flush=True)
    chosen = {"serving": lambda results, _: serving(results, arguments.serve)} if arguments.serve else {}
    chosen |= dict(sections(arguments.sections))
    for name, section in chosen.items():
        begun = time.perf_counter()
        print(f"{name}:", flush=True)
        try:
            section(results, peak)
        except Exception as failure:
            results["failed"].append(name)
            print(f"  FAILED: {failure!r}"[:1500])
            print(traceback.format_exc()[-1800:], flush=True)
        print(f"  ({time.perf_counter() - begun:.0f} s)", flush=True)
        if arguments.json:
            with open(arguments.json, "w") as file:  # noqa: PTH123
                json.dump(results, file, indent=1)
    print("failed:", results["failed"] or "nothing")
    sys.exit(bool(results["failed"]))


if __name__ == "__main__":
    main()
