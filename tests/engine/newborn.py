"""What the fork server's tests have it fork: a process that writes down what it is, and ends when it is told to."""

import json
import os
from pathlib import Path

IMPORTED_IN = os.getpid()


class _Role:
    @staticmethod
    def preload(kernels: str) -> None:
        """It wants nothing."""

    @staticmethod
    def run(run_dir: Path, name: str, incarnation: int, death_fd: int) -> int:
        said = {
            "pid": os.getpid(),
            "session": os.getsid(0),
            "title": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode(),
            "imported": os.getpid() == IMPORTED_IN,
        }
        (run_dir / f"{name}.{incarnation}.new").write_text(json.dumps(said))
        (run_dir / f"{name}.{incarnation}.new").rename(run_dir / f"{name}.{incarnation}")
        if name == "waits":
            os.read(death_fd, 1)
        if name == "raises":
            raise RuntimeError("a fault of the role")
        return incarnation


ROLE = _Role
