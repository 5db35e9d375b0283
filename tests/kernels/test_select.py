"""`--kernels` gives what it names, or says why not."""

import logging
import sys

import pytest

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


@pytest.mark.parametrize(("kind", "message"), [("triton", "not built yet"), ("fast", 'kernels "fast" are not known: choose one of auto')])
def test_kernels_that_do_not_exist_are_refused_by_name(kind, message):
    with pytest.raises(KernelsUnavailable, match=message):
        make_backend(kind)


def test_cpu_kernels_on_another_device_are_refused():
    with pytest.raises(KernelsUnavailable, match="cannot run on meta"):
        make_backend("cpu", "meta")


def test_an_instruction_set_the_machine_lacks_is_refused(monkeypatch):
    pytest.importorskip("headrace.kernels.cpu")
    monkeypatch.setenv("HEADRACE_CPU_ISA", "mmx")
    with pytest.raises(KernelsUnavailable, match=r"the native CPU kernels cannot run: .*mmx"):
        make_backend("cpu")
