"""`--kernels` gives what it names, or says why not."""

import logging
import os
import subprocess
import sys

import pytest

from headrace.kernels import select
from headrace.kernels.select import KernelsUnavailable, make_backend


def test_reference_is_always_there():
    assert make_backend("reference").name == "reference"


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setitem(sys.modules, "headrace.kernels.cpu", None)


def test_auto_falls_back_to_the_reference_with_one_warning(no_native, caplog):
    with caplog.at_level(logging.WARNING):
        assert make_backend("auto").name == "reference"
    assert [record.message for record in caplog.records if "slower reference kernels" in record.message] != []
    assert len(caplog.records) == 1


def test_cpu_kernels_that_cannot_be_loaded_are_an_error_with_a_way_out(no_native):
    with pytest.raises(KernelsUnavailable, match="choose --kernels reference"):
        make_backend("cpu")


def test_kernels_that_do_not_exist_are_refused_by_name():
    with pytest.raises(KernelsUnavailable, match='kernels "fast" are not known: choose one of auto'):
        make_backend("fast")


def test_triton_without_its_package_is_refused_and_passed_over(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(select, "GPU_NODES", (tmp_path,))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelsUnavailable, match="the Triton kernels need the package triton"):
        make_backend("triton")
    with caplog.at_level(logging.WARNING):
        assert make_backend("auto").name in ("cpu", "reference")
    assert "serving from the CPU" in caplog.text


def test_a_gpu_that_torch_cannot_use_is_passed_over_and_told(monkeypatch, tmp_path, caplog):
    pytest.importorskip("triton")
    monkeypatch.setattr(select, "GPU_NODES", (tmp_path,))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert make_backend("auto").name in ("cpu", "reference")
    assert "there is a GPU, and torch cannot use it: serving from the CPU" in caplog.text
    assert make_backend("triton").device.type == "cpu"


def test_cpu_kernels_on_another_device_are_refused():
    with pytest.raises(KernelsUnavailable, match="cannot run on meta"):
        make_backend("cpu", "meta")


def test_an_instruction_set_the_machine_lacks_is_refused(monkeypatch):
    pytest.importorskip("headrace.kernels.cpu")
    monkeypatch.setenv("HEADRACE_CPU_ISA", "mmx")
    with pytest.raises(KernelsUnavailable, match=r"the native CPU kernels cannot run: .*mmx"):
        make_backend("cpu")


@pytest.mark.parametrize("kind", ["reference", "cpu", "triton"])
def test_loading_kernels_touches_no_gpu_and_starts_no_thread(kind):
    """A process forks after this, and neither a GPU's context nor a thread survives that."""
    if kind == "triton":
        pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
    code = f"""
import os, sys
from headrace.kernels import select
if {kind!r} != "cpu":
    import torch
    def touched(*_):
        raise AssertionError("the GPU was looked for")
    torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch._C._cuda_getDeviceCount = touched
select.load({kind!r})
assert "headrace.kernels.{kind}" in sys.modules
assert len(os.listdir("/proc/self/task")) == 1
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
