"""What `scripts/gpu-check` runs: parity, whole models, graphs, served answers, and every kernel's share of what the card can do.

    sections ─▶ items, one after the other, until --seconds are over ─▶ lines as they come, and one JSON after each item

An item that fails is told and the next one runs. When time is over, the item that runs is left where it is; what has not been done is
listed, at the end and in the JSON. With --after FILE, what that JSON does not have comes first.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from headrace.client.bench import Options, bench
from headrace.client.bench.options import WORKLOADS
from headrace.kernels.ops import Batch
from headrace.kernels.reference import ReferenceBackend
from headrace.kernels.triton import TritonBackend
from headrace.workers.model.decoder import Decoder, head_shape
from headrace.workers.model.names import HUGGINGFACE
from scripts.lib import gpu_times
from scripts.lib.gpu_drafts import drafts
from scripts.lib.gpu_times import Items, RandomCheckpoint, Run, steps
from scripts.lib.kernel_parity import line_of, ordered, outcomes, table
from scripts.lib.step_model import plain_llama
from tests.kernels import triton_parity
from tests.serving import Command

COMPARE = Path(__file__).resolve().parents[1] / "bench" / "compare.py"
SMALL = plain_llama(256, 8, 2, 704, 4, 1000, 32)


class OutOfTime(BaseException):
    """Raised in whatever runs when time is over. No Exception: nothing that runs may take it for a failure of its own."""


class Clock:
    """So many seconds from now on; without end if there are none."""

    def __init__(self, seconds: float | None) -> None:
        self.over = False
        self._running = False
        if seconds is not None:
            signal.signal(signal.SIGALRM, self._end)
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _end(self, *_: Any) -> None:
        self.over = True
        if self._running:
            raise OutOfTime

    @contextmanager
    def running(self) -> Iterator[None]:
        """What runs inside may be ended, nothing else."""
        self._running = True
        try:
            if self.over:
                raise OutOfTime
            yield
        finally:
            self._running = False


def model(run: Run) -> Items:
    """A small Llama: against the reference, chunks against the whole, graphs against plain steps, a row alone against in a batch."""
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        yield str(dtype), lambda a=(dtype, bound): small_model(run.results, *a)


def small_model(results: dict, dtype: torch.dtype, bound: float) -> None:
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
    error = triton_parity.error_of(got, expected).relative
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


def parity(run: Run) -> Items:
    """`tests.kernels.triton_parity`."""
    titles = [check.title for check in triton_parity.every(str(gpu_times.DEVICE))]
    numbers = [number for number in ordered(titles, run.earlier.get("parity", [])) if run.only in titles[number]]
    yield f"{len(numbers)} checks", lambda: compare(run.results, titles, numbers)


def compare(results: dict, titles: list[str], numbers: list[int]) -> None:
    begun, lines = time.perf_counter(), results.setdefault("parity", [])
    try:
        for line in outcomes(str(gpu_times.DEVICE), numbers):
            number = line.pop("number")
            lines.append(line)
            if not line["ok"]:
                results["failed"].append(f"parity: {titles[number]}")
                print(f"  WRONG {titles[number]}", {key: value for key, value in line.items() if key != "where"})
                print(line.get("where", "")[-500:])
            if len(lines) % 20 == 0 or not line["ok"]:
                print(f"  {len(lines):4} of {len(numbers)} checks after {time.perf_counter() - begun:.0f} s", flush=True)
    finally:
        right = sum(line["ok"] for line in lines)
        print(f"  {right} of {len(lines)} checks are right, {len(numbers) - len(lines)} were not made", flush=True)
        for row in table(lines):
            print(" ", line_of(row))


def serving(run: Run) -> Items:
    """The model that --serve names, by itself and beside vLLM if that is installed."""
    if model := run.model:
        yield Path(model).name, lambda: serve(run.results, model)
        if program := shutil.which("vllm"):
            yield f"{Path(model).name} beside vLLM", lambda: beside_vllm(run.results, model, program)


def beside_vllm(results: dict, model_path: str, vllm: str) -> None:
    """The four workloads, in turn with vLLM."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "compare.json"
        command = [sys.executable, str(COMPARE), model_path, "--peer", f"vllm-gpu={vllm}", "--rounds", "3", "--json", str(written)]
        subprocess.run([*command, "--", "--kernels", "triton"], check=True)
        results["beside vLLM"] = json.loads(written.read_text())


def serve(results: dict, model_path: str) -> None:
    """`headrace serve` as a user starts it: the same tokens alone, together, from the cache and after a worker's death, then workloads."""
    prompts = [f"Number {place}: " + "once upon a time there was " * (1 + 7 * place % 23) for place in range(24)]
    bodies = [
        {"prompt": prompt, "max_tokens": 48, "seed": place, "logprobs": 1, "ignore_eos": True} | ({"temperature": 0} if place % 2 else {})
        for place, prompt in enumerate(prompts)
    ]
    with Command("serve", model_path, "--kernels", "triton", "--port", "0", "--kv-dtype", "f16") as served:

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


SECTIONS: dict[str, Callable[[Run], Items]] = {
    "drafts": drafts,
    "sampling": gpu_times.samplings,
    "experts": gpu_times.experts,
    "parity": parity,
    "model": model,
    "serving": serving,
    "decode": gpu_times.decoding,
    "attention": gpu_times.attentions,
    "products": gpu_times.products,
}
"""In this order: the first three have never been run on a GPU."""


def work_through(names: list[str], run: Run, clock: Clock, write: Callable[[], None]) -> None:
    """All items of these sections, or of all, until time is over; fills "done", "left" and "failed"."""
    results, done = run.results, run.earlier.get("done", [])
    chosen = [(name, section) for name, section in SECTIONS.items() if name in names or not names]
    items = [(f"{name}: {item}", work) for name, section in chosen for item, work in section(run)]
    for title, work in sorted(items, key=lambda item: item[0] in done):
        begun = time.perf_counter()
        try:
            with clock.running():
                print(title, flush=True)
                work()
            results["done"].append(title)
            print(f"  ({time.perf_counter() - begun:.0f} s)", flush=True)
        except OutOfTime:
            results["left"].append(title)
        except Exception as failure:
            # What time ran out for may say so in its own way.
            results["left" if clock.over else "failed"].append(title)
            if not clock.over:
                print(f"  FAILED: {failure!r}"[:1500])
                print(traceback.format_exc()[-1800:], flush=True)
        write()


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all without any")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--serve", metavar="MODEL", help="serve this model too, and compare and time its answers")
    parser.add_argument("--only", metavar="TEXT", default="", help="of parity, the checks whose name and type contain this")
    parser.add_argument("--seconds", metavar="N", type=float, help="stop after so many, and tell what has not been done")
    parser.add_argument("--after", metavar="FILE", type=Path, help="what this JSON of an earlier run does not have comes first")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    if (name := gpu_times.device_name()) is None:
        sys.exit("error: torch sees no GPU here: run this on a machine with one")
    clock = Clock(arguments.seconds)
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    peak = gpu_times.peaks()
    results |= {"peak_gb_s": peak.bytes_s / 1e9, "peak_tflop_s": peak.operations_s / 1e12}
    print(results, flush=True)
    results |= {"failed": [], "left": [], "done": []}
    earlier = json.loads(arguments.after.read_text()) if arguments.after else {}

    def write() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    work_through(arguments.sections, Run(results, peak, arguments.only, arguments.serve, earlier), clock, write)
    print("not done, or not to the end:", ", ".join(results["left"]) or "nothing")
    print("failed:", ", ".join(results["failed"]) or "nothing")
    sys.exit(bool(results["failed"]))


if __name__ == "__main__":
    main()
