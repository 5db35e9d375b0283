"""The comparison, with engines whose speed is known."""

import json
import subprocess
import sys
from pathlib import Path

import peers
import pytest

from headrace.client.bench.corpus import load_words
from headrace.client.bench.options import Options
from headrace.client.calls import Server as Address
from tests.client.fake_server import serving
from tests.scripts.conftest import BENCH

ROOT = BENCH.parent.parent

SERVER = """
import sys
from aiohttp import web
from tests.client.fake_server import Behaviour, FakeServer
port, delay = sys.argv[1:]
web.run_app(FakeServer(Behaviour(first_delay_s=float(delay))).app(), host="127.0.0.1", port=int(port), print=None)
"""

ADAPTER = """
import json, sys
from pathlib import Path
from time import perf_counter, sleep
from adapter import main

def open_model(model, threads):
    def generate(prompts, shared, output_tokens):
        with Path(model).open("a") as seen:
            print(json.dumps(prompts), file=seen)
        times = []
        for _ in range(output_tokens):
            sleep(0.06)
            times.append(perf_counter())
        print("a library's chatter")
        return [times for _ in prompts]
    return f"7 with {threads} threads", generate

main(open_model)
"""


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    """A file of peers: Headrace stands for a server that answers after 30 ms, "slow" is one of 120 ms, "library" an adapter of 60 ms."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "with_library.py").write_text(ADAPTER)
    file = tmp_path / "peers.toml"
    file.write_text(
        f"""
        [headrace]
        one = ["{sys.executable}", "{tmp_path}/server.py", "{{port}}", "0.03"]
        environment = {{ PYTHONPATH = "{ROOT}" }}
        [slow]
        one = ["{{program}}", "{tmp_path}/server.py", "{{port}}", "0.12"]
        environment = {{ PYTHONPATH = "{ROOT}" }}
        version = ["{{program}}", "--version"]
        [library]
        one = ["{{program}}", "{tmp_path}/with_library.py", "{{model}}", "--threads", "{{threads}}"]
        environment = {{ PYTHONPATH = "{{adapters}}" }}
        [broken]
        one = ["{{program}}", "-c", "raise SystemExit('no such quantization')", "{{port}}"]
        """
    )
    return file


def compare(entries: Path, *words: str) -> subprocess.CompletedProcess[str]:
    model = entries.parent / "model.gguf"
    model.touch()
    command = [sys.executable, str(BENCH / "compare.py"), str(model), "--peers", str(entries), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=entries.parent, timeout=120)


def test_engines_are_measured_in_turn_and_their_ratios_are_those_of_their_speeds(entries: Path) -> None:
    python = sys.executable
    ended = compare(
        entries, "--work", "b", "--rounds", "2", "--threads", "2", "--json", "out.json", f"--peer=slow={python}", f"--peer=library={python}"
    )
    assert ended.returncode == 0, ended.stderr
    done = json.loads((entries.parent / "out.json").read_text())
    assert [one["engine"] for one in done["taken"]] == ["headrace", "slow", "library"] * 2
    ahead = {line["engine"]: line["ahead"] for line in done["lines"] if line["metric"]["name"] == "prefill"}
    assert ahead["headrace"] is None
    assert 1.5 < ahead["slow"] < 5
    assert 1 < ahead["library"] < ahead["slow"]
    versions = {one["name"]: one["version"] for one in done["started"]}
    assert versions["slow"].startswith("Python 3") and versions["library"] == "7 with 2 threads"
    for one in done["taken"]:
        report = one["measured"]["report"]
        assert (report["completed"], report["tokens"]["prompt"], report["tokens"]["output"]) == (5, 5 * 1024, 5)


def test_a_library_gets_the_very_prompts_that_servers_get(entries: Path) -> None:
    options = Options(work="d", requests=4, concurrency=2, prompt_tokens=(8, 12), shared_prefix=20, output_tokens=3, seed=5)
    words = load_words(None)
    entry = peers.read_peers([entries])["library"]
    seen = entries.parent / "seen"
    with serving() as server:
        address = Address.parse(server.url, None)
        peers.Server(peers.Started("fake", [], "", 0.0), 0, address).measure(options, words, "")
        sent = [body["prompt"] for body in server.requests if body["max_tokens"] == 3]
        with peers.running(peers.Chosen("library", entry, sys.executable, str(seen)), 1, 2, address) as library:
            report = library.measure(options, words, "").report
    warm_up, *batches = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [len(batch) for batch in batches] == [2, 2]
    # Two requests under way at a time reach a server in either order.
    assert warm_up == sent[:1]
    assert sorted(batches[0] + batches[1]) == sorted(sent[1:])
    assert report.tokens.output == 12 and 60 <= report.tpot_ms.p50 < 200


def test_an_engine_that_does_not_start_is_told_of_with_its_own_words(entries: Path) -> None:
    ended = compare(entries, "--work", "a", f"--peer=broken={sys.executable}")
    assert ended.returncode == 1
    assert "broken ended with status 1" in ended.stderr and "no such quantization" in ended.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--peer", "nobody=x"], "nobody is in no file of peers"),
        (["--peer", "slow"], "say NAME=PATH"),
        (["--peer-model", "slow=x"], "there is no --peer slow"),
        (["--peer", "slow=x", "--peer-model", "slow=absent"], "there is no"),
    ],
)
def test_a_wrong_choice_of_peers_is_refused_by_name(entries: Path, words: list[str], says: str) -> None:
    ended = compare(entries, *words)
    assert ended.returncode == 1
    assert says in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_every_entry_of_the_repository_can_be_filled_in() -> None:
    places = dict.fromkeys(("program", "model", "threads", "cores", "port", "adapters"), "x")
    for name, peer in peers.read_peers([BENCH / "peers.toml"]).items():
        for word in [*peer.command(1), *peer.command(32), *(peer.version or []), *peer.environment.values()]:
            assert "{" not in word.format_map(places), name
        for word in peer.command(1):
            assert not word.startswith("{adapters}") or Path(word.format(adapters=peers.ADAPTERS)).is_file()


def test_a_file_of_peers_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "peers.toml"
    file.write_text('[a]\none = ["x"]\nwhatever = 1\n')
    with pytest.raises(peers.UserError, match="whatever"):
        peers.read_peers([file])
