"""Settings: which source wins, and what each error says."""

import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.config import Config
from headrace.engine.errors import UserError
from headrace.engine.settings import SETTINGS, add_arguments, load
from headrace.engine.sizes import parse_size, show_size


@pytest.fixture
def toml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "headrace.toml"
        path.write_text(text)
        return path

    return write


def refusal(flags: dict | None = None, environ: dict | None = None, path: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(flags or {}, environ or {}, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_given_is_the_defaults():
    assert load({}, {}) == Config()


def test_a_flag_wins_over_the_environment_the_environment_over_the_file_and_the_file_over_the_default(toml):
    path = toml("port = 1\nthreads = 1\nmax_running = 1")
    config = load({"port": "3"}, {"HEADRACE_PORT": "2", "HEADRACE_THREADS": "2"}, path)
    assert (config.port, config.threads, config.max_running, config.max_waiting) == (3, 2, 1, 1024)


def test_the_environment_can_name_the_file_and_the_flag_names_another(toml, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("port = 7")
    environ = {"HEADRACE_CONFIG": str(toml("port = 5"))}
    assert load({}, environ).port == 5
    assert load({}, environ, other).port == 7


def test_every_setting_has_a_flag_a_variable_and_a_key():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = {action.dest: action for action in parser._actions}
    assert set(SETTINGS) == set(Config.__struct_fields__)
    assert set(flags) - {"help", "config"} == set(SETTINGS)
    assert all(flags[name].help for name in SETTINGS)
    assert "--kv-memory" in flags["kv_memory"].option_strings
    assert SETTINGS["kv_memory"].variable == "HEADRACE_KV_MEMORY"


@pytest.mark.parametrize("source", ["flags", "environ"])
def test_every_setting_can_be_given_as_text(source):
    values = {
        "model": "m.gguf", "revision": "main", "served_model_name": "x", "host": "::1", "port": "0", "api_key": "k", "threads": "3",
        "admin_key": "a", "listen": "tcp://*:5700", "keys": "k",
        "kernels": "reference", "activations": "f32", "max_context": "4096", "page_size": "32", "kv_memory": "2GiB",
        "kv_dtype": "f32", "prefix_cache": "no", "draft": "ngram",
        "max_running": "8", "max_step_tokens": "64", "max_waiting": "1", "tokenizers": "2", "tensor_parallel": "1", "drain_timeout": "0.5",
        "log_level": "debug", "step_target": "0.1", "max_waiting_tokens": "99", "request_timeout": "1.5", "hang_timeout": "2",
        "max_restarts": "0", "request_log": "-",
    }  # fmt: skip
    expected = Config(
        model="m.gguf", revision="main", served_model_name="x", host="::1", port=0, api_key="k", threads=3, kernels="reference",
        admin_key="a", listen="tcp://*:5700", keys="k",
        activations="f32", max_context=4096, page_size=32, kv_memory="2GiB", kv_dtype="f32",
        prefix_cache=False, draft="ngram", max_running=8, max_step_tokens=64,
        max_waiting=1, tokenizers=2, tensor_parallel=1, drain_timeout=0.5, log_level="debug",
        step_target=0.1, max_waiting_tokens=99, request_timeout=1.5, hang_timeout=2.0, max_restarts=0, request_log="-",
    )  # fmt: skip
    assert set(values) == set(SETTINGS)
    given_ = (values, {}) if source == "flags" else ({}, {SETTINGS[name].variable: value for name, value in values.items()})
    assert load(*given_) == expected


def test_a_file_gives_typed_values(toml):
    config = load({}, {}, toml('port = 80\nprefix_cache = false\ndrain_timeout = 5\nkv_memory = "512MB"\nmodel = "a/b"'))
    assert (config.port, config.prefix_cache, config.drain_timeout, config.kv_memory, config.model) == (80, False, 5.0, "512MB", "a/b")
    assert type(config.drain_timeout) is float


def test_an_empty_variable_counts_as_absent():
    assert load({}, {"HEADRACE_PORT": "", "HEADRACE_CONFIG": "", "HEADRACE_MODEL": ""}) == Config()


@pytest.mark.parametrize(
    ("flags", "environ", "says"),
    [
        ({}, {"HEADRACE_PORT": "abc"}, "HEADRACE_PORT=abc: expected an integer from 0 to 65535"),
        ({"port": "65536"}, {}, "--port 65536: expected an integer from 0 to 65535"),
        ({"port": "-1"}, {}, "--port -1: expected an integer from 0 to 65535"),
        ({"port": "80.5"}, {}, "--port 80.5: expected an integer"),
        ({"threads": "0"}, {}, "--threads 0: expected an integer of at least 1"),
        ({"max_waiting": "9" * 30}, {}, "expected at most 2.14748e+09"),
        ({"drain_timeout": "1" + "0" * 300}, {}, "expected at most 1e+09"),
        ({"page_size": "24"}, {}, "--page-size 24: expected a power of two from 8 to 256"),
        ({"page_size": "4"}, {}, "--page-size 4: expected a power of two from 8 to 256"),
        ({"page_size": "512"}, {}, "--page-size 512: expected a power of two from 8 to 256"),
        ({"tensor_parallel": "0"}, {}, "--tensor-parallel 0: expected an integer of at least 1"),
        ({"tensor_parallel": "2"}, {}, "tensor_parallel=2 is not built yet"),
        ({"kernels": "fast"}, {}, "--kernels fast: expected one of auto, cpu, reference, triton"),
        ({"log_level": "loud"}, {}, "--log-level loud: expected one of"),
        ({"kv_memory": "lots"}, {}, "--kv-memory lots: 'lots' is not a size: write it like 2GiB"),
        ({"drain_timeout": "-1"}, {}, "--drain-timeout -1: expected a number of at least 0"),
        ({"drain_timeout": "nan"}, {}, "--drain-timeout nan: expected a number of at least 0"),
        ({"drain_timeout": "inf"}, {}, "--drain-timeout inf: expected a number of at least 0"),
        ({}, {"HEADRACE_PREFIX_CACHE": "maybe"}, "HEADRACE_PREFIX_CACHE=maybe: expected true or false"),
        ({"host": " "}, {}, "--host  : expected text"),
        ({"model": ""}, {}, "MODEL : expected text"),
        ({"listen": "0.0.0.0:5700"}, {}, "--listen 0.0.0.0:5700: expected an address such as tcp://10.0.0.1:5700"),
        ({"listen": "tcp://a:65536"}, {}, "--listen tcp://a:65536: expected an address"),
        ({"listen": "ipc:///tmp/x"}, {}, "--listen ipc:///tmp/x: expected an address"),
        (
            {"listen": "tcp://a:1"},
            {},
            "listen=tcp://a:1 needs keys: make some with `headrace keys DIR NAME`",
        ),
        ({"keys": "k"}, {}, "keys=k is of no use without listen"),
        ({"listen": "tcp://a:65535", "keys": "k", "tokenizers": "2"}, {}, "leaves no ports for 2 tokenizers"),
        ({}, {"HEADRACE_PROT": "1"}, "HEADRACE_PROT is no setting: did you mean HEADRACE_PORT?"),
    ],
)
def test_an_error_names_the_source_the_value_and_what_is_allowed(flags, environ, says):
    assert says in refusal(flags, environ)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('port = "80"', "port = 80: expected an integer from 0 to 65535"),
        ("port = true", "port = true: expected an integer"),
        ("port = 80.0", "port = 80.0: expected an integer"),
        ("prefix_cache = 1", "prefix_cache = 1: expected true or false"),
        ("drain_timeout = nan", "drain_timeout = nan: expected a number"),
        ("model = 3", "model = 3: expected text"),
        ("kv_memory = 3", 'kv_memory = 3: expected a size such as "2GiB"'),
        ("kernels = [1]", "kernels = [1]: expected one of auto, cpu, reference"),
        ("prot = 1", "prot is no setting: did you mean port?"),
        ("max-context = 1", "max-context is no setting: did you mean max_context?"),
        ("[server]\nport = 1", "server is no setting"),
        ("port = ", "is not a TOML file"),
    ],
)
def test_an_error_in_a_file_names_the_file_and_the_key(toml, text, says):
    path = toml(text)
    message = refusal(path=path)
    assert message.startswith(str(path)) and says in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert f"cannot read the configuration file {tmp_path / 'no.toml'}: No such file" in refusal(path=tmp_path / "no.toml")
    assert "Is a directory" in refusal({}, {"HEADRACE_CONFIG": str(tmp_path)})


def test_a_key_is_never_shown(toml):
    path = toml('api_key = ["secret"]')
    assert "secret" not in refusal(path=path)


def test_a_variable_far_from_every_setting_belongs_to_somebody_else():
    assert load({}, {"HEADRACE_TEST_RUN": "1", "PORT": "x"}) == Config()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("2GiB", 2 << 30), ("2G", 2 << 30), ("512MB", 512_000_000), ("1.5 kib", 1536), ("0", 0), ("3TiB", 3 << 40), ("7b", 7)],
)
def test_a_size_is_read_as_people_write_it(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 XB", "1iB", "nan", "2GiB/s", "٣"])
def test_what_is_no_size_is_refused_by_value(text):
    with pytest.raises(UserError, match="write it like 2GiB"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_shown_size_is_near_the_size(size):
    assert parse_size(show_size(size).replace(" bytes", "")) == pytest.approx(size, rel=0.06)
