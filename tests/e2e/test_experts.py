"""A mixture of experts as a user serves it: a directory of random weights, real processes, and the tokens that transformers generates."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from headrace.client import Client
from tests.serving import Command
from tests.workers.model.tiny import SIZES, build

COUNT = 40
PROMPTS = [torch.randint(3, 199, (5 + 9 * n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(8)]


def write_tokenizer(directory: Path) -> None:
    """A token's text tells its number."""
    tokenizer = Tokenizer(models.BPE({f"t{number} ": number for number in range(SIZES["vocab_size"])}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("qwen3-moe", "cpu"),
        pytest.param("mixtral", "cpu", marks=pytest.mark.slow),
        pytest.param("qwen3-moe-in-some-layers", "reference", marks=pytest.mark.slow),
        pytest.param("qwen3-moe", "triton", marks=pytest.mark.slow),
    ],
)
def test_eight_prompts_at_once_give_what_transformers_generates(name, kernels, tmp_path):
    if kernels == "triton":
        pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
    model = build(name, tmp_path)
    write_tokenizer(tmp_path)
    settings = ("--kernels", kernels, "--activations", "f32", "--kv-dtype", "f32", "--kv-memory", "50MiB", "--hang-timeout", "600")
    with (
        Command("serve", str(tmp_path), "--port", "0", *settings) as served,
        Client(served.url, timeout=900) as client,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):

        def ask(prompt: list[int]) -> list[int]:
            answer = client.complete(prompt=prompt, max_tokens=COUNT, temperature=0, ignore_eos=True)
            return [int(number) for number in re.findall(r"t(\d+)", answer.choices[0].text)]

        got = list(pool.map(ask, PROMPTS))
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        with torch.no_grad():
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False)[0, len(prompt) :]
        assert tokens == expected.tolist()
