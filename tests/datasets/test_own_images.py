"""Images of a user's own: folders and files of arrays become the same arrays at every call."""

import os

import numpy as np
import pytest
from PIL import Image

from cifar_jax.datasets import Dataset, load_dataset
from cifar_jax.runtime.errors import UserError

COLOURS = {"blue": (0, 0, 250), "red": (250, 0, 0)}


def fill(folder, classes=COLOURS, count=10, size=(40, 30)):
    """Writes images of one colour a class, `count` each."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, tuple(max(0, c - i) for c in colour)).save(
                folder / name / f"{i}.png"
            )
    return folder


@pytest.fixture
def cache(tmp_path):
    return {"cache_dir": tmp_path / "cache"}


def test_a_folder_of_classes_holds_out_its_test_images(tmp_path, cache, capsys):
    photos = fill(tmp_path / "photos")
    before = sorted(photos.rglob("*"))
    data = load_dataset(f"folder:{photos}", image_size=16, **cache)
    assert data.class_names == ("blue", "red")
    assert data.test_fraction == 0.2
    train, test = data.splits["train"], data.splits["test"]
    assert (train.images.shape, test.images.shape) == ((16, 16, 16, 3), (4, 16, 16, 3))
    for split in (train, test):  # each image keeps its own label
        assert (split.images[:, 0, 0].argmax(axis=1) == np.where(split.labels == 0, 2, 0)).all()
    shown = {tuple(image[0, 0]) for split in (train, test) for image in split.images}
    assert len(shown) == 20  # no image twice
    again = Dataset.from_folder(photos, image_size=16, splits=("test",), **cache)
    np.testing.assert_array_equal(again.splits["test"].images, test.images)
    assert again.splits["test"].fingerprint == test.fingerprint
    assert capsys.readouterr().err.count("decoding") == 1
    assert sorted(photos.rglob("*")) == before  # nothing is written among the images
    Image.new("RGB", (9, 9), (9, 9, 9)).save(photos / "red" / "0.png")
    other = load_dataset(f"folder:{photos}", image_size=16, **cache)
    assert other.fingerprint != data.fingerprint


def test_splits_of_its_own(tmp_path, cache):
    photos = tmp_path / "photos"
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        fill(photos / split, count=count)
    data = load_dataset(f"folder:{photos}", splits=("train", "val", "test"), **cache)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 8,
        "val": 6,
        "test": 4,
    }
    assert data.splits["train"].images.shape[1:] == (32, 32, 3)
    assert data.test_fraction == 0
    with pytest.raises(UserError, match="has a test split"):
        load_dataset(f"folder:{photos}", test_fraction=0.5, **cache)


def test_what_cannot_be_read_is_named_and_grey_becomes_three_channels(tmp_path, cache, capsys):
    photos = fill(tmp_path / "photos")
    (photos / "red" / "broken.jpg").write_bytes(b"no image")
    (photos / "red" / ".hidden").write_bytes(b"no image")
    Image.new("L", (50, 50), 77).save(photos / "red" / "grey.jpg")
    data = load_dataset(f"folder:{photos}", **cache)
    said = capsys.readouterr().err
    assert "skipped: cannot read the image" in said
    assert "broken.jpg" in said
    assert "hidden" not in said
    assert "1 of 21 images" in said
    assert sum(len(split) for split in data.splits.values()) == 21


def test_arrays_in_a_file_and_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(20) % 3
    keras = tmp_path / "keras.npz"
    np.savez(keras, x_train=images[:12], y_train=labels[:12, None], x_test=images[12:],
             y_test=labels[12:, None])  # fmt: skip
    data = load_dataset(f"npz:{keras}")
    np.testing.assert_array_equal(data.splits["test"].images, images[12:])
    np.testing.assert_array_equal(data.splits["train"].labels, labels[:12])
    assert data.class_names == ("0", "1", "2")
    same = Dataset.from_arrays(images[:12], labels[:12], images[12:], labels[12:])
    assert same.fingerprint == data.fingerprint
    one = tmp_path / "one.npz"
    np.savez(one, images=images[..., 0], labels=labels, class_names=["a", "b", "c"])
    data = load_dataset(f"npz:{one}", image_size=16)
    assert data.class_names == ("a", "b", "c")
    assert data.splits["train"].images.shape == (16, 16, 16, 3)
    assert (np.ptp(data.splits["train"].images, axis=-1) == 0).all()


def _bad_npz(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


PIXELS = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: f"folder:{at / 'none'}", "there is no"),
        (lambda at: "folder:", "say which"),
        (lambda at: f"folder:{fill(at / 'one', {'red': (250, 0, 0)})}", "a single class, red"),
        (lambda at: f"folder:{(at / 'no').mkdir() or at / 'no'}", "no classes"),
        (lambda at: f"folder:{_with_empty(at)}", "white has no images"),
        (lambda at: f"folder:{fill(at / 'p', count=1)}", "leaves an empty split"),
        (lambda at: f"folder:{_with_text(at)}", "no image of the class .*blue can be read"),
        (lambda at: f"folder:{_with_strange_test(at)}", "has a class white that"),
        (lambda at: f"npz:{_text(at)}", "cannot read"),
        (lambda at: _bad_npz(at / "a.npz", a=PIXELS), "holds a; it needs x_train"),
        (lambda at: _bad_npz(at / "a.npz", images=PIXELS / 255.0, labels=[0, 1, 0, 1]), "float64"),
        (lambda at: _bad_npz(at / "a.npz", images=PIXELS, labels=[0, 1]), "4 images and 2 labels"),
        (lambda at: _bad_npz(at / "a.npz", images=PIXELS, labels=[0, 0, 0, 0]), "a single class"),
        (lambda at: _bad_npz(at / "a.npz", images=PIXELS, labels=[0, 2, 0, 2]), "has the label 1"),
        (lambda at: _bad_npz(at / "a.npz", images=PIXELS, labels=[0, -1, 0, 1]), "start at 0"),
        (lambda at: _bad_npz(at / "a.npz", images=PIXELS[..., :2], labels=[0, 1, 0, 1]), "shape"),
        (lambda at: _bad_npz(at / "a.npz", images=PIXELS[:, :4], labels=[0, 1, 0, 1]), "4x8"),
    ],
)
def test_bad_input(tmp_path, cache, make, message):
    with pytest.raises(UserError, match=message):
        load_dataset(make(tmp_path), **cache)


def _with_empty(at):
    fill(at / "photos")
    (at / "photos" / "white").mkdir()
    return at / "photos"


def _with_text(at):
    fill(at / "photos", {"red": (250, 0, 0)})
    (at / "photos" / "blue").mkdir()
    (at / "photos" / "blue" / "a.txt").write_text("text")
    return at / "photos"


def _with_strange_test(at):
    fill(at / "photos" / "train")
    fill(at / "photos" / "test", {"white": (250, 250, 250)})
    return at / "photos"


def _text(at):
    (at / "a.npz").write_text("text")
    return os.fspath(at / "a.npz")
