"""Prepared sets: made, found and read; stock tfds and we read each other's."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets_support import (
    assert_holds,
    binary_files,
    drop_test_split,
    load,
    tiny_arrays,
    write_folder,
    write_tar,
)
from datasets_support import empty_machine as empty_machine
from datasets_support import prepared as prepared
from datasets_support import tiny as tiny

from cifar_jax import datasets, input_pipeline
from cifar_jax.datasets import shapes10
from cifar_jax.datasets.prepare import prepare
from cifar_jax.runtime.errors import UserError

REAL = Path(os.environ.get("TFDS_DATA_DIR", "/nonexistent"))
needs_real = pytest.mark.skipif(
    not (REAL / "cifar10").is_dir(), reason="TFDS_DATA_DIR holds no prepared CIFAR-10"
)


# --- preparing and reading


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_an_archive_comes_back_pixel_for_pixel_in_its_own_order(tiny, tmp_path, name):
    spec, arrays = tiny[name]
    path = write_tar(tmp_path / "a.tar.gz", binary_files(spec, arrays))
    dataset = load(name, archive=path, data_dir=tmp_path / "data")
    assert_holds(dataset, arrays)
    split = dataset.splits["train"]
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int32
    assert split.images.flags.c_contiguous
    assert isinstance(split.images, np.memmap)
    assert dataset.num_classes == spec.labels["label"]
    assert dataset.source.startswith(f"{name} 3.0.2 from {tmp_path / 'data' / name / '3.0.2'}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_stock_tfds_reads_what_we_prepare(tiny, tmp_path, name):
    import tensorflow_datasets as tfds

    spec, arrays = tiny[name]
    folder = write_folder(tmp_path / "batches", binary_files(spec, arrays))
    prepare(name, data_dir=tmp_path, archive=folder, progress=False)
    load(name, data_dir=tmp_path)  # our cache beside it must not disturb
    stock = tfds.builder(name, data_dir=tmp_path, file_format="array_record")
    assert type(stock).__module__.startswith("tensorflow_datasets")
    for label, names in arrays.names.items():
        assert stock.info.features[label].names == names
    for split in ("train", "test"):
        assert stock.info.splits[split].num_examples == len(arrays.images[split])
        seen = set()
        for record in stock.as_data_source(split):
            index = int(record["id"].decode().removeprefix(f"{split}_"))
            np.testing.assert_array_equal(record["image"], arrays.images[split][index])
            for label, values in arrays.labels[split].items():
                assert record[label] == values[index]
            seen.add(index)
        assert seen == set(range(len(arrays.images[split])))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_features_and_version_are_those_of_stock_tfds(tmp_path, name):
    import tensorflow_datasets as tfds

    from cifar_jax.datasets.prepare import BUILDERS

    stock = tfds.builder_cls(name)(data_dir=tmp_path)
    ours = BUILDERS[name](data_dir=tmp_path)
    assert ours.info.full_name == stock.info.full_name
    assert ours.info.features.to_json() == stock.info.features.to_json()
    assert ours.info.supervised_keys == stock.info.supervised_keys


# Makes a machine without TensorFlow of one that has it.
BLOCK_TENSORFLOW = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "tensorflow" else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run_python(code, **environment):
    root = Path(datasets.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_preparing_and_reading_never_import_tensorflow_and_a_warm_start_not_even_tfds(tmp_path):
    code = f"""{BLOCK_TENSORFLOW}
from cifar_jax import datasets
from cifar_jax.datasets import shapes10
shapes10.COUNTS.update(train=40, test=20)
for _ in range({{times}}):
    print(len(datasets.load_dataset("shapes10", data_dir={str(tmp_path)!r}).splits["train"]))
print("tensorflow" in sys.modules, "tensorflow_datasets" in sys.modules)
"""
    cold = run_python(code.replace("{times}", "2"))
    assert cold.stdout.split() == ["40", "40", "False", "True"], cold.stderr
    warm = run_python(code.replace("{times}", "1"))
    assert warm.stdout.split() == ["40", "False", "False"], warm.stderr
    assert warm.stderr == ""


def test_streamed_records_are_the_cached_images(prepared):

    data, _ = prepared
    split = load(data_dir=data).splits["test"]
    source = pickle.loads(pickle.dumps(input_pipeline.record_source(split)))
    assert len(source) == len(split)
    for index in (0, 3, 9):
        np.testing.assert_array_equal(source[index]["image"], split.images[index])
        assert source[index]["label"] == split.labels[index]
        assert source[index]["label"].dtype == np.int32


# --- where sets are looked for


def test_search_order_and_the_newest_version(prepared, tmp_path, monkeypatch):
    data, _ = prepared
    home = tmp_path / "home" / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    for place in (home, tmp_path / "env"):
        shutil.copytree(data / "cifar10", place / "cifar10")
        assert str(place) in load().source
    shutil.copytree(data / "cifar10" / "3.0.2", data / "cifar10" / "3.0.10")
    (data / "cifar10" / "incomplete.X_9.9.9").mkdir()
    assert str(data / "cifar10" / "3.0.10") in load(data_dir=data).source
    assert str(data / "cifar10" / "3.0.2") in load("cifar10:3.0.2", data_dir=data).source


def test_no_data_to_be_had_names_all_three_ways_out(tmp_path):
    with pytest.raises(UserError, match=r"--archive.*--data-dir.*--dataset shapes10"):
        load(data_dir=tmp_path)


def test_offline_fails_soon_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match=r"cannot be downloaded.*--archive.*shapes10"):
        load(data_dir=tmp_path / "data", download=True, url="http://127.0.0.1:9/cifar.tar.gz")
    assert not list((tmp_path / "data").glob("cifar10*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifr10", "did you mean 'cifar10'"),
        ("../etc", "no prepared data set"),
        ("", "no prepared data set"),
        ("mnist", "valid: cifar10, cifar100, shapes10"),
        ("cifar10:1.0.0", "is not prepared"),
    ],
)
def test_unknown_names(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load(name, data_dir=tmp_path)


def test_a_failed_preparation_leaves_no_set(tiny, tmp_path):
    spec, arrays = tiny["cifar10"]
    files = binary_files(spec, arrays)
    files["test_batch.bin"] = b"\xff" + files["test_batch.bin"][1:]
    path = write_tar(tmp_path / "bad.tar.gz", files)
    with pytest.raises(UserError, match=r"damaged"):
        load(archive=path, data_dir=tmp_path / "data")
    assert not (tmp_path / "data" / "cifar10").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "--image-size"),
        ({"image_size": 32.0}, "--image-size"),
        ({"splits": ("train", "validation")}, "no split 'validation'; it has"),
        ({"splits": ()}, "at least one split"),
    ],
)
def test_bad_arguments(prepared, options, message):
    with pytest.raises(UserError, match=message):
        load(data_dir=prepared[0], **options)


def test_a_file_for_a_data_dir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is a file"):
        load(data_dir=tmp_path / "file")


def test_a_full_disk_while_preparing_is_one_clear_error_and_leaves_no_set(tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full:
        def __init__(self, *_):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    monkeypatch.setitem(shapes10.COUNTS, "train", 20)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        load("shapes10", data_dir=tmp_path)
    assert list((tmp_path / "shapes10").iterdir()) == []


def test_a_read_only_data_dir_cannot_be_prepared_into(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(UserError, match=r"cannot write a data set in"):
        load("shapes10", data_dir=tmp_path / "locked")


# --- what is named is what is used


def test_a_named_data_dir_alone_is_looked_in(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared[0]))
    assert str(prepared[0]) in load().source
    for name in ("cifar10", "mnist"):
        with pytest.raises(UserError, match=r"not prepared|no prepared data set") as caught:
            load(name, data_dir=tmp_path / "empty")
        assert str(prepared[0]) not in str(caught.value)


def test_a_named_archive_is_used_wherever_another_set_is_prepared(
    prepared, tiny, tmp_path, monkeypatch
):
    data, arrays = prepared
    spec, _ = tiny["cifar10"]
    other = tiny_arrays(spec, seed=1)
    archive = write_folder(tmp_path / "other", binary_files(spec, other))
    with pytest.raises(UserError, match=r"--archive .*other holds other images than .*3\.0\.2"):
        load(data_dir=data, archive=archive)
    monkeypatch.setenv("TFDS_DATA_DIR", str(data))
    (archive / "test_batch.bin").rename(tmp_path / "kept")
    with pytest.raises(UserError, match="incomplete"):
        load(archive=archive)
    (tmp_path / "kept").rename(archive / "test_batch.bin")
    home = tmp_path / "home" / "tensorflow_datasets"
    first = load(archive=archive)
    assert_holds(first, other)
    assert str(home) in first.source
    made = sorted(home.rglob("*array_record*"))
    assert load(archive=archive).fingerprint == first.fingerprint
    assert sorted(home.rglob("*array_record*")) == made
    same = load(archive=tmp_path / "batches")
    assert_holds(same, arrays)
    assert str(data) in same.source
    with pytest.raises(UserError, match="leave --archive out"):
        load("shapes10", archive=archive)


def test_a_data_dir_that_is_the_set_itself(prepared, tmp_path, capsys):
    data, arrays = prepared
    older = data / "cifar10" / "3.0.2"
    newer = shutil.copytree(older, data / "cifar10" / "3.0.10") / "dataset_info.json"
    newer.write_text(newer.read_text().replace('"3.0.2"', '"3.0.10"'))
    for place, version in ((older, "3.0.2"), (data / "cifar10", "3.0.10")):
        capsys.readouterr()
        dataset = load(data_dir=place)
        assert_holds(dataset, arrays)
        assert f"{data / 'cifar10' / version} (" in dataset.source
        assert "is cifar10 itself" in capsys.readouterr().err
    assert str(older) in load("cifar10:3.0.2", data_dir=data / "cifar10").source
    for name in ("cifar100", "shapes10", "cifar10:9.9.9"):
        for place in (older, data / "cifar10"):
            with pytest.raises(UserError, match=rf"holds cifar10 3\.0\.\d+, not {name}"):
                load(name, data_dir=place)
    assert sorted(path.name for path in (data / "cifar10").iterdir()) == ["3.0.10", "3.0.2"]


# --- a test split held out of train


def test_a_share_of_train_is_the_test_split_of_a_set_without(prepared):
    data, arrays = prepared
    with pytest.raises(UserError, match="has a test split: leave --test-fraction away"):
        load(data_dir=data, test_fraction=0.2)
    drop_test_split(data)
    with pytest.raises(UserError, match=r"no split 'test'; it has train \(50\).*--test-fraction"):
        load(data_dir=data)
    for fraction in (1.5, -0.1, float("nan")):
        with pytest.raises(UserError, match="--test-fraction must be above 0 and below 1"):
            load(data_dir=data, test_fraction=fraction)
    with pytest.raises(UserError, match=r"--test-fraction 0\.001 of 50 images.*empty split"):
        load(data_dir=data, test_fraction=0.001)
    dataset = load(data_dir=data, test_fraction=0.2)
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert (len(train), len(test), dataset.test_fraction) == (40, 10, 0.2)
    assert "no test split: 0.2 of its training images, held out" in dataset.source
    both = np.concatenate([train.positions, test.positions])
    assert sorted(both) == list(range(50))
    assert list(test.positions) != list(range(40, 50))  # sets may be sorted by class
    for split in (train, test):
        np.testing.assert_array_equal(split.images, arrays.images["train"][split.positions])
        np.testing.assert_array_equal(
            split.labels, arrays.labels["train"]["label"][split.positions]
        )
        source = input_pipeline.record_source(split)
        assert len(source) == len(split)
        np.testing.assert_array_equal(source[3]["image"], split.images[3])
    again = load(data_dir=data, test_fraction=0.2, splits=["test"])
    assert list(again.splits) == ["test"]
    assert again.splits["test"].fingerprint == test.fingerprint
    other = load(data_dir=data, test_fraction=0.4)
    assert other.fingerprint != dataset.fingerprint


# --- real data


@needs_real
def test_real_cifar10(tmp_path):
    dataset = load(data_dir=REAL, cache_dir=tmp_path, splits=["test"])
    test = dataset.splits["test"]
    assert test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert [dataset.class_names[i] for i in test.labels[:4]] == ["cat", "ship", "ship", "airplane"]
    # Channel means of the CIFAR-10 test set: 0.494, 0.485, 0.450.
    means = test.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.494, 0.485, 0.450], atol=0.005)


# --- the command


def test_the_command_prepares_and_lists(tiny, tmp_path, capsys):
    from cifar_jax.datasets.__main__ import main

    spec, arrays = tiny["cifar10"]
    path = write_tar(tmp_path / "a.tar.gz", binary_files(spec, arrays))
    data = str(tmp_path / "data")
    main(["prepare", "cifar10", "--data-dir", data, "--archive", str(path)])
    assert "50 train, 10 test images, 10 classes" in capsys.readouterr().out
    main(["list", "--data-dir", data])
    expected = f"{tmp_path / 'data' / 'cifar10' / '3.0.2'}  array_record\n"
    assert capsys.readouterr().out == expected
