"""The Triton kernels without a GPU: run by the CPU's backend in every type, by Triton's interpreter in float32, the one type that it
rounds rightly, and compiled for GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
if os.path.exists("/dev/nvidiactl"):  # noqa: PTH110
    pytest.skip("there is a GPU: scripts/gpu-check runs the kernels on it", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SHARDS = 12


def outcomes(*arguments: str, timeout: float, interpreted: bool = False) -> list[dict]:
    """Those of `tests.kernels.triton_parity` in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_parity", "--device", "cpu", *arguments]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, env=environment, check=False)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert lines, ended.stderr
    return lines


# A kernel takes seconds to compile, and every check has its own: each tier takes some, `--shard 0 1` by hand takes all.
@pytest.mark.parametrize("shard", [(7, 80), *(pytest.param((first, 16), marks=pytest.mark.slow) for first in (0, 5, 10))])
def test_every_op_is_what_the_reference_gives_in_every_type_and_to_the_bit_in_any_batch(shard):
    found = outcomes("--shard", *map(str, shard), timeout=1200)
    assert {one["type"] for one in found} == {"bfloat16", "float16", "float32"}
    assert [one for one in found if not one["ok"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("which", ["linear int8 x int8 rows alone", "linear e4m3 x e4m3 rows alone", "experts int8 x int8 rows alone"])
def test_products_with_inputs_in_8_bits_are_the_same_bits_however_their_sums_are_split(which):
    found = outcomes("--only", which, timeout=1200)
    assert len(found) == 3
    assert [one for one in found if not one["ok"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_op_is_what_the_reference_gives_in_the_interpreter(shard):
    # The interpreter multiplies matrices by a BLAS, whose rows know their neighbours, and rounds to float8 wrongly: neither is compared.
    every = outcomes("--shard", str(shard), str(SHARDS), timeout=300, interpreted=True)
    found = [one for one in every if one["bound"] and "e4m3 x" not in one["check"] and "fp8" not in one["check"]]
    assert len(found) > 3
    assert [one for one in found if not one["ok"]] == []


def test_codes_of_four_bits_are_packed_and_taken_apart_alike():
    import torch

    from headrace.kernels.triton.weights import prepare
    from headrace.kernels.weights import GroupedInt

    codes = np.random.default_rng(1).integers(-8, 8, (5, 256), np.int8)
    (weight,) = prepare([GroupedInt(codes, np.ones((5, 4), np.float32), None, 64, 4)], None, torch.device("cpu"))
    packed = weight.values.numpy().reshape(5, -1, weight.part)
    apart = np.stack([packed & 15, packed >> 4], 2).astype(np.int8) + weight.low
    assert (apart.reshape(5, -1) == codes).all()


def test_the_rows_that_a_row_of_a_tree_sees_are_its_path_from_the_root():
    from headrace.kernels.triton.step import paths

    starts, parents = np.array([0, 4, 6], np.int32), np.array([-1, 0, 0, 2, -1, 0], np.int32)
    assert paths(starts, parents).tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 2, 3], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("splits", [(4096, 4096), (28672, 4096), (64, 100_000), (128256, 64)])
def test_a_product_is_split_by_its_weight_alone_and_whole_blocks_at_a_time(splits):
    from headrace.kernels.triton.tiles import MOST_SPLITS, SPLIT_STEP, split_of

    outputs, inputs = splits
    split = split_of(outputs, inputs)
    assert split % SPLIT_STEP == 0
    assert 1 <= -(-inputs // split) <= MOST_SPLITS


MODELS, TARGETS = ("Llama-3-8B", "Llama-3-70B/TP8", "Qwen3-32B/TP4"), ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
EXPERTS = pytest.param("Qwen3-30B-A3B", "sm_90", 1, marks=pytest.mark.slow)
EVERY = [pytest.param(model, target, 1, marks=pytest.mark.slow) for model in MODELS for target in TARGETS]


@pytest.mark.parametrize(("model", "target", "every"), [("Llama-3-8B", "sm_90", 7), *EVERY, EXPERTS])
def test_no_kernel_exceeds_its_budget_on_a_gpu_that_is_not_here(model, target, every, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from scripts.lib.kernel_report import check

    wrong, figures = check([model], [target], every=every)
    assert len(figures[target]) > 60 // every
    assert wrong == []


CORES = {"sm_80": "[HI]MMA", "sm_89": "[HIQ]MMA", "sm_90": "[HIQ]GMMA", "sm_100": r"UTC\w*MMA", "sm_120": "[HIQ]MMA", "gfx942": "v_mfma_"}
"""What products are computed with. Triton has no int8 for those of sm_100, and multiplies it as Ampere does."""


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_budget_allows_is_what_products_and_decoding_should_take(target, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from headrace.kernels.aot import MOST_SHARED
    from scripts.lib.kernel_report import BUDGET

    kernels = json.loads(BUDGET.read_text())[target]
    spilling = [name for name, one in kernels.items() if one["spills"] and "prefill" not in name]
    oversized = [name for name, one in kernels.items() if one["shared"] > MOST_SHARED[target]]
    products = {name: one for name, one in kernels.items() if re.search(": (linear|grouped|scaled|attention)_kernel", name)}
    others = [
        name
        for name, one in products.items()
        if not any(re.match(CORES[target], core) for core in one["tensor_core"]) and (target, "int8 x int8" in name) != ("sm_100", True)
    ]
    assert (spilling, oversized, others) == ([], [], [])
    assert len(products) > 60


def test_a_kernel_that_spills_or_loses_its_tensor_cores_is_over_budget(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from collections import Counter

    from headrace.kernels.aot import Compiled
    from scripts.lib.kernel_report import broken

    budget = {"registers": 64, "spills": 0, "shared": 1024, "wide_loads": 1.0, "tensor_core": ["HGMMA"]}
    good = Compiled("k", "sm_90", None, 64, 0, 1024, 4, Counter({"HGMMA.64x16x16": 4, "LDG.E.128": 2}))
    assert list(broken("k", "sm_90", good, budget)) == []
    bad = Compiled("k", "sm_90", None, 128, 32, 1 << 20, 4, Counter({"FFMA": 4, "LDG.E.U16": 2}))
    said = " ".join(broken("k", "sm_90", bad, budget))
    assert all(words in said for words in ("128 registers", "spills 32", "shared memory", "loads 0%", "no longer uses HGMMA"))


def test_decode_steps_move_little_beside_weights_and_keys_and_values(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from scripts.lib.kernel_report import decode_steps

    steps = decode_steps()
    assert {one.form for one in steps} == {"bf16", "e4m3", "int4"}
    assert all(0.85 < one.must / one.moved <= 1 for one in steps)
    # Llama-3-8B without its embedding, and keys and values of 2,048 tokens in 32 layers of 8 heads of 128.
    must = 2 * 7.504e9 + 2048 * 32 * 2 * 8 * 128 * 2
    assert abs(steps[0].must / must - 1) < 0.01


@pytest.mark.parametrize(
    ("field", "value"), [("ids", 100), ("ids", -1), ("slots", 64), ("slots", -1), ("pages", 4), ("positions", 32), ("query_start", 3)]
)
def test_an_index_beside_what_there_is_is_an_error_and_no_access(field, value):
    import torch

    from headrace.kernels.ops import Batch, HeadShape
    from headrace.kernels.triton import check_indices
    from headrace.kernels.triton.pages import KVPages

    kv = KVPages.new(4, 16, HeadShape(2, 1, 16), torch.device("cpu"), "f32")
    arrays = {"ids": [5, 99], "positions": [0, 31], "slots": [0, 63], "query_start": [0, 1, 2], "pages": [[0, 1], [3, 2]]}
    right = Batch(**{name: np.array(values, np.int32) for name, values in arrays.items()})
    check_indices(right, np.array([1], np.int32), 100, kv)
    with pytest.raises(ValueError, match="picks from 2 to 2: they must be from 0 to 1"):
        check_indices(right, np.array([2], np.int32), 100, kv)
    getattr(right, field).flat[-1] = value
    with pytest.raises(ValueError, match=field):
        check_indices(right, np.array([1], np.int32), 100, kv)
