"""The extension knows what it was built from, so that an old one cannot pass for a new one."""

import pytest

from tests.kernels.eager import NativeOps

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")


def test_the_extension_was_built_from_the_sources_beside_it(caplog):
    assert not cpu.is_stale(), f"{cpu._native.__file__} is older than kernels/cpu/src: scripts/test builds it anew"
    NativeOps(1)
    assert caplog.text == ""


def test_an_extension_built_from_other_sources_is_told_of(monkeypatch, caplog):
    monkeypatch.setattr(cpu._native, "SOURCES", "0" * 64)
    NativeOps(1)
    assert "built from older sources" in caplog.text and cpu._native.__file__ in caplog.text


def test_a_package_without_sources_is_not_stale(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
    assert not cpu.is_stale()
