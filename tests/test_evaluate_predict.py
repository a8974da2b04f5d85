"""Trained weights used: evaluate on any split and set, predict on any image file."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_data import NAMES, STEPS, complete, prepare_tiny, tiny

from cifar_jax import evaluate, inference, predict
from cifar_jax.datasets import load_dataset
from cifar_jax.errors import UserError

__all__ = ["complete", "tiny"]

LAST = 4 * STEPS


@pytest.fixture(scope="module")
def trained(complete):
    """A run whose best epoch is tested; nothing here writes to it."""
    return complete


@pytest.fixture(scope="module")
def test_images(tiny):
    return load_dataset("cifar10", data_dir=tiny, progress=False).splits["test"]


def evaluated(trained, tiny, *arguments):
    lines = []
    found = evaluate.main([str(trained), "--data-dir", str(tiny), *arguments], say=lines.append)
    return found, lines


def predicted(trained, *arguments):
    lines = []
    words = [str(argument) for argument in arguments]
    return predict.main([str(trained), *words], say=lines.append), lines


# Evaluate


@pytest.mark.parametrize("size", [1, 7, 200, 5000])
def test_the_batch_size_changes_nothing(trained, tiny, size):
    found, _ = evaluated(trained, tiny, "--batch-size", str(size))
    summary = json.loads((trained / "summary.json").read_text())
    assert found["test_count"] == 200
    for name in ("test_correct", "per_class", "confusion"):
        assert found[name] == summary[name]
    assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


def test_what_it_says(trained, tiny):
    found, lines = evaluated(trained, tiny)
    said = "\n".join(lines)
    assert f"tutorial_cnn after step {found['step']}" in said
    assert "Test loss" in said
    assert f"({found['test_correct']}/200)" in said
    assert all(name in said for name in NAMES)
    again, lines = evaluated(trained, tiny, "--json")
    assert json.loads("\n".join(lines)) == again == found


def test_other_splits_checkpoints_and_sets(trained, tiny, tmp_path):
    test, _ = evaluated(trained, tiny)
    found, lines = evaluated(trained, tiny, "--split", "train")
    assert found["test_count"] == sum(c["count"] for c in found["per_class"]) == 600
    assert any("Train accuracy" in line for line in lines)
    latest, _ = evaluated(trained, tiny, "--checkpoint", "latest")
    assert latest["step"] == LAST
    by_step, _ = evaluated(trained / "checkpoints" / str(LAST), tiny)
    assert by_step["test_loss"] == latest["test_loss"]
    assert evaluated(trained / "checkpoints", tiny)[0]["test_loss"] == test["test_loss"]
    other = prepare_tiny(tmp_path / "other", seed=1)
    found, _ = evaluated(trained, other)
    assert found["test_count"] == 200
    assert found["test_loss"] != test["test_loss"]


def test_another_set_must_have_the_same_classes(trained, tmp_path, monkeypatch):
    from cifar_jax.datasets import shapes10

    monkeypatch.setattr(shapes10, "COUNTS", {"train": 20, "test": 20})
    with pytest.raises(UserError, match=r"trained on the classes airplane.*the data set has"):
        evaluated(trained, tmp_path / "data", "--dataset", "shapes10")


# Predict


def test_test_images_as_files_give_evaluates_predictions(trained, tiny, test_images, tmp_path):
    chosen = range(0, 200, 5)
    for k in chosen:
        Image.fromarray(test_images.images[k]).save(tmp_path / f"{k:03d}.png")
    results, lines = predicted(trained, tmp_path, "--top-k", "10")
    logits = np.asarray(inference.load(trained).logits(test_images.images[::5]), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert [r["image"] for r in results] == [str(tmp_path / f"{k:03d}.png") for k in chosen]
    for result, share, line in zip(results, shares, lines, strict=True):
        assert [c["class"] for c in result["predictions"]] == [NAMES[k] for k in np.argsort(-share)]
        got = [c["probability"] for c in result["predictions"]]
        np.testing.assert_allclose(got, np.sort(share)[::-1], rtol=1e-4, atol=1e-6)
        assert sum(got) == pytest.approx(1)
        assert line.startswith(result["image"])
    correct = [
        r["predictions"][0]["class"] == NAMES[test_images.labels[k]]
        for r, k in zip(results, chosen, strict=True)
    ]
    assert np.mean(correct) > 0.3


def test_several_in_batches_are_as_one_by_one(trained, test_images, tmp_path):
    for k in range(5):
        Image.fromarray(test_images.images[k]).save(tmp_path / f"{k}.png")
    together, _ = predicted(trained, tmp_path)
    batches, _ = predicted(trained, tmp_path, "--batch-size", "2")
    single = [predicted(trained, tmp_path / f"{k}.png")[0][0] for k in range(5)]
    for other in (batches, single):
        assert [r["image"] for r in other] == [r["image"] for r in together]
        for a, b in zip(other, together, strict=True):
            for x, y in zip(a["predictions"], b["predictions"], strict=True):
                assert x["class"] == y["class"]
                assert x["probability"] == pytest.approx(y["probability"], rel=1e-4)


def test_folders_globs_and_json(trained, test_images, tmp_path, monkeypatch):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    image = Image.fromarray(test_images.images[0])
    image.save(tmp_path / "a" / "one.PNG")
    image.save(inner / "two[1].jpg")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "paper.pdf").write_bytes(b"%PDF-1.4")
    monkeypatch.chdir(tmp_path)
    results, lines = predicted(trained, "a", "--json", "--top-k", "2")
    assert [json.loads(line) for line in lines] == results
    assert [r["image"] for r in results] == ["a/b/two[1].jpg", "a/one.PNG"]
    assert [len(r["predictions"]) for r in results] == [2, 2]
    results, _ = predicted(trained, "a/*.PNG", "a/**/two*.jpg", "a/b/two[1].jpg")
    names = ["a/one.PNG", "a/b/two[1].jpg", "a/b/two[1].jpg"]
    assert [r["image"] for r in results] == names
    assert predicted(trained, "a/one.PNG", "--top-k", "99")[0][0]["predictions"][9]


def read(path):
    return predict.read_image(path, 32, 32)


RED = (200, 30, 40)


@pytest.mark.parametrize(
    ("mode", "ending", "expected"),
    [
        ("RGB", "png", RED),
        ("RGB", "bmp", RED),
        ("RGB", "webp", RED),
        ("RGB", "gif", RED),
        ("RGBA", "png", RED),
        ("CMYK", "jpg", RED),
        ("CMYK", "tif", RED),
        ("L", "png", (82, 82, 82)),
        ("L", "jpg", (82, 82, 82)),
        ("LA", "png", (82, 82, 82)),
        ("1", "png", None),
        ("YCbCr", "jpg", RED),
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (400, 3), (100, 64)])
def test_modes_formats_and_sizes(mode, ending, expected, size, tmp_path):
    path = tmp_path / f"image.{ending}"
    Image.new("RGB", size, RED).convert(mode).save(path)
    found = read(path)
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    if expected is not None:
        assert abs(found.reshape(-1, 3).astype(int) - expected).max() <= 8


@pytest.mark.parametrize("how", ["RGBA", "LA", "palette", "grey key", "colour key"])
def test_transparent_parts_become_white(how, tmp_path):
    path = tmp_path / "image.png"
    if how in ("RGBA", "LA"):
        image = Image.new("RGBA", (32, 32), (*RED, 0))
        image.paste((*RED, 255), (0, 0, 16, 32))
        image.convert(how).save(path)
    elif how == "palette":
        image = Image.new("P", (32, 32), 0)
        image.putpalette([*RED, 1, 2, 3])
        image.paste(1, (16, 0, 32, 32))
        image.save(path, transparency=1)
    else:
        mode, key = ("L", 7) if how == "grey key" else ("RGB", (7, 8, 9))
        image = Image.new("RGB", (32, 32), RED).convert(mode)
        image.paste(key, (16, 0, 32, 32))
        image.save(path, transparency=key)
    found = read(path)
    assert (found[:, 16:] == 255).all()
    assert (found[:, :16] < 255).any()


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    for ending in ("png", "tif"):
        path = tmp_path / f"image.{ending}"
        Image.fromarray(values).save(path)
        np.testing.assert_array_equal(read(path), np.repeat(values[..., None] // 256, 3, axis=2))
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif.*no known range"):
        read(tmp_path / "float.tif")


def test_a_large_image_brings_no_warning(tmp_path, monkeypatch):
    save = Image.new("RGB", (40, 40), RED).save
    save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns from here, to the double
    assert (read(tmp_path / "large.png") == RED).all()


def test_the_cameras_orientation_is_applied(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = RED  # the upper half
    image = Image.fromarray(pixels)
    for orientation, turned in ((1, pixels), (3, pixels[::-1, ::-1]), (6, np.rot90(pixels, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "image.png", exif=exif)
        np.testing.assert_array_equal(read(tmp_path / "image.png"), turned)


def test_the_middle_square_is_taken(tmp_path):
    pixels = np.zeros((30, 4000, 3), np.uint8)
    pixels[:, 1985:2015] = RED
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (read(tmp_path / "wide.png")[:, 2:-2] == RED).all()


def test_damaged_files_bring_one_line(test_images, tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(test_images.images[0]).resize((64, 64))
    read_anyway = 0
    for ending in ("png", "jpg", "gif", "webp", "tif", "bmp"):
        path = tmp_path / f"image.{ending}"
        image.save(path)
        good = path.read_bytes()
        for _ in range(15):
            data = bytearray(good[: rng.integers(1, len(good))])
            data[rng.integers(len(data))] ^= 255
            path.write_bytes(data)
            with contextlib.suppress(UserError):
                read_anyway += read(path).shape == (32, 32, 3)
    assert read_anyway < 30


def test_a_damaged_best_checkpoint_is_said(trained, tiny, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    best = inference.load(trained).step
    folder = tmp_path / "run" / "checkpoints" / str(best)
    (largest,) = sorted(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())[-1:]
    largest.write_bytes(largest.read_bytes()[:-9])
    found, lines = evaluated(tmp_path / "run", tiny)
    assert found["step"] != best
    assert f"warning: checkpoint {best}" in lines[0]
