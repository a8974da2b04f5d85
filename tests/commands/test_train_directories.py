"""Run directories of the train command: their names, and when a second run goes on in one."""

import contextlib
import json

import pytest
from tiny_data import assert_same_run, rows_of, small, tiny, words

from cifar_jax import train
from cifar_jax.recipes import RECIPES
from cifar_jax.runtime.errors import UserError
from cifar_jax.training.workdir import Config

__all__ = ["small", "tiny"]

QUICK = words("--recipe adam --model small --conv gemm --devices 1 --batch-size 60 --epochs 1")

pytestmark = pytest.mark.usefixtures("small")


def run(tiny, workdir, *arguments):
    """Trains in this process, without pictures; returns (summary, lines)."""
    lines = []
    common = ["--data-dir", str(tiny), "--workdir", str(workdir), "--no-plots"]
    return train.main([*arguments, *common], say=lines.append), lines


def test_overwrite_starts_anew(tiny, tmp_path):
    workdir = tmp_path / "run"
    first, _ = run(tiny, workdir, *QUICK)
    with pytest.raises(UserError, match=r"learning_rate: 0.001 -> 0.002.*--overwrite"):
        run(tiny, workdir, *QUICK, "--learning-rate", "0.002")
    assert json.loads((workdir / "summary.json").read_text()) == first
    second, _ = run(tiny, workdir, *QUICK, "--learning-rate", "0.002", "--overwrite")
    assert second["test_loss"] != first["test_loss"]
    assert len(rows_of(workdir, "epoch")) == 1
    assert [folder.name for folder in (workdir / "checkpoints").iterdir()] == ["8"]


@contextlib.contextmanager
def stop_soon():
    """In place of `train.stop_requests`: a SIGINT after a few looks."""
    looks = iter(range(1000))
    yield lambda: 2 if next(looks) >= 1 else None


@pytest.mark.parametrize(
    "settings",
    [
        "--schedule constant",
        "--schedule step --step-epochs 1 --warmup-epochs 0.5 --select-best --ema-decay 0.9",
    ],
)
def test_more_epochs_go_on_as_one_longer_run(tiny, tmp_path, monkeypatch, settings):
    arguments, parts = [*QUICK, *words(settings)], tmp_path / "parts"
    run(tiny, tmp_path / "whole", *arguments, "--epochs", "3")
    run(tiny, parts, *arguments)  # 1 epoch, complete
    (parts / "plots").mkdir()  # of which these are pictures
    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_requests", stop_soon)
        with pytest.raises(SystemExit):
            run(tiny, parts, *arguments, *words("--epochs 5 --save-minutes 1e-6"))
    assert len(rows_of(parts, "test")) == 0
    assert not (parts / "summary.json").exists()
    assert not (parts / "plots").exists()
    _, lines = run(tiny, parts, *arguments, "--epochs", "3")  # fewer than planned, not than trained
    assert any(line.startswith("Going on from step") for line in lines)
    assert_same_run(parts, tmp_path / "whole")
    configs = [(folder / "config.json").read_bytes() for folder in (parts, tmp_path / "whole")]
    assert configs[0] == configs[1]
    with pytest.raises(UserError, match=r"of 3 epochs, .* --epochs 2: it is trained for 3 epochs"):
        run(tiny, parts, *arguments, "--epochs", "2")
    assert_same_run(parts, tmp_path / "whole")


@pytest.mark.parametrize(
    ("recipe", "changes", "others", "expected"),
    [
        ("dropout", {}, {}, "dropout-seed42"),
        ("dropout", {"epochs": 5, "dataset": "cifar10"}, {}, "dropout-seed42"),
        ("tutorial", {}, {"seeds": tuple(range(32))}, "tutorial-seeds0-31"),
        ("tutorial", {}, {"seeds": (3, 5, 9)}, "tutorial-seeds3,5,9"),
        ("tutorial", {}, {"seeds": (7,)}, "tutorial-seeds7-7"),
        ("dropout", {"learning_rate": 0.05}, {}, "dropout-learning_rate0.05-seed42"),
        (
            "tutorial",
            {"batch_size": 64, "dataset": "shapes10", "fold": False, "augment": ("flip", "cutout")},
            {"seed": 1},
            "tutorial-dataset_shapes10-augment_flip_cutout-batch_size64-no_fold-seed1",
        ),
        ("vgg16_bn", {"augment": ()}, {}, "vgg16_bn-no_augment-seed42"),
        ("adam", {}, {"init_from": {"sha256": "0123456789"}}, "adam-init_from_01234567-seed42"),
        ("adam", {"select_best": True}, {"image_size": 40}, "adam-select_best-image_size40-seed42"),
    ],
)
def test_a_directory_is_called_after_what_differs_from_the_recipe(
    recipe, changes, others, expected
):
    others = {"seed": 42, **others}
    image_size = others.pop("image_size", None)
    config = Config(recipe, RECIPES[recipe].replace(**changes), dataset={}, **others)
    assert train.default_name(config, image_size) == expected


def test_names_of_directories_are_short_safe_and_apart():
    def named(**changes):
        return train.default_name(Config("adam", RECIPES["adam"].replace(**changes), 42, {}))

    long = [named(freeze=tuple(f"layer{k}" for k in range(n))) for n in (50, 51)]
    odd = [named(dataset=name) for name in ("a/../b", "a:..:b", "ä", "ö", "a b", "x" * 300)]
    found = [*long, *odd]
    assert len(set(found)) == len(found)
    for name in found:
        assert len(name) <= train.NAME_LENGTH
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-"), name


def test_other_settings_are_trained_elsewhere(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ("", "--log-every 4", "--epochs 2"):
        train.main([*QUICK, "--data-dir", str(tiny), "--no-plots", *words(more)], say=id)
    found = {path.name: len(rows_of(path, "epoch")) for path in (tmp_path / "runs").iterdir()}
    assert found == {
        "adam-model_small-batch_size60-seed42": 2,
        "adam-model_small-batch_size60-log_every4-seed42": 1,
    }
