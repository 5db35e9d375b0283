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
SHARDS = 4


def outcomes(*arguments: str, timeout: float, interpreted: bool = False) -> list[dict]:
    """Those of `tests.kernels.triton_parity` in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_parity", "--device", "cpu", *arguments]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, env=environment, check=False)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert lines, ended.stderr
    return lines


# The short tier takes some, as a kernel takes a second to compile and most checks have kernels of their own.
def test_some_ops_are_what_the_reference_gives_in_every_type_and_to_the_bit_in_any_batch():
    found = outcomes("--shard", "7", "80", timeout=600)
    assert {one["type"] for one in found} == {"bfloat16", "float16", "float32"}
    assert [one for one in found if not one["ok"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("type", ["bfloat16", "float16", "float32"])
def test_every_op_is_what_the_reference_gives_and_to_the_bit_in_any_batch(type, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "scripts.lib.kernel_parity", "--type", type, "--json", str(tmp_path / "table.json")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stdout
    rows = json.loads((tmp_path / "table.json").read_text())["table"]
    assert sum(row["checks"] for row in rows) > 140
    assert all(row["wrong"] == 0 and not row["other_bits"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_op_is_what_the_reference_gives_in_the_interpreter(shard):
    found = outcomes("--shard", str(shard), str(SHARDS), timeout=600, interpreted=True)
    assert len(found) > 10
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


def test_some_kernels_keep_their_budget_on_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from scripts.lib.kernel_report import check

    wrong, figures = check(["Llama-3-8B"], ["sm_90"], every=7)
    assert len(figures["sm_90"]) > 8
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("sm_80", "sm_89"), ("sm_90", "sm_100"), ("sm_120", "gfx942")], ids=" ".join)
def test_no_kernel_exceeds_its_budget_on_gpus_that_are_not_here(pair):
    command = [sys.executable, "-W", "ignore", "-m", "scripts.lib.kernel_report", "--check", "--model"]
    running = []
    for target in pair:
        # Of experts, whose kernels are the same otherwise, Hopper's and Blackwell's have a budget.
        models = [*MODELS, "Qwen3-30B-A3B"] if target in ("sm_90", "sm_100") else MODELS
        arguments = [*command, *models, "--target", target]
        running.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT))
    for target, process in zip(pair, running, strict=True):
        said, _ = process.communicate()
        assert process.returncode == 0, said[-4000:]
        assert said.count(target) > 270


CORES = {"sm_80": "[HI]MMA", "sm_89": "[HIQ]MMA", "sm_90": "[HIQ]GMMA", "sm_100": r"UTC\w*MMA", "sm_120": "[HIQ]MMA", "gfx942": "v_mfma_"}
"""What products are computed with. For sm_100, tl.dot of Triton 3.7.1 multiplies int8 as Ampere does, and can do nothing else: what
there is for the tensor cores there, asked for by Gluon's tcgen05_mma, is refused ("'ttng.tc_gen5_mma' op unsupported accumulator
dtype for operand types 'i8' and 'i8', accumulator dtype is 'i32' but must be one of ['f16', 'f32']")."""

NARROW = {"sm_90": "grouped_kernel"} | dict.fromkeys(("sm_80", "sm_89", "sm_120"), "attention (int8|fp8)")
"""Where codes come 8 bytes at a time: operands that are converted on their way from shared memory to a tensor core, the first on Hopper,
the second on cards of before and of desktops. Triton 3.7.1 lays them out there in vectors of 8 values and copies no wider."""


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
    narrow = [name for name, one in products.items() if one["wide_loads"] < 0.95 and not re.search(NARROW.get(target, "^$"), name)]
    assert (spilling, oversized, others, narrow) == ([], [], [], [])
    assert len(products) > 60


def test_a_kernel_that_spills_or_loses_its_tensor_cores_is_over_budget(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from collections import Counter

    from headrace.kernels.aot import Compiled
    from headrace.kernels.aot_loads import Load
    from scripts.lib.kernel_report import broken

    budget = {"registers": 64, "spills": 0, "shared": 1024, "wide_loads": 0.99, "tensor_core": ["HGMMA"]}
    good = Compiled("k", "sm_90", None, 64, 0, 1024, 4, Counter({"HGMMA.64x16x16": 4}), {"W": Load(9900, 1.0), "scales": Load(100, 0.0)})
    assert list(broken("k", "sm_90", good, budget)) == []
    bad = Compiled("k", "sm_90", None, 128, 32, 1 << 20, 4, Counter({"FFMA": 4}), {"W": Load(9900, 0.0)})
    said = " ".join(broken("k", "sm_90", bad, budget))
    assert all(words in said for words in ("128 registers", "spills 32", "shared memory", "loads 0%", "no longer uses HGMMA"))


NVIDIA_LOADS = """
define ptx_kernel void @kernel(ptr addrspace(1) %0, ptr addrspace(1) readonly captures(none) %1, i32 %2, ptr addrspace(1) %3) #0 !dbg !4 {
  %5 = getelementptr i8, ptr addrspace(1) %0, i64 %9
  %6 = phi ptr addrspace(1) [ %5, %4 ], [ %7, %8 ]
  %7 = getelementptr i8, ptr addrspace(1) %6, i64 64
  tail call void asm sideeffect "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10;", "r,l"(ptr addrspace(3) %79, ptr addrspace(1) %7)
  %10 = tail call { i32, i32 } asm sideeffect "ld.global.v2.b32 { $0, $1 }, [ $2 + 0 ];", "=r,=r,l"(ptr addrspace(1) nonnull %1)
  %11 = tail call i16 asm sideeffect "mov.u16 $0, 0x0;\\0A\\09@$2 ld.global.b16 { $0 }, [ $1 + 0 ];", "=c,l,b"(ptr addrspace(1) %1, i1 true)
"""
AMD_LOADS = """
define amdgpu_kernel void @kernel(ptr addrspace(1) inreg readonly captures(none) %0, ptr addrspace(1) inreg %1, i32 inreg %2) #0 !dbg !4 {
  %4 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) readonly %0, i16 0, i64 2147483646, i32 159744)
  %5 = tail call <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8) %4, i32 %68, i32 0, i32 0)
  %6 = getelementptr half, ptr addrspace(1) %1, i64 3
  %7 = load <4 x half>, ptr addrspace(1) %6, align 8
"""


@pytest.mark.parametrize(("text", "expected"), [(NVIDIA_LOADS, {0: {16: 1}, 1: {8: 1, 2: 1}}), (AMD_LOADS, {0: {16: 1}, 1: {8: 1}})])
def test_what_a_kernel_loads_is_told_by_the_tensor_it_comes_from(text, expected):
    from headrace.kernels.aot_loads import widths

    assert widths(text) == expected


def test_decode_steps_move_little_beside_weights_and_keys_and_values(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from scripts.lib.kernel_report import decode_steps

    steps = decode_steps()
    assert {one.form for one in steps} == {"bf16", "e4m3", "int4"}
    assert all(0.85 < one.must / one.moved <= 1 for one in steps)
    # Llama-3-8B without its embedding, and keys and values of 2,048 tokens in 32 layers of 8 heads of 128.
    must = 2 * 7.504e9 + 2048 * 32 * 2 * 8 * 128 * 2
    assert abs(steps[0].must / must - 1) < 0.01


def test_a_roofline_tells_of_each_kernel_what_holds_it_back(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from scripts.lib.step_model import Card, Step, Work, roofline_of

    work = [Work("many", 32, 2e9, 200e9), Work("few", 32, 1e9, 1e9)]
    step = Step("bf16", 1, 2048, 3e9, 3e9, 201e9, 1.0, 1.0, work)
    many, few = roofline_of(step, Card("a card", 1e12, {"bf16": 50e12}))
    assert "100.0 FLOP/byte, at most   50.0 TFLOP/s ( 4000.0 µs), bound by products" in many
    assert "1.0 FLOP/byte, at most    1.0 TFLOP/s ( 1000.0 µs), bound by memory" in few


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
