"""`headrace bench kernels` on the default model: every op is there, with times and shares that can be."""

import msgspec
import pytest

from headrace.engine.cli import main
from headrace.workers import kernel_bench
from headrace.workers.kernel_bench import Report

pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")


def test_every_op_is_timed_beside_the_peaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernel_bench, "RUNS", 2)
    assert main(["bench", "kernels", "--context", "256", "--threads", "1", "--json", str(tmp_path / "report.json")]) == 0
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=Report)
    assert {one.op for one in report.timings} == {
        "embed",
        "rmsnorm",
        "linear",
        "rope_write_kv",
        "attention",
        "add_rmsnorm",
        "linear_gated",
        "quantize",
        "rows",
    }
    assert all(one.us > 0 and one.bytes > 0 for one in report.timings)
    products = [one for one in report.timings if one.op in ("linear", "linear_gated", "attention")]
    assert all(one.operations > 0 for one in products)
    assert any(one.numbers != "f32" for one in products)
    layers = {one.calls for one in products if one.op == "attention"}
    assert layers == {30}
    said = capsys.readouterr().out
    assert "linear 960×576 int4 × int8" in said
    assert "of peak" in said


def test_a_context_that_cannot_be_is_refused(capsys):
    assert main(["bench", "kernels", "--context", "100000"]) == 1
    assert "--context 100000" in capsys.readouterr().err
