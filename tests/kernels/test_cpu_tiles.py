"""The products by AMX tiles, on machines that have none: the kernel's own source is compiled with the tile instructions in plain C++."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "tiles"
SOURCES = Path(__file__).parents[2] / "kernels" / "cpu" / "src"
COMPILER = os.environ.get("CXX", "g++")

pytestmark = [
    pytest.mark.skipif(os.uname().machine not in ("x86_64", "AMD64"), reason="tiles are x86-64's"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler"),
    # The kernels are compiled a second time.
    pytest.mark.slow,
]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-psabi", f"-I{SOURCES}", "-pthread", "-c"]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    portable = ["-DHEADRACE_ISA=portable"]
    tiles = ["-DHEADRACE_ISA=amx", "-DHEADRACE_AMX", "-include", str(HERE / "emulated.h")]
    parts = {
        "pool": (SOURCES / "pool.cpp", []),
        "compare": (HERE / "compare.cpp", []),
        "quantize": (SOURCES / "quantize.cpp", portable),
        "integers": (SOURCES / "integers.cpp", portable),
        "integers by tiles": (SOURCES / "integers.cpp", tiles),
        "bfloats": (SOURCES / "bfloats.cpp", portable),
        "bfloats by tiles": (SOURCES / "bfloats.cpp", tiles),
    }

    def compiled(name: str) -> None:
        source, flags = parts[name]
        subprocess.run([COMPILER, *FLAGS, *flags, str(source), "-o", str(folder / f"{name}.o")], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, parts))
    subprocess.run([COMPILER, "-pthread", *(str(folder / f"{name}.o") for name in parts), "-o", str(folder / "compare")], check=True)
    return folder / "compare"


def test_tiles_give_the_same_bits_as_every_other_instruction(program):
    ended = subprocess.run([str(program)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "280 products are equal\n"), ended.stdout + ended.stderr
