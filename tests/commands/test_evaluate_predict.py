"""Trained weights used: evaluate on any split and set, predict on any image file."""

import contextlib
import json
import shutil
import struct

import numpy as np
import pytest
from datasets_support import drop_test_split
from PIL import Image
from tiny_data import (
    NAMES,
    STEPS,
    complete,
    evaluated,
    prepare_tiny,
    small,
    test_images,
    tiny,
    words,
)

from cifar_jax import predict, train
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.training import evaluation

__all__ = ["complete", "small", "test_images", "tiny"]

LAST = 4 * STEPS


@pytest.fixture(scope="module")
def trained(complete):
    """A run whose best epoch is tested; nothing here writes to it."""
    return complete


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


@pytest.mark.extended
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


def test_the_validation_images_are_those_the_run_held_out(trained, tiny):
    found, lines = evaluated(trained, tiny, "--split", "validation")
    summary = json.loads((trained / "summary.json").read_text())
    assert found["test_count"] == summary["validation_images"] == 120
    assert found["test_loss"] == pytest.approx(summary["best_validation_loss"], rel=1e-5)
    assert any("Validation accuracy" in line for line in lines)


def test_a_held_out_test_split_is_recorded_said_and_used_again(small, tmp_path):
    data, workdir, lines = prepare_tiny(tmp_path / "data"), tmp_path / "run", []
    drop_test_split(data)
    arguments = ["--model", small, "--batch-size", "60", "--epochs", "1", "--no-plots"]
    where = ["--data-dir", str(data), "--workdir", str(workdir)]
    with pytest.raises(UserError, match=r"no split 'test'.*--test-fraction 0\.2"):
        train.main([*arguments, *where])
    where += ["--test-fraction", "0.25"]
    summary = train.main([*arguments, *where, "--validation-fraction", "0.2"], say=lines.append)
    assert any("360 training, 90 validation, 150 test images" in line for line in lines)
    assert any("0.25 of its training images, held out" in line for line in lines[:4])
    config = json.loads((workdir / "config.json").read_text())
    assert config["dataset"]["test_fraction"] == 0.25
    assert config["dataset"]["sizes"] == {"train": 450, "test": 150}
    found, _ = evaluated(workdir, data)
    assert found["test_count"] == 150
    assert found["per_class"] == summary["per_class"]
    assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    assert evaluated(workdir, data, "--split", "train")[0]["test_count"] == 450
    assert evaluated(workdir, data, "--split", "validation")[0]["test_count"] == 90


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
    logits = np.asarray(evaluation.load(trained).logits(test_images.images[::5]), np.float64)
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


def refused(capsys, trained, *arguments):
    """Runs predict as its command does, which ends with status 2; returns what it printed."""
    words = [str(trained), *map(str, arguments)]
    capsys.readouterr()
    assert run_command(lambda: predict.main(words)) == 2
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def test_one_bad_image_does_not_withhold_the_others(trained, test_images, tmp_path, capsys):
    for k in range(5):
        Image.fromarray(test_images.images[k]).save(tmp_path / f"{k}.jpg")
    expected = {r["image"]: r["predictions"][0]["class"] for r in predicted(trained, tmp_path)[0]}
    for k, length in ((0, 300), (2, 0), (3, 300)):
        path = tmp_path / f"{k}.jpg"
        path.write_bytes(path.read_bytes()[:length])
    for size in ("1", "2", "256"):
        out, err = refused(capsys, trained, tmp_path, "nosuch.png", "--batch-size", size)
        assert len(out) == 2
        for k, line in zip((1, 4), out, strict=True):
            path = str(tmp_path / f"{k}.jpg")
            assert line.startswith(f"{path}: {expected[path]}")
        starts = (
            "warning: no such image: nosuch.png",
            "warning: cannot read",
            "warning: cannot read",
        )
        for line, start in zip(err, (*starts, "error: cannot read"), strict=True):
            assert line.startswith(start)
        assert "3.jpg" in err[-1]
        assert "4 in all could not be read" in err[-1]
    out, err = refused(capsys, trained, tmp_path / "0.jpg", tmp_path / "1.jpg")
    assert (len(out), len(err)) == (1, 1)
    assert err[0].startswith(f"error: cannot read the image {tmp_path / '0.jpg'}")


def test_hidden_files_links_and_brackets(test_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "a/1.png",
        "a/._1.png",
        "a/.thumbs/2.png",
        "far/deep/3.png",
        ".hid/4.png",
        "b/5.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test_images.images[0]).save(path)
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "a" / "far").symlink_to("../far")
    (tmp_path / "a" / "again").symlink_to("../far")
    (tmp_path / "far" / "loop").symlink_to("../a")
    (tmp_path / "a" / "self").symlink_to(".")
    for name in ("my[1]", "my1"):
        shutil.copytree(tmp_path / "b", tmp_path / name)

    def found(*names):
        paths, bad = predict.find_images(names)
        assert not bad
        return [str(path) for path in paths]

    assert found("a") == ["a/1.png", "a/again/deep/3.png"]
    assert found("far") == ["far/deep/3.png", "far/loop/1.png"]
    assert found("a/*.png") == ["a/1.png"]
    assert found("a/**/*.png") == ["a/1.png", "a/again/deep/3.png"]
    assert found("a/._1.png", ".hid") == ["a/._1.png", ".hid/4.png"]
    assert found("my[1]/*.png") == found(f"{'my[1]'}/5.png") == ["my[1]/5.png"]
    assert found("my[12]/*.png") == ["my1/5.png"]
    assert found(f"{tmp_path}/my[1]/[5].png") == [f"{tmp_path}/my[1]/5.png"]
    assert predict.find_images(["a/.thumbs", "none*"])[1] == ["no such image: none*"]


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
    for ending in ("png", "tif", "pgm"):
        path = tmp_path / f"image.{ending}"
        Image.fromarray(values).save(path)
        np.testing.assert_array_equal(read(path), np.repeat(values[..., None] // 256, 3, axis=2))
    for kind in (np.float32, np.int32):
        for scale in (1, 1 / 256):
            Image.fromarray((values * scale).astype(kind)).save(tmp_path / "wide.tif")
            with pytest.raises(UserError, match=r"wide\.tif.*no known range"):
                read(tmp_path / "wide.tif")


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


SIX = (0x0112, 3, 1, b"\x06\0\0\0")  # tag, type, count, value: orientation 6


def exif(*entries, rest=b""):
    """A little-endian EXIF block."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + rest


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (exif(SIX), True),
        (exif(SIX, (0x011A, 2, 4, b"abcd")), True),  # a resolution that is text
        (exif(SIX, (0x011A, 5, 1, struct.pack("<I", 38)), rest=bytes(8)), True),  # 0 / 0
        (exif(SIX, (0x011A, 5, 1, struct.pack("<I", 99_999))), True),  # beyond the end
        (exif(SIX, (0x8825, 4, 1, struct.pack("<I", 99_999))), True),  # its GPS block too
        (exif(SIX, (0x011A, 5, 1, bytes(4)))[:24], True),
        (exif(SIX)[:14], False),
        (b"junk", False),
        (b"", False),
        (exif((0x0112, 3, 1, b"\x63\0\0\0")), False),
    ],
    ids=words("good text zero beyond gps cut-late cut-early junk empty unknown"),
)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_broken_exif_does_not_withhold_pixels_and_orientation(block, turned, ending, tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = RED
    options = {"quality": 100, "subsampling": 0} if ending == "jpg" else {"lossless": True}
    block = b"Exif\0\0" + block if ending == "jpg" else block
    Image.fromarray(pixels).save(tmp_path / f"image.{ending}", exif=block, **options)
    found = read(tmp_path / f"image.{ending}").astype(int)
    expected = np.rot90(pixels, -1) if turned else pixels
    assert abs(found - expected).max() <= 4


def test_a_broken_colour_profile_does_not_withhold_pixels(tmp_path):
    for ending in ("jpg", "png", "webp", "tif"):
        path = tmp_path / f"image.{ending}"
        Image.new("RGB", (32, 32), RED).save(path, icc_profile=b"broken" * 40)
        assert abs(read(path).astype(int) - RED).max() <= 8


def test_orientation_beside_broken_metadata(tmp_path):
    path, pixels = tmp_path / "image.png", np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = RED
    Image.fromarray(pixels).save(path, exif=exif(SIX))
    good = path.read_bytes()
    path.write_bytes(good[:33] + b"\0\0\0\3tEXta\0b\0\0\0\0" + good[33:])  # a wrong checksum
    np.testing.assert_array_equal(read(path), np.rot90(pixels, -1))


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
    best = evaluation.load(trained).step
    folder = tmp_path / "run" / "checkpoints" / str(best)
    (largest,) = sorted(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())[-1:]
    largest.write_bytes(largest.read_bytes()[:-9])
    found, lines = evaluated(tmp_path / "run", tiny)
    assert found["step"] != best
    assert f"warning: checkpoint {best}" in lines[0]
