"""`--patience`: a run ends after the epoch that its rows say, alone, resumed or among others."""

import json

import pytest
from tiny_data import assert_same_run, rows_of, small, tiny, words

import cifar_jax
from cifar_jax import train
from cifar_jax.datasets import load_dataset
from cifar_jax.runtime.errors import UserError

__all__ = ["small", "tiny"]

PATIENCE, EPOCHS = 2, 30
SETTINGS = {"epochs": EPOCHS, "patience": PATIENCE, "batch_size": 70, "select_best": True}
# The validation loss goes up and down at such a rate.
SETTINGS |= {"model": "small", "learning_rate": 0.03, "momentum": 0.9}


def fit(tiny, **options):
    data = load_dataset("cifar10", data_dir=tiny, progress=False)
    return cifar_jax.fit("dropout", data=data, verbose=False, conv="gemm", **SETTINGS, **options)


def ends_after(losses):
    """The epoch after which a run of these validation losses ends."""
    for epoch in range(1, len(losses) + 1):
        best = losses.index(min(losses[:epoch])) + 1
        if epoch - best >= PATIENCE:
            return epoch
    return EPOCHS


def losses_of(rows):
    return [row["validation_loss"] for row in rows if row["kind"] == "epoch"]


@pytest.fixture(scope="module")
def whole(tiny, small, tmp_path_factory):
    return fit(tiny, seed=3, workdir=tmp_path_factory.mktemp("patience") / "run")


def test_it_ends_after_epochs_without_a_lower_loss(whole):
    losses, summary = losses_of(whole.history), whole.summary
    assert PATIENCE < len(losses) < EPOCHS
    assert summary["epochs"] == len(losses) == ends_after(losses)
    assert summary["ended_early"] is True
    assert summary["steps"] == 7 * len(losses), "480 images in batches of 70"
    best = losses.index(min(losses)) + 1
    assert summary["best_epoch"] == summary["tested_epoch"] == best == len(losses) - PATIENCE


def test_stopped_after_every_epoch_it_ends_the_same(whole, tiny, tmp_path):
    parts = []
    while not parts or "stopped" in parts[-1].summary:
        assert len(parts) < EPOCHS
        ended = [lambda row: row["kind"] == "epoch"]
        parts.append(fit(tiny, seed=3, workdir=tmp_path / "cut", callbacks=ended))
    assert len(parts) >= whole.summary["epochs"]
    assert_same_run(tmp_path / "cut", whole.directory)


@pytest.mark.slow
def test_each_of_many_runs_ends_by_itself(whole, tiny, tmp_path):
    many = fit(tiny, seeds=(3, 4, 5), workdir=tmp_path / "many")
    epochs = [run.summary["epochs"] for run in many.runs]
    assert epochs[0] == whole.summary["epochs"]
    assert len(set(epochs)) > 1, "the test shows nothing where all end at once"
    for run in many.runs:
        losses = losses_of(run.history)
        assert run.summary["epochs"] == len(losses) == ends_after(losses)
        assert run.evaluate()["test_loss"] == pytest.approx(run.summary["test_loss"], rel=1e-5)
    assert losses_of(many.runs[0].history) == pytest.approx(losses_of(whole.history), rel=1e-3)
    assert [run["epochs"] for run in many.summary["runs"]] == epochs


def test_without_validation_images_it_is_refused_and_longer_than_the_run_it_does_nothing(
    tiny, small, tmp_path
):
    with pytest.raises(UserError, match="--patience needs validation images"):
        train.main(words("--recipe tutorial --patience 3"), say=id)
    options = words(
        "--recipe adam --model small --epochs 1 --batch-size 70 --patience 5 --no-plots"
    )
    said = []
    train.main([*options, "--data-dir", str(tiny), "--workdir", str(tmp_path / "a")], said.append)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert (summary["epochs"], summary["ended_early"]) == (1, False)
    assert not [line for line in said if "no lower validation loss" in line]
    assert len(rows_of(tmp_path / "a", "epoch")) == 1
