"""What all tests share: no setting of the developer's shell reaches them, property tests know no stopwatch.

In the short tier property tests try the same examples every time, so that it fails for what has changed alone; the long one looks for new
ones.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# The machine that runs the tests is shared: how long an example takes says nothing.
settings.register_profile("headrace", deadline=None, print_blob=True)
settings.register_profile("short", settings.get_profile("headrace"), derandomize=True, database=None)

STARTING_PROCESSES = (
    "client/",
    "e2e/",
    "engine/test_",
    "scripts/",
    "server/",
    "tokenizer_proc/test_process",
    "tokenizer_proc/test_renderer",
)
"""How the paths begin of tests that start processes: these are run one after the other, beside those of the others. Engines that are
killed and stopped have limits in seconds, and two of them at once would share the cores."""

TEST_MARK = "HEADRACE_TEST_RUN"
"""By this scripts/test recognises the processes that the tests started; it is no setting."""

# What engines keep between starts stays out of the developer's own cache, and goes with the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="headrace-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# torch's threads spin while they wait for each other, for ever on a machine where something else wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

for name in [name for name in os.environ if name.startswith("HEADRACE_") and name != TEST_MARK]:
    del os.environ[name]


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("short" if config.option.markexpr == "not slow" else "headrace")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist looks at the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file stay together, and so do all that start processes (see `pytest-xdist`, `--dist loadgroup`)."""
    root = Path(__file__).parent
    for item in items:
        path = str(item.path.relative_to(root))
        item.add_marker(pytest.mark.xdist_group("processes" if path.startswith(STARTING_PROCESSES) else path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    """Groups stand behind an @ in a test's id, to which some versions of pytest let pytest-xdist add nothing."""
    if not all("@" in test for test in ids):
        pytest.exit("this pytest-xdist does not group tests with this pytest: install those that pyproject.toml names", returncode=4)
