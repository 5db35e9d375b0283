"""The arrows of the architecture: who may import whom, and what may never come off a wire.

Every module's imports are read from its syntax tree, those inside functions as well; nothing is imported. A package lists what it may
use; `ALLOWED` below is the picture:

    client, server ──▶ engine (its wire and process parts)      tokenizer_proc ──▶ the same, and engine.checkpoint
    workers ──▶ the same, and engine.ledger, kernels            kernels ──▶ torch           engine ──▶ nothing above it
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("client", "engine", "kernels", "server", "tokenizer_proc", "workers")

PROCESS = ("messages", "actor", "curve", "keys", "errors", "metrics", "process", "config", "names", "sizes")
"""The parts of engine that every process is built on."""
ALLOWED = {
    "client": {f"engine.{part}" for part in PROCESS},
    "server": {"client", *(f"engine.{part}" for part in (*PROCESS, "checkpoint"))},
    "tokenizer_proc": {f"engine.{part}" for part in (*PROCESS, "checkpoint")},
    "workers": {"kernels", *(f"engine.{part}" for part in (*PROCESS, "checkpoint", "ledger"))},
    "kernels": set(),
    "engine": {"engine"},
}
COMMAND_LINE = "engine.cli"
"""The command line runs clients (`chat`, `bench`), asks the kernels what there is (`doctor`), and times them (`bench kernels`)."""
NEVER = {
    "client": {"torch", "aiohttp.web"},
    "engine": {"torch"},
    "server": {"torch"},
    "tokenizer_proc": {"torch"},
    "kernels": {"zmq", "msgspec", "aiohttp", "asyncio"},
    "workers": {"aiohttp"},
}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "telnetlib", "xmlrpc"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_NAMES = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn", "tempfile.mktemp"}
UNSAFE_METHODS = {"send_pyobj", "recv_pyobj"}
"""pyzmq's own pickling."""
LOADERS = {"torch": ("weights_only", True), "np": ("allow_pickle", False), "numpy": ("allow_pickle", False)}
"""Modules whose `load` unpickles, unless it is told not to with this argument."""
SCRIPTS = "scripts"
"""No package, but shipped beside them."""


def unsafe_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The calls that unpickle, evaluate, or have a shell look at a text, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in UNSAFE_NAMES or (node.module in LOADERS and alias.name == "load"):
                    yield node.lineno, f"from {node.module} import {alias.name}"
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        words = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
        if words.get("shell", False) is not False:
            yield node.lineno, "shell=True"
        if isinstance(called, ast.Name) and called.id in UNSAFE_CALLS:
            yield node.lineno, f"{called.id}(…)"
        elif isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            if called.attr in UNSAFE_METHODS:
                yield node.lineno, f".{called.attr}(…)"
            elif f"{owner}.{called.attr}" in UNSAFE_NAMES:
                yield node.lineno, f"{owner}.{called.attr}(…)"
            elif called.attr == "load" and owner in LOADERS:
                name, safe = LOADERS[owner]
                if words.get(name, ...) is not safe:
                    yield node.lineno, f"{owner}.load without {name}={safe}"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Every module of a package as ("engine.messages.wire", its file)."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every absolute name that is imported, with its line; `from a import b` yields a.b, since b may be a module."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write it in full, from headrace"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_arrow_allows(package: str) -> None:
    wrong = []
    for module, path in modules(package):
        allowed = ALLOWED[package] | {package}
        if within(module, {COMMAND_LINE}):
            allowed |= {"client", "kernels", "workers"}
        for name, line in imports(path):
            inside = name.removeprefix("headrace.")
            if inside != name and not within(inside, allowed):
                wrong.append(f"{path}:{line}: {module} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_never_imports_what_does_not_belong_in_its_process(package: str) -> None:
    wrong = [f"{path}:{line}: {name}" for _, path in modules(package) for name, line in imports(path) if within(name, NEVER[package])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_imported_by_its_full_name(package: str) -> None:
    """A bare `import engine` works by accident, in the repository's root."""
    wrong = [f"{path}:{line}: {name}" for _, path in modules(package) for name, line in imports(path) if within(name, set(PACKAGES))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [*PACKAGES, SCRIPTS])
def test_nothing_is_unpickled_or_evaluated(package: str) -> None:
    wrong = []
    for _, path in modules(package):
        wrong += [f"{path}:{line}: import {name}" for name, line in imports(path) if name.partition(".")[0] in UNSAFE_MODULES]
        wrong += [f"{path}:{line}: {what}" for line, what in unsafe_calls(tree_of(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "from torch import load",
        "from os import system",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.Popen(text, shell=flag)",
        "socket.recv_pyobj()",
    ],
)
def test_what_unpickles_or_evaluates_is_recognized(line: str) -> None:
    assert list(unsafe_calls(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "json.load(file)",
        "run(words, shell=False)",
    ],
)
def test_what_only_looks_like_it_is_left_alone(line: str) -> None:
    assert not list(unsafe_calls(ast.parse(line)))


HEAVY = {
    "client": {"torch", "aiohttp.web", "tokenizers"},
    "engine": {"torch", "aiohttp", "transformers", "tokenizers"},
    "server": {"torch", "transformers", "tokenizers"},
    "tokenizer_proc": {"torch", "transformers", "aiohttp"},
}


@pytest.mark.parametrize("package", HEAVY)
def test_a_light_process_loads_nothing_heavy(package: str) -> None:
    """What the syntax trees cannot see: a heavy module brought along by somebody else's package."""
    names = [f"headrace.{name}" for name, _ in modules(package) if not name.endswith("__main__") and not within(name, {COMMAND_LINE})]
    program = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert not set(loaded.stdout.split()) & HEAVY[package]
