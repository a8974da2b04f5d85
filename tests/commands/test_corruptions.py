"""A trained network on corrupted images, and on a set that comes as .npy files."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tiny_data import NAMES, complete, copy_run, evaluated, small, test_images, tiny

from cifar_jax.datasets import corruptions
from cifar_jax.reporting import robustness
from cifar_jax.runtime.errors import UserError

__all__ = ["complete", "small", "test_images", "tiny"]

FEW = ("gaussian_noise", "contrast", "pixelate")


@pytest.fixture
def few(monkeypatch):
    """Three corruptions in place of fifteen."""
    kept = {name: corruptions.CORRUPTIONS[name] for name in FEW}
    monkeypatch.setattr(corruptions, "CORRUPTIONS", kept)


@pytest.fixture(scope="module")
def photo():
    """A smooth image of four quarters, 40 times with a little of its own."""
    rows, columns = np.mgrid[:32, :32]
    base = np.stack([4 * rows + 60, 4 * columns + 60, 90 + 60 * ((rows < 16) ^ (columns < 16))], -1)
    return (base[None] + np.random.default_rng(0).integers(0, 9, (40, 32, 32, 3))).astype(np.uint8)


@pytest.mark.parametrize("name", list(corruptions.CORRUPTIONS))
def test_a_corruption_is_repeatable_and_worse_at_the_highest_severity(name, photo):
    found = [corruptions.corrupt(photo, name, severity) for severity in (1, 5)]
    away = [np.abs(image.astype(int) - photo).mean() for image in found]
    assert all(image.shape == photo.shape and image.dtype == np.uint8 for image in found)
    # Elastic severities trade a shift of all for a finer field, which a smooth image hardly shows.
    assert 0 < away[0] < (128 if name == "elastic_transform" else away[1]) <= 128
    np.testing.assert_array_equal(corruptions.corrupt(photo, name, 5), found[1])


def test_corruptions_with_a_plain_formula(photo):
    """Of Hendrycks and Dietterich's script: brightness adds to the largest colour, contrast draws
    to the mean, JPEG is Pillow's."""
    x = photo / 255
    mean = x.mean(axis=(1, 2), keepdims=True)
    want = np.clip(mean + 0.15 * (x - mean), 0, 1) * 255
    np.testing.assert_allclose(corruptions.corrupt(photo, "contrast", 5), want, atol=1)
    value = x.max(axis=-1, keepdims=True)
    want = x * np.minimum(value + 0.1, 1) / value * 255
    np.testing.assert_allclose(corruptions.corrupt(photo, "brightness", 2), want, atol=1)
    file = io.BytesIO()
    Image.fromarray(photo[3]).save(file, "jpeg", quality=40)
    got = corruptions.corrupt(photo, "jpeg_compression", 5)[3].astype(int)
    assert np.abs(got - np.asarray(Image.open(file))).max() <= 1
    noise = corruptions.corrupt(np.full_like(photo, 128), "gaussian_noise", 5) / 255
    assert noise.std() == pytest.approx(0.10, rel=0.02)
    speckled = corruptions.corrupt(np.full_like(photo, 128), "impulse_noise", 5)
    assert (speckled != 128).mean() == pytest.approx(0.07, rel=0.1)


@pytest.mark.parametrize(("name", "severity"), [("fogg", 1), ("fog", 0), ("fog", 6)])
def test_what_is_no_corruption_is_refused(name, severity, photo):
    with pytest.raises(UserError, match=r"unknown corruption 'fogg'.*fog|must be 1 to 5"):
        corruptions.corrupt(photo, name, severity)


def test_evaluation_on_corruptions(complete, tiny, tmp_path, few, test_images):
    run = copy_run(complete, tmp_path / "run")
    found, lines = evaluated(run, tiny, "--corruptions", "--batch-size", "70")
    table = found["corruptions"]
    assert json.loads((run / "corruptions.json").read_text()) == table
    assert list(table["by_corruption"]) == list(FEW)
    assert table["clean_error"] == pytest.approx(1 - found["test_accuracy"])
    errors = [row["by_severity"] for row in table["by_corruption"].values()]
    assert table["mean_corruption_error"] == pytest.approx(np.mean(errors))
    assert table["by_severity"] == pytest.approx(np.mean(errors, axis=0).tolist())
    assert f"mean corruption error {100 * np.mean(errors):.2f} %" in "\n".join(lines)
    with Image.open(run / "corruptions.png") as picture:
        assert picture.width > 400

    # Files as CIFAR-10-C's: all severities one after another. They give the same table.
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(test_images.labels, 5))
    for name in FEW:
        parts = [corruptions.corrupt(test_images.images, name, s) for s in range(1, 6)]
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    again, _ = evaluated(run, tiny, "--corruptions", str(folder), "--json")
    assert again["corruptions"]["by_corruption"] == table["by_corruption"]
    assert again["corruptions"]["images"] == str(folder)
    (folder / "contrast.npy").unlink()
    with pytest.raises(UserError, match=r"contrast\.npy is missing"):
        evaluated(run, tiny, "--corruptions", str(folder))


def test_the_mean_is_that_of_the_corruptions_means():
    found = robustness.summarize({"fog": [0.1, 0.3], "snow": [0.5, 0.7]}, 0.05)
    assert found["mean_corruption_error"] == pytest.approx(0.4)
    assert found["by_severity"] == pytest.approx([0.3, 0.5])
    assert found["by_corruption"]["fog"]["mean"] == pytest.approx(0.2)
    assert "mean of all   30.00   50.00   40.00" in robustness.lines(found)


def test_images_in_npy_files_are_all_tested(complete, tiny, tmp_path, test_images):
    """As CIFAR-10.1 comes: unnamed classes, no training images."""
    np.save(tmp_path / "cifar10.1_v6_data.npy", test_images.images)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", test_images.labels.astype(np.int64))
    name = f"npy:{tmp_path}/cifar10.1_v6_data.npy"
    found, lines = evaluated(complete, tiny, "--dataset", name)
    want, _ = evaluated(complete, tiny)
    assert found["test_count"] == 200
    assert found["test_correct"] == want["test_correct"]
    assert found["confusion"] == want["confusion"]
    assert NAMES[0] in "\n".join(lines)
    with pytest.raises(UserError, match="labels beside it"):
        evaluated(complete, tiny, "--dataset", f"npy:{tmp_path}/cifar10.1_v6_labels.npy")
    with pytest.raises(UserError, match="no split 'train'"):
        evaluated(complete, tiny, "--dataset", name, "--split", "train")
