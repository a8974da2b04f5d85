"""Decoding once: many processes, a changed set, a corrupt or impossible cache."""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets_support import (
    assert_holds,
    binary_files,
    load,
    tiny_arrays,
    write_folder,
)
from datasets_support import empty_machine as empty_machine
from datasets_support import prepared as prepared
from datasets_support import tiny as tiny

from cifar_jax import datasets
from cifar_jax.datasets import decode, decoded, shapes10
from cifar_jax.datasets.prepare import prepare
from cifar_jax.runtime.errors import UserError


def test_many_processes_decode_the_same_arrays_as_one(prepared, monkeypatch):
    data, arrays = prepared
    monkeypatch.setattr(decode, "IMAGES_PER_PROCESS", 20)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        decode.subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k)
    )
    monkeypatch.setattr(decode.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert_holds(load(data_dir=data, splits=["train"]), arrays)
    assert len(started) == 3


def test_ids_that_are_no_places_keep_the_stored_order(prepared, monkeypatch):
    data, _ = prepared
    monkeypatch.setattr(decode, "place_of", lambda identity, split, count: 3)
    split = load(data_dir=data, splits=["test"]).splits["test"]
    records = decode.open_records(
        str(data / "cifar10" / "3.0.2"), "test", {"image": "image", "label": "label", "id": "id"}
    )
    np.testing.assert_array_equal(split.labels, [record["label"] for record in records])


@pytest.mark.parametrize(
    ("identity", "place"),
    [(b"test_00007", 7), (b"test_00010", -1), (b"train_00001", -1), (b"test_1x", -1), (b"", -1)],
)
def test_places_from_ids(identity, place):
    assert decode.place_of(identity, "test", 10) == place


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_bar_follows_the_decoding_on_a_terminal(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    order, shown = tmp_path / "order.npy", sys.stderr.getvalue
    decoded._reserve(order, (10,), "int64")
    with decoded._shown(order, 10, progress=True):
        np.load(order, mmap_mode="r+")[:5] = range(5)
        deadline = time.monotonic() + 60
        while sys.stderr.isatty() and "50%" not in shown() and time.monotonic() < deadline:
            time.sleep(0.05)
    if stream is Terminal:
        assert "decoding ..." in shown()
        assert "decoding  50%" in shown()
    else:
        assert shown() == ""


def entries(root):
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def test_the_cache_is_made_again_when_the_set_changes(prepared, tiny, tmp_path):
    data, arrays = prepared
    first = load(data_dir=data)
    assert load(data_dir=data).fingerprint == first.fingerprint
    spec, _ = tiny["cifar10"]
    other = tiny_arrays(spec, seed=1)
    shutil.rmtree(tmp_path / "batches")
    folder = write_folder(tmp_path / "batches", binary_files(spec, other))
    prepare("cifar10", data_dir=tmp_path / "new", archive=folder, progress=False)
    for path in (tmp_path / "new" / "cifar10" / "3.0.2").iterdir():
        shutil.copy(path, data / "cifar10" / "3.0.2")
    second = load(data_dir=data)
    assert_holds(second, other)
    assert second.fingerprint != first.fingerprint
    assert_holds(first, arrays)  # arrays in use stay as they were
    assert len(entries(data / "cifar10" / "3.0.2" / "cifar_jax_cache")) == 2  # the old one is gone


def test_the_fingerprint_follows_the_content_not_the_place(prepared, tmp_path):
    data, _ = prepared
    shutil.copytree(data, tmp_path / "copy")
    assert load(data_dir=data).fingerprint == load(data_dir=tmp_path / "copy").fingerprint


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip(entry / "images.npy"),
        lambda entry: flip(entry / "labels.npy"),
        lambda entry: os.truncate(entry / "images.npy", 1000),
        lambda entry: (entry / "order.npy").unlink(),
        lambda entry: (entry / "meta.json").write_text("{}"),
    ],
)
def test_a_corrupt_cache_is_noticed_and_made_again(prepared, damage, capsys):
    data, arrays = prepared
    damage(load(data_dir=data).splits["test"].entry)
    capsys.readouterr()
    assert_holds(load(data_dir=data), arrays)
    assert "corrupt and will be made again" in capsys.readouterr().err
    assert_holds(load(data_dir=data), arrays)
    assert capsys.readouterr().err == ""


def test_a_read_only_set_is_cached_in_the_users_cache(prepared, tmp_path):
    data, arrays = prepared
    directory = data / "cifar10" / "3.0.2"
    directory.chmod(0o555)
    dataset = load(data_dir=data)
    assert_holds(dataset, arrays)
    assert str(tmp_path / "xdg" / "cifar_jax" / "datasets") in dataset.source
    assert not (directory / "cifar_jax_cache").exists()
    named = load(data_dir=data, cache_dir=tmp_path / "mine")
    assert named.splits["test"].entry.is_relative_to(tmp_path / "mine")


def test_no_place_for_the_cache(prepared, tmp_path, monkeypatch):
    (prepared[0] / "cifar10" / "3.0.2").chmod(0o555)
    (tmp_path / "xdg").mkdir(mode=0o555)
    with pytest.raises(UserError, match=r"no place for the decoded images.*XDG_CACHE_HOME"):
        load(data_dir=prepared[0])


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(prepared, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded.os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"No space left on device"):
        load(data_dir=prepared[0])
    assert entries(prepared[0] / "cifar10" / "3.0.2" / "cifar_jax_cache") == []


def test_two_processes_at_once_both_prepare_and_read(tmp_path):
    code = f"""
from cifar_jax import datasets
from cifar_jax.datasets import shapes10
shapes10.COUNTS.update(train=300, test=100)
print(datasets.load_dataset("shapes10", data_dir={str(tmp_path)!r}).fingerprint)
"""
    command = [sys.executable, "-c", code]
    root = Path(datasets.__file__).parents[2]
    options = {"env": os.environ | {"PYTHONPATH": str(root)}, "text": True}
    pair = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    assert len(entries(tmp_path / "shapes10")) == 1
    assert len(entries(tmp_path / "shapes10" / shapes10.VERSION / "cifar_jax_cache")) == 2
