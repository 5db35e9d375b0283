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

PROCESS = ("messages", "actor", "errors", "metrics", "process", "config", "names", "sizes")
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
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {"send_pyobj", "recv_pyobj"}
"""pyzmq's own pickling."""


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


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_unpickled_or_evaluated(package: str) -> None:
    wrong = []
    for _, path in modules(package):
        wrong += [f"{path}:{line}: import {name}" for name, line in imports(path) if name.partition(".")[0] in UNSAFE_MODULES]
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Name) and called.id in UNSAFE_CALLS:
                wrong.append(f"{path}:{node.lineno}: {called.id}(…)")
            elif isinstance(called, ast.Attribute):
                if called.attr in UNSAFE_METHODS:
                    wrong.append(f"{path}:{node.lineno}: .{called.attr}(…)")
                # torch.load and numpy.load unpickle unless they are told not to.
                elif called.attr == "load" and isinstance(called.value, ast.Name) and called.value.id in {"torch", "np", "numpy"}:
                    safe = {"torch": ("weights_only", True)}.get(called.value.id, ("allow_pickle", False))
                    if not any(word.arg == safe[0] and getattr(word.value, "value", None) is safe[1] for word in node.keywords):
                        wrong.append(f"{path}:{node.lineno}: {called.value.id}.load without {safe[0]}={safe[1]}")
    assert not wrong, "\n".join(wrong)


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
