"""Tiny CIFAR archives in every published form, and machines without any data, for the tests."""

import dataclasses
import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from cifar_jax import datasets
from cifar_jax.datasets import archives
from cifar_jax.datasets.prepare import prepare

PER_FILE = 10


def tiny_spec(name):
    """The real spec with 10 images a file in place of thousands."""
    spec = archives.ARCHIVES[name]
    shrink = {
        form: {split: (names, PER_FILE) for split, (names, _) in getattr(spec, form).items()}
        for form in ("binary", "pickled")
    }
    return dataclasses.replace(spec, **shrink)


def tiny_arrays(spec, seed=0):
    """Random images and labels of the tiny set, as `archives.Arrays`."""
    rng = np.random.default_rng(seed)
    images, labels = {}, {}
    for split, (files, count) in spec.binary.items():
        images[split] = rng.integers(0, 256, (len(files) * count, 32, 32, 3), np.uint8)
        labels[split] = {
            label: rng.integers(0, classes, len(files) * count)
            for label, classes in spec.labels.items()
        }
    names = {label: [f"{label}{i}" for i in range(n)] for label, n in spec.labels.items()}
    return archives.Arrays(images, labels, names)


def binary_files(spec, arrays):
    """File name -> content of the binary form."""
    files = {
        file: "\n".join(arrays.names[label]).encode() + b"\n\n"
        for label, file in spec.names.items()
    }
    for split, (names, count) in spec.binary.items():
        planes = arrays.images[split].transpose(0, 3, 1, 2).reshape(-1, 3072)
        columns = [arrays.labels[split][label][:, None].astype(np.uint8) for label in spec.labels]
        rows = np.concatenate([*columns, planes], axis=1)
        for i, name in enumerate(names):
            files[name] = rows[i * count : (i + 1) * count].tobytes()
    return files


def pickled_files(spec, arrays):
    """File name -> content of the Python form, with the text keys Python 2 wrote as bytes."""

    def dump(content):
        return pickle.dumps({k.encode(): v for k, v in content.items()}, protocol=2)

    files = {
        spec.meta: dump(
            {
                key: [name.encode() for name in arrays.names[label]]
                for label, (_, key) in spec.pickled_labels.items()
            }
        )
    }
    for split, (names, count) in spec.pickled.items():
        planes = arrays.images[split].transpose(0, 3, 1, 2).reshape(-1, 3072)
        for i, name in enumerate(names):
            part = slice(i * count, (i + 1) * count)
            batch = {
                key: arrays.labels[split][label][part].tolist()
                for label, (key, _) in spec.pickled_labels.items()
            }
            files[name] = dump(batch | {"data": planes[part], "batch_label": b"one of five"})
    return files


def write_tar(path, files, folder="cifar"):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_folder(path, files):
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    """No data set and no cache but those the test makes."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture
def tiny(monkeypatch):
    """Archives of 10 images a file in place of the real ones; returns name -> (spec, arrays)."""
    sets = {}
    for name in ("cifar10", "cifar100"):
        spec = tiny_spec(name)
        monkeypatch.setitem(archives.ARCHIVES, name, spec)
        sets[name] = spec, tiny_arrays(spec)
    return sets


@pytest.fixture
def prepared(tiny, tmp_path):
    """A tiny CIFAR-10 prepared in `tmp_path/data`: its data directory and its arrays."""
    spec, arrays = tiny["cifar10"]
    folder = write_folder(tmp_path / "batches", binary_files(spec, arrays))
    prepare("cifar10", data_dir=tmp_path / "data", archive=folder, progress=False)
    return tmp_path / "data", arrays


def drop_test_split(data):
    """Makes the prepared CIFAR-10 in `data` one that has only `train`."""
    path = data / "cifar10" / "3.0.2" / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] == "train"]
    path.write_text(json.dumps(info))


def load(name="cifar10", **options):
    return datasets.load_dataset(name, **{"progress": False, "download": False} | options)


def assert_holds(dataset, arrays):
    for split, values in dataset.splits.items():
        np.testing.assert_array_equal(values.images, arrays.images[split])
        np.testing.assert_array_equal(values.labels, arrays.labels[split]["label"])
    assert dataset.class_names == tuple(arrays.names["label"])
