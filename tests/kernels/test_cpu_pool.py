"""The native threads: thousands of small jobs, many engines, callers that take turns, and nothing left when an engine is gone."""

import gc
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.kernels.eager import NativeOps
from tests.kernels.paged import dense, random, values_of

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")

WEIGHT = dense(random(640, 24))
"""Some ten units of work, of less than a microsecond each."""
X = random(5, 24)
MANY = 4
"""Threads: more than most machines that run tests have cores, so that they are taken off them in the middle of a job."""


def native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def is_back_to(count: int) -> bool:
    """Whether the process has ``count`` threads: a joined thread may be in the kernel's list for a moment more."""
    deadline = time.monotonic() + 10
    while native_threads() != count and time.monotonic() < deadline:
        time.sleep(0)
    return native_threads() == count


def test_thousands_of_tiny_jobs_each_end_with_their_result():
    ops = NativeOps(MANY)
    packed = ops.prepare([WEIGHT])
    expected = [ops.linear(X[row : row + 1] * (row + 1), packed) for row in range(5)]
    for turn in range(4000):
        row = turn % 5
        assert torch.equal(ops.linear(X[row : row + 1] * (row + 1), packed), expected[row]), turn


def test_no_thread_outlives_its_engine():
    gc.collect()
    before = native_threads()
    for turn in range(100):
        ops = NativeOps(1 + turn % MANY)
        if turn % 3:  # some go without having worked at all
            ops.linear(X, ops.prepare([WEIGHT]))
        assert native_threads() == before + turn % MANY
        del ops
        assert is_back_to(before)


def test_engines_side_by_side_do_not_mix_their_jobs():
    engines = [NativeOps(2) for _ in range(6)]
    packed = [ops.prepare([dense(values_of(WEIGHT) * n)]) for n, ops in enumerate(engines)]
    expected = engines[0].linear(X, engines[0].prepare([WEIGHT]))
    for _ in range(100):
        for n, ops in enumerate(engines):
            torch.testing.assert_close(ops.linear(X, packed[n]), expected * n)


def test_threads_of_python_may_share_an_engine():
    ops = NativeOps(MANY)
    packed = ops.prepare([WEIGHT])
    expected = [ops.linear(X * n, packed) for n in range(4)]
    wrong: list[int] = []

    def work(n: int) -> None:
        for turn in range(500):
            if not torch.equal(ops.linear(X * n, packed), expected[n]):
                wrong.append(turn)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_python_goes_on_while_an_op_computes():
    """The GIL is released: another thread can count, and the op ends as if nothing had been."""
    ops = NativeOps(1)
    packed = ops.prepare([dense(random(2048, 512))])
    x = random(256, 512)
    started, done, counted = threading.Event(), threading.Event(), 0

    def compute() -> None:
        started.set()
        for _ in range(5):
            ops.linear(x, packed)
        done.set()

    thread = threading.Thread(target=compute)
    thread.start()
    started.wait()
    while not done.is_set():
        counted += 1
    thread.join()
    assert counted > 1000
