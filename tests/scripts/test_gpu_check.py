"""What `scripts/gpu-check` does on a machine with a GPU, without one: checks among processes, time that runs out, and each section at small
sizes on the CPU's backend."""

import json
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")
if os.path.exists("/dev/nvidiactl"):  # noqa: PTH110
    pytest.skip("there is a GPU: scripts/gpu-check itself runs there", allow_module_level=True)

from scripts.lib import gpu_check, gpu_drafts, gpu_times, kernel_parity
from scripts.lib.gpu_times import Mixture, Peaks
from tests.kernels import triton_parity


def once(work: Callable[[], object]) -> float:
    work()
    return 1.0


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A stand-in for the device: work is called once, on the CPU. Called with arguments, runs the command and gives its JSON."""
    monkeypatch.setattr(gpu_times, "device_name", lambda: "a card")
    monkeypatch.setattr(gpu_times, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_times, "peaks", lambda: Peaks(1e9, 1e12))
    monkeypatch.setattr(gpu_times, "milliseconds", once)
    monkeypatch.setattr(gpu_times, "seconds", lambda work, times, first: once(work))

    def run(*arguments: str) -> dict:
        written = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu-check", "--json", str(written), *arguments])
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        found = json.loads(written.read_text())
        assert ended.value.code == bool(found["failed"])
        return found

    return run


def sections(monkeypatch, **works) -> None:
    """These instead of all, of one item each."""
    monkeypatch.setattr(gpu_check, "SECTIONS", {name: lambda run, work=work: iter([("it", work)]) for name, work in works.items()})


def fails() -> None:
    raise RuntimeError("no such tile")


def waits() -> None:
    while True:
        time.sleep(60)


def test_what_fails_is_told_and_the_next_runs(card, monkeypatch, capsys):
    sections(monkeypatch, first=fails, second=lambda: None)
    found = card()
    assert (found["done"], found["failed"], found["left"]) == (["second: it"], ["first: it"], [])
    assert "no such tile" in capsys.readouterr().out


def test_time_that_is_over_ends_what_runs_and_tells_what_was_not_done(card, monkeypatch, capsys):
    sections(monkeypatch, first=lambda: None, second=waits, third=lambda: None)
    found = card("--seconds", "0.5")
    assert (found["done"], found["failed"], found["left"]) == (["first: it"], [], ["second: it", "third: it"])
    assert "not done, or not to the end: second: it, third: it" in capsys.readouterr().out


def test_time_that_is_over_is_no_failure_however_what_runs_takes_it(card, monkeypatch):
    def takes_it_otherwise() -> None:
        try:
            waits()
        finally:
            fails()

    sections(monkeypatch, first=takes_it_otherwise)
    found = card("--seconds", "0.2")
    assert (found["done"], found["failed"], found["left"]) == ([], [], ["first: it"])


def test_what_an_earlier_run_does_not_have_comes_first(card, monkeypatch, tmp_path):
    sections(monkeypatch, first=lambda: None, second=lambda: None, third=lambda: None)
    (tmp_path / "earlier.json").write_text(json.dumps({"done": ["first: it"]}))
    assert card("--after", str(tmp_path / "earlier.json"))["done"] == ["second: it", "third: it", "first: it"]
    assert card("third")["done"] == ["third: it"]


def test_new_checks_come_first_and_then_those_that_took_longest():
    earlier = [{"check": "linear a", "type": "float32", "seconds": 2.0}, {"check": "embed", "type": "float32", "seconds": 9.0}]
    assert kernel_parity.ordered(["linear a float32", "embed float32", "linear b float32", "embed float16"], earlier) == [2, 3, 1, 0]


def test_a_process_that_dies_costs_the_check_that_it_was_at_and_no_other():
    dies_of_3 = (
        "import sys, json\n"
        "for line in sys.stdin:\n"
        "    if line == '3\\n': sys.exit(7)\n"
        "    print(json.dumps({'ok': True} | ({'ok': False, 'why': ''} if line == '5\\n' else {})), flush=True)\n"
        "    if line == '5\\n': break"
    )
    workers = kernel_parity.Workers([sys.executable, "-c", dies_of_3], range(9), 2)
    found = sorted((workers.found.get(timeout=60) for _ in range(9)), key=lambda line: line["number"])
    workers.stop()
    assert [line["number"] for line in found if not line["ok"]] == [3, 5]
    assert "ended with 7" in found[3]["why"]


def test_processes_end_when_nobody_listens_any_more():
    workers = kernel_parity.Workers([sys.executable, "-c", "import sys, time\nprint(sys.stdin.readline())\ntime.sleep(600)"], range(4), 2)
    workers.stop()
    assert all(process.returncode is not None for process in workers._running)


def test_checks_are_made_by_processes_and_all_in_one_table(card, capsys):
    found = card("parity", "--only", "gated silu")
    assert {line["type"] for line in found["parity"]} == {"bfloat16", "float16", "float32"}
    assert all(line["ok"] and line["seconds"] > 0 for line in found["parity"])
    assert "3 of 3 checks are right, 0 were not made" in capsys.readouterr().out


def test_a_check_that_fails_is_told_as_such(card, monkeypatch):
    lines = [{"number": 1, "check": "embed", "type": "float32", "error": 0.5, "bound": 1e-3, "ok": False, "seconds": 0.1}]
    monkeypatch.setattr(gpu_check, "outcomes", lambda device, numbers: iter(lines))
    checks = [triton_parity.Check(name, torch.float32, lambda: 0.0, 1.0) for name in ("linear", "embed")]
    monkeypatch.setattr(gpu_check.triton_parity, "every", lambda device: checks)
    assert card("parity")["failed"] == ["parity: embed float32"]


SMALL = {"LAYERS": {"gate up": (256, 128)}, "HEADS": gpu_times.HeadShape(4, 2, 32), "MIXTURES": (Mixture("small", 128, 128, 4, 2),)}
SMALL |= {"ATTENTIONS": [("int8", 2, 1, 32), ("bf16", 1, 8, 32)], "FORMS": {"bf16": 16, "int8 x int8": 8}}


@pytest.mark.parametrize(("section", "rows"), [("products", 10), ("experts", 8), ("attention", 2), ("sampling", 12), ("drafts", 20)])
def test_sections_fill_their_rows(section, rows, monkeypatch, card):
    for name, value in SMALL.items():
        monkeypatch.setattr(gpu_times, name, value)
    monkeypatch.setattr(gpu_times, "LLAMA_8B", SimpleNamespace(vocab_size=1000))
    monkeypatch.setattr(gpu_drafts, "LAYERS", 2)
    found = card(section)
    assert (len(found[section]), found["failed"], found["left"]) == (rows, [], [])


@pytest.mark.parametrize("form", ["bf16", "e4m3", "e4m3 blocks", "int8 x int8", "int8", "int4"])
def test_weights_that_are_timed_are_those_of_the_form(form, monkeypatch):
    monkeypatch.setattr(gpu_times, "DEVICE", torch.device("cpu"))
    weight = gpu_times.random_weight(256, 128, form)
    assert (weight.outputs, weight.inputs) == (256, 128)
    assert weight.values.nbytes * 8 == 256 * 128 * gpu_times.FORMS[form]


def test_a_model_is_compared_with_vllm_where_that_is_installed(card, monkeypatch, tmp_path):
    vllm = tmp_path / "vllm"
    vllm.write_text("#!/bin/sh\n")
    vllm.chmod(0o755)
    run = []

    def stand_in(command: list[str], check: bool) -> None:
        run.append(command)
        with open(command[command.index("--json") + 1], "w") as written:  # noqa: PTH123
            json.dump({"lines": ["ours", "theirs"]}, written)

    monkeypatch.setattr(gpu_check, "serve", lambda results, model: None)
    monkeypatch.setattr(gpu_check.subprocess, "run", stand_in)
    monkeypatch.setenv("PATH", "/nowhere")
    assert card("serving", "--serve", "/models/some")["done"] == ["serving: some"]
    monkeypatch.setenv("PATH", str(tmp_path))
    found = card("serving", "--serve", "/models/some")
    assert found["done"] == ["serving: some", "serving: some beside vLLM"]
    assert found["beside vLLM"] == {"lines": ["ours", "theirs"]}
    ((python, script, model, *rest),) = run
    assert (python, script, model) == (sys.executable, str(gpu_check.COMPARE), "/models/some")
    assert f"vllm-gpu={vllm}" in rest and rest[-3:] == ["--", "--kernels", "triton"]
