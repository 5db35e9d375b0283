"""The command line as a user runs it: what can be mended is one line on stderr and a quick end, and nothing is left running."""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from headrace.engine.checkpoint.resolve import find_default
from tests.serving import ROOT, Command, Watch

KEY = "sesame-7"


def refused(*arguments: str, status: int = 1, seconds: float = 10, **environment: str) -> str:
    """The one line that `headrace serve` says before it ends with `status`, soon."""
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "headrace.engine.cli", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
        env=os.environ | environment,
    )
    took = time.monotonic() - began
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    (line,) = without_warnings(ended.stderr.splitlines())
    assert line.startswith("headrace")
    assert len(line) < 500
    assert took < seconds, f"{took:.1f} s for {line}"
    return line


def without_warnings(lines: list[str]) -> list[str]:
    """What is left without a worker's remarks on its kernels, which are about the machine and not about the command."""
    return [line for line in lines if " WARNING worker-" not in line]


# What is wrong before any process starts


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/no/such/model.gguf"], "no model at '/no/such/model.gguf'"),
        (["./nowhere"], "no model at './nowhere'"),
        (["--port", "0x50"], "--port 0x50: expected an integer from 0 to 65535"),
        (["--port", "65536"], "--port 65536: expected an integer from 0 to 65535"),
        (["--threads", "0"], "--threads 0: expected an integer of at least 1"),
        (["--kv-memory", "lots"], "--kv-memory lots"),
        (["--page-size", "12"], "--page-size 12: expected a power of two from 8 to 256"),
        (["--max-context", "9000"], "max_context=9000 exceeds the model's limit of 8192"),
        (["--kernels", "fast"], "--kernels fast: expected one of auto, "),
        (["--activations", "int4"], "--activations int4"),
        (["--tensor-parallel", "2"], "tensor_parallel=2 is not built yet"),
        (["--drain-timeout", "nan"], "--drain-timeout nan: expected a number of at least 0"),
        (["--log-level", "loud"], "--log-level loud: expected one of debug, "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_that_cannot_be_is_named_with_what_can(arguments, says):
    assert says in refused(*arguments)


def test_a_flag_that_does_not_exist_is_a_wrong_command_line():
    assert "--hots is no option: did you mean --host?" in refused("--hots", "x", status=2)


def test_a_hub_name_without_network_says_what_is_missing(tmp_path):
    line = refused("nobody/no-such-model", HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="")
    assert "nobody/no-such-model" in line
    assert "127.0.0.1:9" in line or "network" in line or "reach" in line


def test_a_hub_name_in_offline_mode_that_is_not_cached_says_so(tmp_path):
    line = refused("nobody/no-such-model", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "nobody/no-such-model" in line
    assert "offline" in line.lower()


# Files that are no model


def test_an_empty_file_is_no_model(tmp_path):
    path = tmp_path / "empty.gguf"
    path.touch()
    assert str(path) in refused(str(path))


def test_a_file_of_something_else_is_no_model(tmp_path):
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 100)
    assert str(path) in refused(str(path))


def test_a_file_that_was_cut_short_is_named(tmp_path):
    path = tmp_path / "cut.gguf"
    with find_default().open("rb") as whole:
        path.write_bytes(whole.read(20_000_000))
    assert str(path) in refused(str(path))


def altered(tmp_path: Path, old: bytes, new: bytes, after: bytes = b"") -> Path:
    """A copy of the default model with one place of it overwritten."""
    assert len(old) == len(new)
    model = bytearray(find_default().read_bytes())
    at = model.index(old, model.index(after))
    model[at : at + len(old)] = new
    path = tmp_path / "altered.gguf"
    path.write_bytes(model)
    return path


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path):
    line = refused(str(altered(tmp_path, b"llama", b"mamba", b"general.architecture")))
    assert "'mamba', which is not supported" in line
    assert "llama, qwen2, qwen3, gemma3" in line or all(name in line for name in ("llama", "qwen2", "qwen3", "gemma3"))


def test_a_file_that_lacks_a_tensor_is_told_by_the_tensors_name(tmp_path):
    assert "blk.3.attn_q.weight" in refused(str(altered(tmp_path, b"blk.3.attn_q.weight", b"blk.3.attn_X.weight")), "--port", "0")


@pytest.mark.slow
def test_a_tensor_of_another_shape_is_named(tmp_path):
    name = b"blk.3.attn_q.weight"
    shape = struct.pack("<IQQ", 2, 576, 576)
    path = altered(tmp_path, name + shape, name + struct.pack("<IQQ", 2, 576, 288))
    assert "blk.3.attn_q.weight" in refused(str(path), "--port", "0")


def test_a_tokenizer_of_a_kind_unknown_is_named(tmp_path):
    path = altered(tmp_path, b"gpt2", b"gpt9", b"tokenizer.ggml.model")
    assert "gpt9" in refused(str(path), "--port", "0")


# What goes wrong while the processes start


def test_a_port_in_use_is_named_with_the_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused("--port", port)
    assert f"port {port} on 127.0.0.1 is in use: choose another with --port" in line


def test_an_address_of_another_machine_cannot_be_listened_on():
    assert "192.0.2.1" in refused("--host", "192.0.2.1", "--port", "0")


@pytest.mark.slow
def test_kv_memory_for_not_even_a_page_is_refused():
    assert "--kv-memory 1KiB holds no page" in refused("--kv-memory", "1KiB", "--port", "0")


def test_a_run_directory_that_cannot_be_is_named_with_the_way_out(tmp_path):
    line = refused(XDG_RUNTIME_DIR=str(tmp_path / "nowhere"))
    assert f"XDG_RUNTIME_DIR {tmp_path}/nowhere: no folder for sockets can be made there" in line
    (deep := tmp_path / ("d" * 100)).mkdir()
    line = refused(XDG_RUNTIME_DIR=str(deep))
    assert line.endswith("is too long for sockets, whose paths have 107 bytes at most; name a shorter one")
    assert list(deep.iterdir()) == []


def test_ctrl_c_while_starting_ends_all_quietly():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = subprocess.Popen(
        [sys.executable, "-m", "headrace.engine.cli", "serve", "--port", str(port)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    children = until_children(command.pid)
    watch = Watch(children)
    command.send_signal(signal.SIGINT)
    said = command.communicate(timeout=3)[1]
    watch.all_gone(0.5)
    assert (command.returncode, said) == (0, "")


def until_children(pid: int) -> dict[str, int]:
    """Look until the process has its fork server and its four children."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if len(found) == 5:
            return {child: int(child) for child in found}
    raise AssertionError("no five children came")


# A running engine


@pytest.fixture(scope="module")
def keyed() -> Iterator[Command]:
    with Command("serve", "--port", "0", "--threads", "2", "--api-key", KEY, "--served-model-name", "small") as command:
        yield command


def test_it_says_where_it_is_ready_and_under_what_name(keyed):
    assert keyed.model == "small"
    assert keyed.url.startswith("http://127.0.0.1:")
    assert len(without_warnings(keyed.lines)) == 1


def test_the_right_key_opens_and_a_wrong_one_does_not(keyed):
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["small"]
        assert client.completions.create(model="small", prompt="Hello", max_tokens=2).usage.completion_tokens == 2
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong") as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("header", [{}, {"Authorization": KEY}, {"Authorization": "Basic " + KEY}, {"Authorization": "Bearer "}])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_without_a_key_nothing_of_the_api_is_open(keyed, header, path):
    status, answer = keyed.ask(path, None if path == "/v1/models" else {}, header)
    assert status == 401
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["code"] == "missing_api_key"
    assert "Authorization: Bearer KEY" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/V1/models", "/%76%31/models", "/v1/../v1/models", "/tokenize/"])
def test_no_spelling_of_a_path_goes_round_the_key(keyed, path):
    status, answer = keyed.ask(path)
    assert status in (401, 404)
    assert "small" not in str(answer)


def test_health_and_metrics_need_no_key(keyed):
    assert keyed.ask("/health/live")[0] == keyed.ask("/health/ready")[0] == keyed.ask("/health")[0] == 200
    assert "headrace_kv_pages" in keyed.ask("/metrics")[1]


def test_the_key_is_in_no_childs_command_line_and_no_log(keyed):
    for pid in keyed.pids().values():
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert not any(KEY in line for line in keyed.lines)


def test_the_run_directory_is_the_users_alone(keyed):
    assert keyed.run_dir().stat().st_mode & 0o777 == 0o700
