#!/usr/bin/env python3
"""Measure what an engine's number formats cost in quality: perplexity, and KL divergence a token from the model computed in float32.

    scripts/bench/quality.py MODEL.gguf [--peer llama.cpp=/path/to/llama-perplexity] [-- OPTIONS OF headrace serve]

The oracle is `transformers` on the file's dequantized weights in float32, so that what is measured is the engine's arithmetic (rounded
activations, rounded KV), not the file's rounding of the weights. All engines read the same chunks of the same text, each chunk on its own,
and the second half of each is scored. Headrace is held to the oracle exactly; peers through the file that llama-perplexity reads, which
rounds the oracle to 16 bits: what that rounding alone does is in the table as the floor.
"""

import argparse
import hashlib
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import dequantize
import msgspec
import numpy as np
import torch
from divergence import RANGE_NATS, Divergence, Figures, pack, unpack, write_head
from processes import parse

from headrace.client.bench.corpus import load_words
from headrace.client.bench.machine import Machine, facts
from headrace.engine import settings
from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.errors import UserError
from headrace.kernels.ops import Batch
from headrace.kernels.select import make_backend
from headrace.tokenizer_proc.gguf import parts_from_metadata
from headrace.workers.loader import open_checkpoint
from headrace.workers.model.decoder import load_decoder

SCHEMA = "headrace-quality/1"
Logits = Callable[[np.ndarray, int], torch.Tensor]
"""(ids of a chunk, first): float32 [n, V], what is predicted after each of ids[first] … ids[-2]. Good until the next call."""


class Result(msgspec.Struct):
    schema: str
    model: str
    text: str
    """Which text, and the digest of its tokens."""
    chunk_tokens: int
    headrace_options: list[str]
    oracle_perplexity: float
    engines: dict[str, Figures]
    machine: Machine


def oracle(file: Path) -> Logits:
    """The model as its file defines it, in float32, by an implementation that is not ours."""
    model = dequantize.load(file)

    @torch.inference_mode()
    def logits(ids: np.ndarray, first: int) -> torch.Tensor:
        return model(torch.from_numpy(ids[None].astype(np.int64)), logits_to_keep=len(ids) - first).logits[0, :-1]

    return logits


def headrace(config: Config, chunk_tokens: int) -> Logits:
    """The model as `headrace serve` computes it under these settings: a step that reads a whole chunk."""
    model = resolve(config)
    backend = make_backend(config.kernels, threads=config.threads, activations=config.activations)
    decoder = load_decoder(model.architecture, open_checkpoint(model), backend, chunk_tokens)
    pages = -(-chunk_tokens // config.page_size)
    program = backend.compile(decoder, backend.new_kv(len(decoder.layers), pages, config.page_size, decoder.heads, config.kv_dtype))

    def logits(ids: np.ndarray, first: int) -> torch.Tensor:
        places = np.arange(len(ids), dtype=np.int32)
        # The pages are in order, so a token's slot is its place.
        batch = Batch(ids, places, places, np.array([0, len(ids)], np.int32), np.arange(pages, dtype=np.int32)[None])
        return torch.from_numpy(np.asarray(program.run(batch, places[first:-1])))

    return logits


def read_chunks(file: Path, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Real text: (tokens as they follow each other, tokens as a model gets them), int32 [count, length] each.

    The model gets BOS as the first token of a chunk where the file asks for one. Raises `UserError` when the text is too short.
    """
    parts = parts_from_metadata(_metadata(file), str(file))
    ids = np.array(parts.backend.encode(" ".join(load_words(None)), add_special_tokens=False).ids, np.int32)
    if len(ids) < count * length:
        raise UserError(f"the text has {len(ids)} tokens: ask for at most {len(ids) // length} chunks of {length}")
    following = ids[: count * length].reshape(count, length)
    given = following.copy()
    if parts.prefix:
        given[:, 0] = parts.prefix[0]
    return following, given


def _metadata(file: Path) -> dict[str, object]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def measure(true: Logits, ours: Logits, following: np.ndarray, given: np.ndarray, base: Path | None) -> Iterator[dict[str, Divergence]]:
    """Read chunk after chunk with both, and write the oracle's distributions to `base`; what is known so far after each."""
    first = following.shape[1] // 2
    exact, rounded, floor = Divergence(), Divergence(), Divergence()
    with open(os.devnull if base is None else base, "wb") as out:  # noqa: PTH123
        for number, (row, ids) in enumerate(zip(following, given, strict=True)):
            logits = true(ids, first)
            tokens = torch.from_numpy(row[first + 1 :].astype(np.int64))
            packed = pack(logits.numpy())
            if number == 0:
                write_head(out, following, logits.shape[1])
            out.write(packed.tobytes())
            known = torch.from_numpy(unpack(packed, logits.shape[1])).double()
            floor.add(known, logits, tokens, -RANGE_NATS)
            measured = ours(ids, first)
            exact.add(torch.log_softmax(logits.double(), -1), measured, tokens)
            rounded.add(known, measured, tokens, -RANGE_NATS)
            yield {"headrace": exact, "headrace, against 16 bits": rounded, "floor of 16 bits": floor}


def ask_peer(name: str, program: str, file: Path, base: Path, length: int, threads: int, ours: Figures) -> Figures:
    """What llama-perplexity finds against the oracle's file, on the tokens that `ours` is about. Raises `UserError`."""
    command = [program, "-m", str(file.resolve()), "--kl-divergence", "--kl-divergence-base", str(base.resolve())]
    command += ["-c", str(length), "-b", str(length), "-t", str(threads)]
    try:  # where the base lies: some leave logs in the folder that they run in
        said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=base.parent)
    except OSError as error:
        raise UserError(f"{name}: cannot start {program}: {error.strerror}") from None

    def figure(label: str) -> float:
        if found := re.search(rf"{re.escape(label)}\s*:\s*(-?[\d.]+)", said.stdout):
            return float(found[1])
        raise UserError(f"{name} ended with status {said.returncode} and did not say {label!r}:\n{said.stdout[-2000:]}")

    error = re.search(r"Mean\s+KLD:\s*-?[\d.]+\s*±\s*([\d.]+)", said.stdout)
    perplexity = figure("Mean PPL(Q)")
    return Figures(
        tokens=ours.tokens,
        perplexity=perplexity,
        # Not its own "ln(PPL(Q)/PPL(base))": 16 bits make the oracle's rarest tokens likelier than they are.
        excess=math.log(perplexity / ours.perplexity) + ours.excess,
        kl=figure("Mean    KLD"),
        kl_error=float(error[1]) if error else float("nan"),
        kl_99=figure("99.0%   KLD"),
        same_top=figure("Same top p") / 100,
    )


def table(result: Result) -> str:
    width = max(map(len, result.engines)) + 2
    tokens = result.engines["headrace"].tokens
    lines = [
        f"{result.model}: {tokens} scored tokens of {result.text}",
        f"oracle (transformers, float32): perplexity {result.oracle_perplexity:.4f}",
        "",
        f"{'':{width}}{'perplexity':>11}{'excess':>11}{'mean KL':>12}{'± ':>11}{'99% KL':>12}{'same top':>10}",
    ]
    for name, one in result.engines.items():
        lines.append(
            f"{name:{width}}{one.perplexity:11.4f}{one.excess:+11.6f}{one.kl:12.3e}{one.kl_error:11.1e}{one.kl_99:12.3e}{one.same_top:10.3%}"
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> Result:
    parser = argparse.ArgumentParser(prog="headrace serve", argument_default=argparse.SUPPRESS)
    settings.add_arguments(parser)
    flags = vars(parser.parse_args([str(arguments.model), "--threads", str(arguments.threads), *arguments.serve]))
    config = settings.load(flags, os.environ, flags.pop("config", None))
    torch.set_num_threads(arguments.threads)
    following, given = read_chunks(arguments.model, arguments.chunks, arguments.chunk_tokens)
    digest = hashlib.sha256(following.tobytes()).hexdigest()[:16]
    text = f"Python {platform.python_version()}'s help topics ({arguments.chunks} × {arguments.chunk_tokens} tokens, sha256 {digest}…)"
    peers = dict(text.split("=", 1) for text in arguments.peer)
    with tempfile.TemporaryDirectory(prefix="quality-", dir=arguments.scratch) as folder:
        base = Path(folder) / "oracle.kld" if peers else None
        found: dict[str, Divergence] = {}
        steps = measure(oracle(arguments.model), headrace(config, arguments.chunk_tokens), following, given, base)
        for number, found in enumerate(steps, 1):
            figures = found["headrace"].figures()
            print(f"chunk {number}/{len(given)}: perplexity {figures.perplexity:.4f}, KL {figures.kl:.3e}", file=sys.stderr, flush=True)
        engines = {name: one.figures() for name, one in found.items()}
        for name, program in peers.items():
            print(f"{name} …", file=sys.stderr, flush=True)
            assert base
            engines[name] = ask_peer(name, program, arguments.model, base, arguments.chunk_tokens, arguments.threads, engines["headrace"])
    perplexity = float(np.exp(np.mean(found["headrace"].oracle_losses)))
    return Result(SCHEMA, arguments.model.name, text, arguments.chunk_tokens, arguments.serve, perplexity, engines, facts())


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure perplexity and KL divergence from the float32 model.")
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("--peer", action="append", default=[], metavar="NAME=PROGRAM", help="a llama-perplexity, of llama.cpp or a fork of it")
    add("--chunks", type=int, default=80, metavar="N", help="default: %(default)s, which scores 20,400 tokens of 512-token chunks")
    add("--chunk-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores")
    add("--scratch", type=Path, metavar="FOLDER", help="for the file that peers read: about 2 GB with 80 chunks and 49,152 tokens")
    add("--json", type=Path, default=Path("build/bench/quality.json"), help="default: %(default)s")
    arguments = parse(parser)
    try:
        for text in arguments.peer:
            if "=" not in text:
                raise UserError(f"--peer {text}: say NAME=PROGRAM")
        result = run(arguments)
    except UserError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(table(result))
    print(f"saved {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
