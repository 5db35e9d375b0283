"""Packed weights on disk: mapped by the next start, packed anew when the file is not what it should be, left out where none can be kept."""

import os
import subprocess
import threading

import numpy as np
import pytest
import torch

from headrace.kernels.weights import Dense
from tests.kernels.eager import NativeOps
from tests.kernels.paged import dense, grouped_int, random

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")

CODES = torch.randint(0, 16, (40, 64), dtype=torch.int8)
WEIGHTS = {
    "mixed": [
        grouped_int(CODES, random(40, 2).half().float(), random(40, 2, seed=1).half().float(), 32, 4),
        dense(random(23, 64)),
    ],
    "dense": [dense(random(50, 64, seed=2).bfloat16())],
}
X = random(5, 64, seed=3)


def product(folder, version: str = "1", expect_stored: bool = False) -> dict[str, torch.Tensor]:
    """What a fresh backend makes of WEIGHTS. With `expect_stored` it must not ask for them."""

    def give(name):
        assert not expect_stored, f"{name} was packed again"
        return WEIGHTS[name]

    ops = NativeOps(1)
    ops.backend.keep(folder, version)
    prepared = {name: ops.backend.prepare(name, lambda name=name: give(name)) for name in WEIGHTS}
    ops.backend._store.publish()
    for thread in threading.enumerate():
        if thread.name == "packed":
            thread.join()
    return {name: ops.linear(X, weight) for name, weight in prepared.items()}


@pytest.fixture
def expected():
    ops = NativeOps(1)
    return {name: ops.linear(X, ops.prepare(weights)) for name, weights in WEIGHTS.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in WEIGHTS)


def packed_file(folder):
    (file,) = folder.glob("*.packed")
    return file


def test_the_second_start_maps_what_the_first_has_packed(tmp_path, expected):
    assert same(product(tmp_path / "model"), expected)
    assert same(product(tmp_path / "model", expect_stored=True), expected)
    assert packed_file(tmp_path / "model").stat().st_mode & 0o777 == 0o600


def test_other_files_are_packed_anew_and_take_the_place_of_the_old(tmp_path, expected):
    product(tmp_path)
    old = packed_file(tmp_path)
    assert same(product(tmp_path, version="2"), expected)
    assert packed_file(tmp_path) != old


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-16] + b"headrace packed0",
        lambda data: bytes(len(data)),
        lambda data: data[:-32] + b"\xff" * 16 + data[-16:],
        lambda data: data[4096:],
        lambda data: data + b"more",
    ],
)
def test_a_file_that_is_damaged_is_packed_anew(tmp_path, expected, damage, caplog):
    product(tmp_path)
    file = packed_file(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert same(product(tmp_path), expected)
    assert "packed anew" in caplog.text
    assert same(product(tmp_path, expect_stored=True), expected)


def test_where_nothing_can_be_written_weights_stay_in_memory(tmp_path, expected, caplog):
    (tmp_path / "file").touch()
    assert same(product(tmp_path / "file" / "folder"), expected)
    assert "the next start packs them again" in caplog.text


def test_a_disk_that_fills_up_is_no_trouble(tmp_path, expected, monkeypatch, caplog):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    assert same(product(tmp_path), expected)
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_left_unfinished_is_removed(tmp_path):
    with subprocess.Popen(["true"]) as process:
        pass
    left, busy, odd = (tmp_path / f"{name}.part" for name in (f"1-1.{process.pid}", f"1-1.{os.getppid()}", "odd"))
    for file in (left, busy, odd):
        file.touch()
    product(tmp_path)
    assert not left.exists() and not odd.exists()
    assert busy.exists()


def test_weights_of_every_type_of_numbers_are_kept(tmp_path):
    values = np.arange(32, dtype=np.float16).reshape(2, 16)
    ops = NativeOps(1)
    ops.backend.keep(tmp_path, "1")
    packed = ops.backend.prepare("half", lambda: [Dense(values)])
    assert torch.equal(ops.linear(torch.eye(16), packed).T, torch.from_numpy(values).float())
