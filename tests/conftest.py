"""What all tests share: no setting of the developer's shell reaches them, property tests know no stopwatch."""

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

# The machine that runs the tests is shared: how long an example takes says nothing.
settings.register_profile("headrace", deadline=None, print_blob=True)
settings.load_profile("headrace")

TEST_MARK = "HEADRACE_TEST_RUN"
"""By this scripts/test recognises the processes that the tests started; it is no setting."""

# What engines keep between starts stays out of the developer's own cache, and goes with the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="headrace-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# torch's threads spin while they wait for each other, for ever on a machine where something else wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

for name in [name for name in os.environ if name.startswith("HEADRACE_") and name != TEST_MARK]:
    del os.environ[name]
