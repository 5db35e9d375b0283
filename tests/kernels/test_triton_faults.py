"""Faults planted in copies of the kernels: those of access are told with kernel and line by a checked launch
(HEADRACE_TRITON_CHECK=1), those of numbers show beside the reference, as `triton_parity.py` compares every kernel with it."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
if os.path.exists("/dev/nvidiactl"):  # noqa: PTH110
    pytest.skip("there is a GPU: kernels run on it", allow_module_level=True)

from headrace.kernels import triton as kernels
from tests.kernels.triton_parity import Check, Checks


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    file: str
    """In kernels/triton: its copy gets the fault."""
    right: str
    wrong: str
    check: str
    """Of `triton_parity`, in bfloat16: the first whose name begins so."""
    told: str | None = None
    """What a checked launch says of it, if it is one of access."""


ATTENTION = "attention HeadShape(query_heads=4, kv_heads=4, dim=64) bf16 window None"
ROPE = "rope_write_kv HeadShape(query_heads=4, kv_heads=4, dim=64) bf16"
CUT = "(y.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True).to(Y.dtype.element_ty)"
FAULTS = [
    Fault(
        "a page that is looked up one too far",
        "attention",
        "tl.load(pages + stored // PAGE).to",
        "tl.load(pages + stored // PAGE + 1).to",
        ATTENTION,
    ),
    Fault(
        "a page that is read one too far",
        "attention",
        "slot = (page * KV_HEADS + kv_head) * PAGE",
        "slot = ((page + 1) * KV_HEADS + kv_head) * PAGE",
        ATTENTION,
        r"attention_kernel: program .* accesses .* of keys.*attention\.py:\d+",
    ),
    Fault(
        "a page that is written one too far",
        "rope",
        "(slot // PAGE).to(tl.int64), slot % PAGE",
        "(slot // PAGE + 1).to(tl.int64), slot % PAGE",
        ROPE,
        r"rope_write_kv_kernel: program .* accesses .* of (keys|values).*rope\.py:\d+",
    ),
    Fault(
        "a mask that lets through what is behind a row",
        "norm",
        "inside = columns < width",
        "inside = columns < BLOCK",
        "rmsnorm",
        r"rmsnorm_kernel: program .* accesses .* of (X|Y|weight).*norm\.py:\d+",
    ),
    Fault(
        "a mask that lets through later positions", "attention", "(position[None, :] <= last[:, None])", "(last[:, None] >= 0)", ATTENTION
    ),
    Fault(
        "heads that write to one place",
        "rope",
        "place = (page * KV_HEADS + kv_head) * PAGE + offset",
        "place = page * KV_HEADS * PAGE + offset",
        ROPE,
        r"rope_write_kv_kernel: programs race: .* writes byte \d+ of (keys|values), at .*rope\.py:\d+",
    ),
    Fault(
        "splits that write to one place",
        "linear",
        "tokens, end, first, y_rows",
        "tokens, end, first * 0, y_rows",
        "linear bfloat16 17x72x2080",
        r"linear_kernel: programs race: .* writes byte \d+ of Y, at .*products\.py:\d+",
    ),
    Fault("a norm that is cut to bfloat16", "norm", "y.to(Y.dtype.element_ty)", CUT, "rmsnorm"),
    Fault("a gate that is cut to bfloat16", "gated", "y.to(Y.dtype.element_ty)", CUT, "gated silu"),
]
OPS = {"attention": "attention", "rope": "rope_write_kv", "norm": "rmsnorm", "linear": "linear", "gated": "gated"}
"""What each file has that a backend calls."""
FAST = (
    "a page that is read one too far",
    "a mask that lets through what is behind a row",
    "heads that write to one place",
    "a norm that is cut",
)


def plant(fault: Fault, right: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """The check that is to find the fault, on kernels of which one file is a copy that has it; a faithful copy if it is to be `right`."""
    path, name = Path(kernels.__file__).with_name(f"{fault.file}.py"), f"planted_{fault.file}"
    source = path.read_text()
    assert source.count(fault.right) == 1
    (folder / path.name).write_text(source if right else source.replace(fault.right, fault.wrong))
    spec = importlib.util.spec_from_file_location(name, folder / path.name)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copy)
    spec.loader.exec_module(copy)
    where = kernels.attention_op if fault.file == "attention" else kernels
    monkeypatch.setattr(where, OPS[fault.file], getattr(copy, OPS[fault.file]))
    checks = Checks("cpu", torch.bfloat16).all()
    return next(Check(title, torch.bfloat16, error, bound) for title, error, bound in checks if title.startswith(fault.check))


def marked(fault: Fault) -> object:
    return pytest.param(fault, id=fault.name, marks=() if fault.name.startswith(FAST) else pytest.mark.slow)


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    monkeypatch.setenv("HEADRACE_TRITON_CHECK", "1")


@pytest.mark.parametrize("fault", [marked(fault) for fault in FAULTS])
def test_a_fault_is_found(fault, tmp_path, monkeypatch):
    check = plant(fault, False, tmp_path, monkeypatch)
    if fault.told is None:
        outcome = check.outcome()
        assert not outcome["ok"]
        assert "why" not in outcome
    else:
        with pytest.raises((IndexError, MemoryError), match=fault.told):
            check.error()


@pytest.mark.slow
@pytest.mark.parametrize("file", OPS)
def test_a_faithful_copy_is_right_and_nothing_is_told_of_it(file, tmp_path, monkeypatch):
    fault = next(fault for fault in FAULTS if fault.file == file)
    assert plant(fault, True, tmp_path, monkeypatch).outcome()["ok"]
