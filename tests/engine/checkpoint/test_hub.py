"""Hub models, against a small hub on loopback. Each case is its own process: the hub's package reads its settings when imported."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.engine.checkpoint.samples import write_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.errors import UserError
for model, revision in json.loads(sys.argv[1]):
    try:
        files = resolve(Config(model=model, revision=revision))
        print(json.dumps({"name": files.name, "path": files.path, "context": files.context}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


class Hub:
    """What the loopback hub serves, and what was asked of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        hub = self

        class Desk(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                name = "/".join(parts[2:4] if parts[0] == "api" else parts[0:2])
                folder = hub.root / name
                if name == "org/gated":
                    return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
                if not folder.is_dir():
                    return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
                if parts[0] != "api":
                    file = folder.joinpath(*parts[4:])
                    if self.command == "GET":
                        hub.fetched.append(file.name)
                    data = file.read_bytes()
                    return self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
                if parts[4] == "revision" and parts[5] not in ("main", COMMIT):
                    return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                if parts[4] == "revision":
                    return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": self.files(folder)}).encode(), {})
                return self.answer(200, json.dumps(self.files(folder)).encode(), {})

            def files(self, folder: Path) -> list[dict[str, object]]:
                return [
                    {"type": "file", "path": file.name, "rfilename": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                    for file in sorted(folder.iterdir())
                ]

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Desk)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    served = Hub(tmp_path / "hub")
    yield served
    served.close()


def resolved(home: Path, url: str, *models: tuple[str, str | None], **settings: str) -> list[dict[str, str]]:
    """The outcome of each model in one fresh process whose cache is `home`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(models)],
        env=environment | settings,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert not any("\n" in answer.get("error", "") for answer in answers)
    return answers


def test_a_hub_model_is_fetched_once_and_then_served_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    directory = write_directory(hub.root / "org" / "tiny", shards=2)
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "tiny.gguf"):
        (directory / unwanted).write_bytes(b"unwanted")
    home = tmp_path / "home"
    [first] = resolved(home, hub.url, ("org/tiny", None))
    assert (first["name"], first["context"]) == ("org/tiny", 256)
    assert sorted(hub.fetched) == sorted(["config.json", "model.safetensors.index.json", *(f.name for f in directory.glob("model-*"))])
    assert Path(first["path"]).is_relative_to(home)
    hub.fetched.clear()
    offline, pinned, absent = resolved(home, hub.url, ("org/tiny", None), ("org/tiny", COMMIT), ("org/else", None), HF_HUB_OFFLINE="1")
    assert offline == pinned == first
    assert "org/else is neither a local path nor complete in the hub's cache" in absent["error"]
    assert "HF_HUB_OFFLINE" in absent["error"]
    assert hub.fetched == []


def test_each_refusal_of_the_hub_is_one_line(hub: Hub, tmp_path: Path) -> None:
    write_directory(hub.root / "org" / "tiny")
    falcon = write_directory(hub.root / "org" / "falcon", config={"architectures": ["FalconForCausalLM"]})
    pickled = write_directory(hub.root / "org" / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (hub.root / "org" / "gguf").mkdir()
    (hub.root / "org" / "gguf" / "x.gguf").write_bytes(b"")
    models = (
        ("org/absent", None),
        ("org/gated", None),
        ("org/tiny", "v9"),
        ("org/falcon", None),
        ("org/pickled", None),
        ("org/gguf", None),
    )
    absent, gated, revision, unsupported, no_weights, gguf = (answer["error"] for answer in resolved(tmp_path / "home", hub.url, *models))
    assert "no hub repository is named 'org/absent'" in absent
    assert "org/gated on the hub is gated" in gated
    assert "no revision 'v9'" in revision
    assert "FalconForCausalLM" in unsupported
    assert "no model.safetensors" in no_weights
    assert "no config.json" in gguf
    assert falcon.joinpath("model.safetensors").exists()
    assert "model.safetensors" not in hub.fetched, "weights of a model that cannot be served were fetched"


def test_without_a_network_a_hub_name_ends_in_one_line(tmp_path: Path) -> None:
    [answer] = resolved(tmp_path / "home", "http://127.0.0.1:1", ("org/tiny", None))
    assert "the hub cannot be reached" in answer["error"]
