"""The command line: what it prints, how it fails, how soon it answers."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from headrace.engine import cli


def headrace(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "headrace.engine.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | environ)


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    """Exit status and the one line on stderr."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err


def test_version_is_one_line():
    done = headrace("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"headrace \d+\.\d+\.\d+\n", done.stdout)


def test_version_and_help_load_none_of_the_engine():
    program = (
        "import sys; from headrace.engine.cli import main; main(['--version']); main([]);"
        "print(*(name for name in sys.modules if name.split('.')[0] in ('msgspec', 'zmq', 'torch', 'numpy', 'headrace')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stderr.split()) == {"headrace", "headrace.engine", "headrace.engine.cli", "headrace.engine.errors"}


def test_version_costs_little_beyond_the_interpreter():
    def cost(*command: str) -> float:
        begun = time.monotonic()
        subprocess.run(command, capture_output=True, timeout=60, check=True)
        return time.monotonic() - begun

    bare = min(cost(sys.executable, "-c", "pass") for _ in range(3))
    ours = min(cost(sys.executable, "-m", "headrace.engine.cli", "--version") for _ in range(3))
    # About 0.06 s on a quiet machine; test machines are shared.
    assert ours - bare < 0.5


def test_without_a_command_the_help_shows_them_all(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"headrace {name}" in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("command", ["serve", "chat", "bench", "doctor"])
def test_every_command_has_its_own_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: headrace {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serv"], "'serv' is no command: did you mean serve?"),
        (["xyz"], "choose one of serve, chat, bench, keys, doctor"),
        (["--port", "1"], "--port is no option"),
        (["serve", "--prot", "1"], "--prot is no option: did you mean --port?"),
        (["serve", "--port"], "--port: expected one argument"),
        (["serve", "a", "b"], "b is no option"),
        (["serve", "--max", "1"], "--max is no option"),
        (["doctor", "now"], "now is no option"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, arguments, says):
    status, line = failure(capsys, *arguments)
    assert status == 2
    assert says in line and "--help" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--port", "abc"], "headrace: --port abc: expected an integer from 0 to 65535\n"),
        (["serve", "/no/such/model.gguf"], "headrace: no model at '/no/such/model.gguf'"),
        (["serve", "--revision", "main"], "headrace: revision='main' is for hub models"),
        (["serve", "--config", "/no/such.toml"], "headrace: cannot read the configuration file /no/such.toml"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_1(capsys, arguments, says):
    status, line = failure(capsys, *arguments)
    assert status == 1
    assert line.startswith(says)


def test_at_log_level_debug_an_error_comes_with_its_trace(capsys):
    assert cli.main(["serve", "/no/such/model.gguf", "--log-level", "debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("headrace: no model at")


def test_serve_gives_the_engine_its_settings_and_its_model(monkeypatch):
    from headrace.engine import supervisor

    given = []
    monkeypatch.setattr(supervisor, "run", lambda config, model, forks: given.append((config, model)) or 7)
    monkeypatch.setenv("HEADRACE_MAX_RUNNING", "5")
    assert cli.main(["serve", "--port", "0", "--no-prefix-cache", "--max-context", "100"]) == 7
    ((config, model),) = given
    assert (config.port, config.prefix_cache, config.max_running, model.context) == (0, False, 5, 100)
    assert model.name == "SmolLM2-135M-Instruct"


def test_ctrl_c_before_the_engine_runs_is_status_130(monkeypatch, capsys):
    from headrace.engine.checkpoint import resolve

    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resolve, "resolve", interrupted)
    assert cli.main(["serve"]) == 130
    assert capsys.readouterr().err == ""


def test_doctor_reports_through_the_command_line():
    done = headrace("doctor", "--json", HEADRACE_API_KEY="hush")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["probe"]["kernels"] in ("cpu", "reference")
    assert report["model"]["name"] == "SmolLM2-135M-Instruct"
    assert report["packages"]["torch"]
    assert "hush" not in done.stdout
