"""Prepared sets: found, read, decoded once, cached; and everything that can be wrong with them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets_support import binary_files, tiny_arrays, tiny_spec, write_folder, write_tar
from PIL import Image

from cifar_jax import datasets
from cifar_jax.datasets import archives, cache, decode, locate, shapes10
from cifar_jax.datasets.prepare import prepare
from cifar_jax.errors import UserError

REAL = Path(os.environ.get("TFDS_DATA_DIR", "/nonexistent"))
needs_real = pytest.mark.skipif(
    not (REAL / "cifar10").is_dir(), reason="TFDS_DATA_DIR holds no prepared CIFAR-10"
)


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


def load(name="cifar10", **options):
    return datasets.load_dataset(name, **{"progress": False, "download": False} | options)


def assert_holds(dataset, arrays):
    for split, values in dataset.splits.items():
        np.testing.assert_array_equal(values.images, arrays.images[split])
        np.testing.assert_array_equal(values.labels, arrays.labels[split]["label"])
    assert dataset.class_names == tuple(arrays.names["label"])


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

    from cifar_jax.datasets.builders import BUILDERS

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
    import pickle

    data, _ = prepared
    split = load(data_dir=data).splits["test"]
    source = pickle.loads(pickle.dumps(datasets.record_source(split)))
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
    with pytest.raises(UserError, match="--archive.*--data-dir.*--dataset shapes10"):
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
    with pytest.raises(UserError, match="damaged"):
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
    with pytest.raises(UserError, match="is a file"):
        load(data_dir=tmp_path / "file")


def test_a_read_only_data_dir_cannot_be_prepared_into(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(UserError, match="cannot write a data set in"):
        load("shapes10", data_dir=tmp_path / "locked")


# --- other sets


def write_set(data_dir, name, images, labels, classes=3, **image_options):
    """Prepares a foreign set with tfds itself: encoded images (bytes) and labels."""
    import io

    import tensorflow_datasets as tfds

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            image = tfds.features.Image(**{"shape": (None, None, 3)} | image_options)
            label = tfds.features.ClassLabel(num_classes=classes)
            features = tfds.features.FeaturesDict({"picture": image, "kind": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"picture": io.BytesIO(image), "kind": label}

    Foreign.name = name
    builder = Foreign(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(download_dir=str(data_dir / "unused"))
    return Path(builder.data_dir)


def encode(array, kind="PNG"):
    import io

    file = io.BytesIO()
    Image.fromarray(array).save(file, format=kind)
    return file.getvalue()


def test_a_foreign_set_is_resized_on_request_and_grey_becomes_rgb(tmp_path):
    grey = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    write_set(tmp_path, "digits", [encode(grey)] * 3, [0, 1, 2], shape=(28, 28, 1))
    with pytest.raises(UserError, match="28x28 pixels, not 32x32: add --image-size 32"):
        load("digits", data_dir=tmp_path)
    dataset = load("digits", data_dir=tmp_path, image_size=32)
    expected = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR))
    images = dataset.splits["train"].images
    assert images.shape == (3, 32, 32, 3)
    for channel in range(3):
        np.testing.assert_array_equal(images[0, :, :, channel], expected)
    assert sorted(dataset.splits["train"].labels) == [0, 1, 2]
    assert dataset.class_names == ("0", "1", "2")
    assert (dataset.name, dataset.version) == ("digits", "1.2.3")
    assert load("digits", data_dir=tmp_path, image_size=8).splits["test"].images.shape[1:3] == (
        8,
        8,
    )


def test_a_truncated_image_is_named(tmp_path):
    whole = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), "JPEG")
    directory = write_set(tmp_path, "cut", [whole, whole[:300]], [0, 1])
    with pytest.raises(UserError, match=r"image \d is truncated or no image") as caught:
        load("cut", data_dir=tmp_path)
    assert str(directory) in str(caught.value)
    assert not list(directory.glob("cifar_jax_cache/train*"))


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(mode):
    image = Image.new("RGB", (32, 32), (255, 0, 0)).convert(mode)
    import io

    file = io.BytesIO()
    image.save(file, format="TIFF")
    decoded = decode.decode_image(file.getvalue(), None)
    assert decoded.shape == (32, 32, 3)
    if mode != "1":
        assert decoded[5, 5, 0] > 250
        assert decoded[5, 5, 2] < 5


def test_16_bit_images_are_refused():
    deep = encode(np.full((32, 32), 40_000, np.uint16))
    with pytest.raises(decode.DecodeError, match="8-bit"):
        decode.decode_image(deep, None)


# --- damage


def edit_json(directory, change):
    path = directory / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def declare(split, count):
    def change(info):
        next(s for s in info["splits"] if s["name"] == split)["shardLengths"] = [str(count)]

    return change


def shard(directory, split="test"):
    return next(directory.glob(f"cifar10-{split}.array_record*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_json(d, declare("test", 12)), "fewer images than the 12 it declares"),
        (lambda d: os.truncate(shard(d), shard(d).stat().st_size // 2), "cannot read split 'test'"),
        (lambda d: os.truncate(shard(d), 0), "cannot read split 'test'"),
        (lambda d: shard(d).unlink(), "cannot read split 'test'.*No such file"),
        (lambda d: (d / "dataset_info.json").write_text("{"), "cannot read .*dataset_info.json"),
        (lambda d: (d / "features.json").write_text("{"), "cannot read the description"),
        (
            lambda d: edit_json(d, lambda info: info.update(fileFormat="tfrecord")),
            "pip install tensorflow, or use another --data-dir",
        ),
    ],
)
def test_a_damaged_set_is_one_clear_error(prepared, damage, message, monkeypatch):
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
    directory = prepared[0] / "cifar10" / "3.0.2"
    damage(directory)
    with pytest.raises(UserError, match=message) as caught:
        load(data_dir=prepared[0])
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(directory.glob("cifar_jax_cache/test*"))


def test_a_crashing_or_failing_decoder_process_is_reported(prepared):
    directory = prepared[0] / "cifar10" / "3.0.2"
    job = {"directory": str(directory), "images": "/nonexistent.npy"}
    with pytest.raises(decode.DecodeError, match="the decoding process ended with 1"):
        decode.decode_all(job, 10, processes=2)


# --- the cache


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
    with pytest.raises(UserError, match="no place for the decoded images.*XDG_CACHE_HOME"):
        load(data_dir=prepared[0])


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(prepared, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="No space left on device"):
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
    assert len(entries(tmp_path / "shapes10" / "1.0.0" / "cifar_jax_cache")) == 2


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


# --- the built-in set


def test_shapes10_is_balanced_and_never_changes():
    images, labels = shapes10.draw_split("train", 250)
    again, _ = shapes10.draw_split("train", 250)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(images[:120], shapes10.draw_split("train", 120)[0])
    assert np.bincount(labels).tolist() == [25] * 10
    assert not np.array_equal(images[:100], shapes10.draw_split("test", 100)[0])
    assert images.dtype == np.uint8
    assert images.reshape(250, -1).std(axis=1).min() > 4  # no image is blank


def test_shapes10_shapes_differ_as_drawn():
    """Without noise and clutter every class covers another part of the square."""
    grid = np.linspace(-1.2, 1.2, 96, dtype=np.float32)
    v, u = np.meshgrid(grid, grid, indexing="ij")
    covered = [distance(u, v) < 0 for distance in shapes10.SHAPES.values()]
    for i, one in enumerate(covered):
        assert 0.1 < one.mean() < 0.7
        for other in covered[:i]:
            assert (one ^ other).mean() > 0.02


def test_shapes10_can_be_learnt_but_not_by_colour():
    """Nearest class mean stays weak: the classes are shapes, not colours."""
    easy = dataclasses.replace(shapes10.HARDNESS, noise=0.0)
    images, labels = shapes10.draw(np.random.default_rng(0), 1000, easy)
    flat = images.reshape(1000, -1).astype(np.float32)
    means = np.stack([flat[:500][labels[:500] == c].mean(axis=0) for c in range(10)])
    nearest = ((flat[500:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels[500:]).mean() < 0.4


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
