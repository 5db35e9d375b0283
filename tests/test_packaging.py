"""The package as others get it: what a wheel holds, what an editable install sees, and what happens without a compiler.

The long tier builds a copy of the sources and installs it into bare environments (`venv --without-pip`, the wheel unpacked), so that
neither this checkout nor its environment can lend a hand. Only modules that need no other package are imported there.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("client", "engine", "kernels", "server", "tokenizer_proc", "workers")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTION = {"zmq": "pyzmq"}
"""Where a package is imported by another name than it is installed by."""


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~\[;]", line, maxsplit=1)[0].lower().replace("_", "-") for line in requirements}


def third_party_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return {DISTRIBUTION.get(name, name).lower().replace("_", "-") for name in names - sys.stdlib_module_names - {"headrace"}}


def test_what_is_imported_is_what_is_declared() -> None:
    """Both ways: an import without its dependency fails for users, a dependency without an import is their download for nothing."""
    imported = {name for package in PACKAGES for path in (ROOT / package).rglob("*.py") for name in third_party_imports(path)}
    declared = requirement_names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    # One distribution of OpenTelemetry's is imported as a part of the same package as the others.
    optional = requirement_names(extras["triton"]) | {name.partition("-")[0] for name in requirement_names(extras["otel"])}
    assert imported - declared - optional == set()
    assert declared - imported == set()


def test_the_version_is_written_in_one_place() -> None:
    assert importlib.metadata.version("headrace") == PROJECT["version"]
    again = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if f'"{PROJECT["version"]}"' in path.read_text()]
    assert again == []


def test_every_dependency_has_a_least_version() -> None:
    assert [line for line in PROJECT["dependencies"] if ">=" not in line] == []


def copy_sources(to: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, to / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to / name)
    return to


def build(kind: str, sources: Path, to: Path, **environment: str) -> tuple[Path, str]:
    """Build a "wheel" or an "editable" wheel with the tools of this environment. The wheel's path and all that was printed."""
    to.mkdir()
    program = f"import sys, scikit_build_core.build as build; build.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(to)],
        cwd=sources,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = to.glob("*.whl")
    return wheel, done.stdout


class Environment:
    """A bare environment with one wheel in it."""

    def __init__(self, place: Path, wheel: Path) -> None:
        venv.create(place, with_pip=False, symlinks=True)
        self.python = place / "bin" / "python"
        self._elsewhere = place
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages")

    def run(self, program: str) -> str:
        """What the program prints, run from outside the sources."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run([self.python, "-c", program], cwd=self._elsewhere, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with a neighbour that must never be imported. Its build folder is shared: one compilation serves all."""
    around = tmp_path_factory.mktemp("around")
    (around / "triton").mkdir()
    (around / "triton" / "__init__.py").write_text("")
    return copy_sources(around / "headrace")


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_no_source_of_the_kernels(sources: Path, tmp_path: Path) -> None:
    wheel, _ = build("wheel", sources, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"headrace/{path.relative_to(sources)}" for package in PACKAGES for path in (sources / package).rglob("*.py")}
    assert expected <= names
    assert [name for name in names if name.endswith((".cpp", ".h"))] == []
    assert len([name for name in names if "/_native." in name and name.endswith(".so")]) == 1
    environment = Environment(tmp_path / "env", wheel)
    assert environment.run("import headrace.engine.errors as e; print(e.__file__)").startswith(str(tmp_path / "env"))
    assert environment.run("from importlib.metadata import version; print(version('headrace'))") == PROJECT["version"]
    assert environment.run("import importlib.util as u; print(u.find_spec('engine'), u.find_spec('kernels'))") == "None None"


@pytest.mark.slow
def test_an_editable_install_sees_what_changes_in_the_sources(sources: Path, tmp_path: Path) -> None:
    wheel, _ = build("editable", sources, tmp_path / "dist")
    environment = Environment(tmp_path / "env", wheel)
    assert environment.run("import headrace.engine.errors as e; print(e.__file__)") == str(sources / "engine" / "errors.py")
    (sources / "engine" / "brand_new.py").write_text("word = 'module'\n")
    assert environment.run("from headrace.engine.brand_new import word; print(word)") == "module"
    (sources / "engine" / "brand_new.py").unlink()
    (sources / "engine" / "brand_new").mkdir()
    (sources / "engine" / "brand_new" / "__init__.py").write_text("word = 'package'\n")
    assert environment.run("from headrace.engine.brand_new import word; print(word)") == "package"
    shutil.rmtree(sources / "engine" / "brand_new")


@pytest.mark.slow
def test_an_editable_install_exposes_neither_the_folders_nor_their_neighbours(sources: Path, tmp_path: Path) -> None:
    wheel, _ = build("editable", sources, tmp_path / "dist")
    found = "import importlib.util as u; print([name for name in ('engine', 'kernels', 'tests', 'triton') if u.find_spec(name)])"
    assert Environment(tmp_path / "env", wheel).run(found) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_without_a_compiler_the_install_is_pure_and_says_so(kind: str, tmp_path: Path) -> None:
    wheel, printed = build(kind, copy_sources(tmp_path / "sources"), tmp_path / "dist", CXX="/bin/false")
    assert "native kernels could not be built" in printed
    assert wheel.name.endswith("-py3-none-any.whl")
    assert Environment(tmp_path / "env", wheel).run("import headrace.engine.errors; print('here')") == "here"
