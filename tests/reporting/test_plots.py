"""Pictures are read back: size, colours where they must be, and odd inputs."""

import math

import matplotlib
import numpy as np
import pytest
from PIL import Image
from tiny_data import python

from cifar_jax.reporting import confusion, plots
from cifar_jax.runtime.errors import UserError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def images():
    # Grey, so that any colour in a picture comes from its text.
    grey = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 1), np.uint8)
    return np.repeat(grey, 3, axis=-1)


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def count(picture, color):
    """Returns how many pixels have exactly this colour."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((picture == rgb).all(axis=-1).sum())


def test_predictions_are_green_when_right_and_red_when_wrong(images, tmp_path):
    labels = np.arange(24) % 10
    right = pixels(plots.predictions(images, labels, labels, NAMES, tmp_path / "right.png"))
    wrong = pixels(plots.predictions(images, labels, 9 - labels, NAMES, tmp_path / "wrong.png"))
    assert count(right, plots.GREEN) > 100
    assert count(right, plots.RED) == 0
    assert count(wrong, plots.RED) > 100
    assert count(wrong, plots.GREEN) == 0


@pytest.mark.parametrize("number", [1, 3, 12, 24])
def test_grid_holds_the_images_themselves(images, tmp_path, number):
    path = plots.training_grid(images[:number], np.arange(number) % 10, NAMES, tmp_path / "a.png")
    picture = pixels(path)
    height, width = picture.shape[:2]
    assert (width > 3 * height) == (number > 3)
    # The grid shows at most 20 images; they cover most of it, with every grey level there is.
    grey = (picture.max(axis=-1) == picture.min(axis=-1)) & (picture[..., 0] < 250)
    area = grey.sum() / min(number, 20)
    assert 100**2 < area < 170**2
    assert path.stat().st_size < 500_000


def test_mistakes_are_the_surest_ones_in_order(images, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots, "grid", lambda images, titles, *rest: drawn.update(images=images, titles=titles)
    )
    true = np.zeros(24, int)
    predicted = np.where(np.arange(24) < 12, 1, 0)
    probabilities = np.full((24, 10), 0.01)
    probabilities[np.arange(24), predicted] = np.linspace(0.3, 0.9999, 24)
    probabilities[3, 1] = 0.9996
    plots.mistakes(images, true, predicted, probabilities, NAMES, tmp_path / "m.png")
    assert len(drawn["titles"]) == 12
    # Never rounded up to 100.
    assert drawn["titles"][0] == "#3\nautomobile 99.9 %\n(airplane 1.0 %)"
    np.testing.assert_array_equal(drawn["images"][0], images[3])
    np.testing.assert_array_equal(drawn["images"][1], images[11])


def test_no_mistakes_and_no_images(images, tmp_path):
    labels = np.zeros(24, int)
    path = plots.mistakes(images, labels, labels, np.eye(10)[labels], NAMES, tmp_path / "none.png")
    assert (pixels(path) < 100).any()  # a sentence stands there
    with pytest.raises(UserError, match="no images"):
        plots.training_grid(images[:0], labels[:0], NAMES, tmp_path / "empty.png")


def test_channels_write_every_value_of_the_middle_in_readable_ink(tmp_path):
    ramp = np.linspace(-1, 1, 32 * 32 * 3).reshape(32, 32, 3)
    picture = pixels(plots.channels(ramp.astype(np.float32), tmp_path / "channels.png"))
    assert (picture[:10] == 255).all()  # the margin is white
    assert picture.shape[1] < 1600, "shown pixel for pixel on a usual screen"
    top, left, cell, first = 80, 20, 36, 9
    shown = ramp[first : first + 14, first : first + 14]
    low, high = shown.min(), shown.max()
    for row in (0, 13):
        for column in (0, 6, 13):
            y, x = top + row * cell, left + column * cell
            patch = picture[y + 2 : y + cell - 2, x + 1 : x + cell - 1, 0]
            shade = 255 * (shown[row, column, 0] - low) / (high - low)
            assert abs(patch[0, 0] - shade) <= 5
            ink = 0 if shade > 127 else 255
            assert (abs(patch - ink) < 40).sum() > 15


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_channels_of_one_even_image(tmp_path, value):
    plots.channels(np.full((4, 6, 3), value, np.float32), tmp_path / "even.png")


def epoch_row(epoch, loss, accuracy=0.5):
    return {
        "kind": "epoch", "epoch": epoch, "step": 100 * epoch, "train_loss": 2.0 / epoch,
        "train_accuracy": 0.4, "validation_loss": loss, "validation_accuracy": accuracy,
    }  # fmt: skip


def test_curves_mark_the_best_epoch_and_survive_gaps(tmp_path):
    rows = [epoch_row(1, 2.0), epoch_row(2, None, None), epoch_row(3, 1.0), epoch_row(4, 1.5)]
    rows.insert(0, {"kind": "window", "epoch": 1, "step": 50, "loss": 2.2})
    rows.append({"kind": "test", "test_loss": 1.0})
    picture = pixels(plots.curves(rows, tmp_path / "curves.png", heading="dropout"))
    assert count(picture, plots.BLUE) > 200
    assert count(picture, plots.ORANGE) > 100


def test_curves_without_validation_have_no_validation_line(tmp_path):
    rows = [{"kind": "epoch", "epoch": 1, "step": 5, "train_loss": 1.0, "train_accuracy": 0.3}]
    picture = pixels(plots.curves(rows, tmp_path / "curves.png"))
    assert count(picture, plots.ORANGE) == 0
    assert count(picture, plots.BLUE) > 20
    with pytest.raises(UserError, match="no epoch"):
        plots.curves([], tmp_path / "none.png")


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_matrix_is_dark_on_the_diagonal(tmp_path, classes):
    counts = np.eye(classes, dtype=np.int64) * 50
    counts[0] = 0  # a class without images
    names = [f"a class with quite a long name, number {k}" for k in range(classes)]
    picture = pixels(confusion.confusion_matrix(counts, names, tmp_path / "confusion.png"))
    dark = (picture == picture[picture.sum(axis=-1) > 0][0]).all(axis=-1)
    assert dark.size > 10_000
    blue = [int(plots.BLUE[i : i + 2], 16) for i in (1, 3, 5)]
    full = (np.abs(picture - blue) < 12).all(axis=-1)
    ys, xs = np.nonzero(full[:, : int((0.6 if classes < 100 else 0.8) * full.shape[1])])
    assert np.corrcoef(ys, xs)[0, 1] > 0.95 or classes == 2
    assert math.prod(full.shape) < 10_000_000


def test_the_most_frequent_mistake_has_the_full_colour_however_rare_it_is(tmp_path):
    counts = np.eye(4, dtype=np.int64) * 990 + 1
    counts[2, 1] = 8
    picture = pixels(confusion.confusion_matrix(counts, list("abcd"), tmp_path / "confusion.png"))
    orange = [int(plots.ORANGE[i : i + 2], 16) for i in (1, 3, 5)]
    full = (np.abs(picture - orange) < 6).all(axis=-1)[:, : int(0.5 * picture.shape[1])]
    ys, xs = np.nonzero(full)
    assert len(ys) > 1000
    assert np.ptp(ys) < 70 > np.ptp(xs), "one cell"


def test_odd_class_names_and_a_users_own_style(images, tmp_path):
    names = ["price in $ and $", "고양이", "a_b^c", "\u2013"]
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30.0, "axes.titlecolor": "red"}):
        path = plots.training_grid(images[:4], np.arange(4), names, tmp_path / "odd.png")
    plain = plots.training_grid(images[:4], np.arange(4), names, tmp_path / "plain.png")
    np.testing.assert_array_equal(pixels(path), pixels(plain))
    assert dict(matplotlib.rcParams) == before


PICTURE = """
import os, sys
import numpy as np
from cifar_jax.reporting import confusion, plots
plots.channels(np.zeros((2, 2, 3), np.float32), sys.argv[1])
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.rcParams["backend"] == os.environ["MPLBACKEND"])
"""


@pytest.mark.parametrize(("backend", "known"), [("nosuch", False), ("svg", True)])
def test_the_users_backend_is_neither_needed_nor_lost(tmp_path, monkeypatch, backend, known):
    monkeypatch.setenv("MPLBACKEND", backend)
    assert python(PICTURE, tmp_path / "a.png").split() == [backend, str(known)]
    assert pixels(tmp_path / "a.png").size


def test_pictures_that_fail_cost_a_line_for_each_reason(tmp_path):
    def fail(path):
        raise ValueError("odd\nvalue")

    def full(path):
        plots.save(Image.new("L", (9, 9)), "/dev/full")

    said = []
    pictures = {
        tmp_path / "a": full,
        tmp_path / "b": fail,
        tmp_path / "c": str,
        tmp_path / "d": full,
    }
    assert plots.attempt(pictures, said.append) == [str(tmp_path / "c")]
    assert said == [
        f"warning: not drawn: {tmp_path}/a, {tmp_path}/d: No space left on device",
        f"warning: not drawn: {tmp_path}/b: odd value",
    ]


def test_a_picture_that_cannot_be_written_is_one_clear_line(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the picture"):
        plots.training_grid(images, np.zeros(24, int), NAMES, tmp_path / "file" / "a.png")
