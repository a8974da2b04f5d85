"""Whole runs through the train command: what they print, write and compute."""

import concurrent.futures
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from logger_support import Remembered, stand_in
from PIL import Image
from quick import jit
from tiny_data import (
    NAMES,
    RICH,
    RICH_SMALL,
    SIZES,
    STEPS,
    assert_same_run,
    complete,
    rows_of,
    small,
    states_of,
    tiny,
    words,
)

from cifar_jax import input_pipeline, make_model, make_optimizer, steps, train
from cifar_jax.datasets import load_dataset, shapes10
from cifar_jax.parallel import placement, programs
from cifar_jax.reporting import metrics_log, plots
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import evaluation
from cifar_jax.training.workdir import read_config

__all__ = ["complete", "small", "tiny"]


def run(tiny, workdir, *arguments):
    """Trains in this process, without pictures; returns (summary, lines)."""
    lines = []
    common = ["--data-dir", str(tiny), "--workdir", str(workdir), "--no-plots"]
    return train.main([*arguments, *common], say=lines.append), lines


QUICK = words("--recipe adam --model small --conv gemm --devices 1 --batch-size 60 --epochs 1")

pytestmark = pytest.mark.usefixtures("small")


def test_what_a_run_says(complete):
    said = (complete.parent / "said.txt").read_text()
    order = [
        "Device     cpu",
        "Data set   cifar10 3.0.2 from",
        "480 training, 120 validation, 200 test images, seed 42",
        "float32",
        "conv1",
        "62,006",
        "train loss accuracy valid. loss accuracy  seconds",
        "epoch 1  step  8/35",
        "epoch 1/4 ",
        "epoch 4/4 ",
        "GroundTruth: airplane automobile bird cat",
        "Predicted:   ",
        "Test loss",
        "Test accuracy",
        "/200)",
        *NAMES,
        "compile",
        "Written to",
    ]
    at = 0
    for text in order:
        found = said.find(text, at)
        assert found >= 0, (text, said[at:])
        at = found


def test_the_summary_has_what_readers_need(complete):
    summary = json.loads((complete / "summary.json").read_text())
    assert summary["recipe_name"] == "adam"
    assert summary["recipe"]["learning_rate"] == 0.003
    assert summary["recipe"]["augment"] == ["flip", "translate"]
    assert summary["dataset"]["name"] == "cifar10"
    assert len(summary["dataset"]["fingerprint"]) == 64
    assert (summary["seed"], summary["precision"], summary["parameters"]) == (42, "float32", 62006)
    assert summary["device"]["platform"] == "cpu"
    assert summary["versions"]["jax"] == jax.__version__
    assert (summary["training_images"], summary["validation_images"]) == (480, 120)
    assert summary["test_count"] == SIZES["test"]
    assert summary["images_per_second"] > 0
    assert {"compile", "data", "training", "validation", "test"} <= summary["seconds"].keys()
    assert all(value >= 0 for value in summary["seconds"].values())
    # Learned, and counted exactly.
    assert summary["test_accuracy"] == summary["test_correct"] / 200 > 0.5
    assert [c["class"] for c in summary["per_class"]] == NAMES
    assert [c["count"] for c in summary["per_class"]] == [20] * 10
    assert sum(c["correct"] for c in summary["per_class"]) == summary["test_correct"]


def test_rows_of_a_run(complete):
    windows, epochs, tests = (rows_of(complete, kind) for kind in ("window", "epoch", "test"))
    assert len(rows_of(complete)) == len(windows) + len(epochs) + len(tests)
    ends = [(e - 1) * STEPS + s for e in range(1, 5) for s in range(8, STEPS + 1, 8)]
    assert [row["step"] for row in windows] == ends
    assert [row["step"] for row in epochs] == [STEPS * e for e in range(1, 5)]
    assert epochs[-1]["train_loss"] < 0.6 * epochs[0]["train_loss"]
    for row in epochs:
        for name, size in (("train", 480), ("validation", 120)):
            correct = row[f"{name}_accuracy"] * size
            assert abs(correct - round(correct)) < 1e-9, "every image is counted once"
    assert [row["learning_rate"] for row in epochs[:2]] == [
        pytest.approx(0.003 * 34 / 35),
        pytest.approx(0.003 * (1 + math.cos(math.pi * 34 / 105)) / 2),
    ]
    assert len(tests) == 1
    assert tests[0]["test_count"] == 200


def test_windows_and_epochs_are_the_means_of_a_loop_of_ones_own(complete, tiny):
    """The first two epochs again, a step at a time, from the public functions alone."""
    config = read_config(complete)
    recipe, keys = config.recipe, input_pipeline.run_keys(config.seed)
    data = load_dataset("cifar10", data_dir=tiny, progress=False).splits["train"]
    training, _ = input_pipeline.split_indices(keys["split"], len(data), recipe.validation_fraction)
    model = make_model(recipe.model, 10, lowering="lax")
    optimizer = make_optimizer(recipe, STEPS)
    create = functools.partial(steps.create_state, model, optimizer, image_shape=(32, 32, 3))
    state = jit(functools.partial(create, ema=True))(keys["state"])
    step = jax.jit(
        functools.partial(
            steps.train_step,
            model=model,
            optimizer=optimizer,
            preprocess=steps.make_preprocess(recipe.normalize, recipe.augment),
            ema_decay=recipe.ema_decay,
        )
    )
    rows = rows_of(complete)
    for epoch in (1, 2):
        sums = []
        for positions in input_pipeline.epoch_order(
            keys["order"], epoch, training, recipe.batch_size
        ):
            real = positions >= 0
            chosen = np.where(real, positions, 0)
            batch = {"image": data.images[chosen], "label": data.labels[chosen]}
            state, metrics = step(state, batch | {"mask": real.astype(np.float32)})
            sums.append([float(metrics[name]) for name in ("loss", "correct", "count")])
        loss, correct, count = np.array(sums).T
        assert count.tolist() == [14] * 34 + [4]
        windows = [r["loss"] for r in rows if r["kind"] == "window" and r["epoch"] == epoch]
        expected = (loss / count)[:32].reshape(4, 8).mean(axis=1)
        np.testing.assert_allclose(windows, expected, rtol=2e-4)
        (row,) = [r for r in rows if r["kind"] == "epoch" and r["epoch"] == epoch]
        assert row["train_loss"] == pytest.approx(loss.sum() / 480, rel=2e-4)
        assert row["train_accuracy"] == pytest.approx(correct.sum() / 480, abs=2.1 / 480)


def test_the_best_epoch_is_tested(complete, tiny):
    epochs = rows_of(complete, "epoch")
    summary = json.loads((complete / "summary.json").read_text())
    best = min(epochs, key=lambda row: row["validation_loss"])
    assert summary["best_epoch"] == summary["tested_epoch"] == best["epoch"]
    assert summary["best_validation_loss"] == best["validation_loss"]
    trained = evaluation.load(complete)
    assert trained.step == best["step"]
    test = load_dataset("cifar10", data_dir=tiny, progress=False).splits["test"]
    logits = np.asarray(trained.logits(test.images), np.float64)
    assert (logits.argmax(1) == test.labels).sum() == summary["test_correct"]
    shifted = logits - logits.max(1, keepdims=True)
    chosen = shifted[np.arange(200), test.labels] - np.log(np.exp(shifted).sum(1))
    assert summary["test_loss"] == pytest.approx(-chosen.mean(), rel=1e-4)


def test_an_earlier_best_is_tested_and_the_last_where_the_recipe_keeps_it(tiny, tmp_path):
    # A rate that ruins the weights at once makes the first epoch the best.
    worse = words("--optimizer sgd --learning-rate 8 --schedule constant --epochs 2 --clip-norm 1")
    first, _ = run(tiny, tmp_path / "a", *QUICK, *worse, "--select-best")
    last, _ = run(tiny, tmp_path / "b", *QUICK, *worse)
    rows = rows_of(tmp_path / "a", "epoch")
    assert rows == rows_of(tmp_path / "b", "epoch")
    best = min(rows, key=lambda row: row["validation_loss"])["epoch"]
    assert (first["tested_epoch"], last["tested_epoch"]) == (best, 2)
    assert (first["test_loss"] == last["test_loss"]) == (best == 2)


def test_pictures_are_pictures(complete):
    names = words("training_batch channels curves confusion_matrix predictions mistakes")
    assert sorted(p.name for p in (complete / "plots").iterdir()) == sorted(
        f"{name}.png" for name in names
    )
    for name in names:
        with Image.open(complete / "plots" / f"{name}.png") as image:
            assert image.format == "PNG"
            image.load()
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 5, "not blank"


def test_curves_hold_the_windows(complete, tmp_path):
    drawn = (complete / "plots" / "curves.png").read_bytes()
    for name, kind, same in (("all", None, True), ("epochs", "epoch", False)):
        path = tmp_path / f"{name}.png"
        found = json.loads((complete / "summary.json").read_text())["test_accuracy"]
        heading = f"adam on cifar10, seed 42: {100 * found:.2f} % of the test right"
        note = "Training is measured with augmentation, validation without: it may look worse."
        plots.curves(rows_of(complete, kind), path, heading=heading, note=note)
        assert (path.read_bytes() == drawn) == same


class Seen:
    """A model that gives back the images it got."""

    def __call__(self, images, train):
        raise AssertionError("steps go through apply")

    def apply(self, variables, images, **_):
        logits = jnp.broadcast_to(variables["params"]["w"], (len(images), 10))
        return logits, {"batch_stats": {"images": images}}


def test_the_first_batch_is_drawn_as_the_first_step_got_it(complete, tiny, tmp_path):
    config = read_config(complete)
    recipe = config.recipe
    (key,) = (x for name, x in states_of(complete).items() if name.endswith("latest['state'].key"))
    data = load_dataset("cifar10", data_dir=tiny, progress=False).splits["train"]
    keys = input_pipeline.run_keys(config.seed)
    training, _ = input_pipeline.split_indices(keys["split"], len(data), recipe.validation_fraction)
    first = input_pipeline.epoch_order(keys["order"], 1, training, recipe.batch_size)[0]
    state = steps.TrainState(
        step=jnp.int32(0),
        params={"w": jnp.zeros(10)},
        batch_stats={},
        opt_state=(),
        key=jax.random.wrap_key_data(key),
    )
    batch = {"image": data.images[first], "label": data.labels[first]}
    preprocess = steps.make_preprocess(recipe.normalize, recipe.augment)
    state, _ = jit(
        functools.partial(
            steps.train_step, model=Seen(), optimizer=optax.identity(), preprocess=preprocess
        )
    )(state, batch)
    images = np.asarray(state.batch_stats["images"])
    shown = np.rint(255 * (images + 1) / 2).astype(np.uint8)  # the recipe's normalisation is `half`
    assert (shown != data.images[first]).any(), "augmented"
    heading = "The first training batch, as the network saw it"
    path = plots.training_grid(shown, batch["label"], NAMES, tmp_path / "a.png", heading=heading)
    assert path.read_bytes() == (complete / "plots" / "training_batch.png").read_bytes()


def test_pictures_and_events_that_fail_cost_a_warning(tiny, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("cannot write it")

    monkeypatch.setattr(metrics_log.TensorBoardLog, "append", fail)
    for name in words("curves mistakes"):
        monkeypatch.setattr(plots, name, fail)
    lines = []
    common = ["--data-dir", str(tiny), "--workdir", str(tmp_path / "run")]
    run = Remembered()
    stand_in(monkeypatch, "wandb", init=lambda **given: run)
    given = [*QUICK, *common, "--tensorboard", "--log", "wandb"]
    summary = train.main(given, say=lines.append)
    told = [(name, value, step) for numbers, step in run.rows for name, value in numbers.items()]
    assert ("test/test_accuracy", summary["test_accuracy"], summary["steps"]) in told
    assert "epoch/train_loss" in {name for name, _, _ in told}
    assert run.ended
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(list((tmp_path / "run" / "plots").iterdir())) == 4
    events, pictures = (line for line in lines if line.startswith("warning: "))
    assert events == "warning: --log tensorboard: cannot write it; the run goes on without"
    assert pictures.startswith("warning: not drawn: ")
    assert "curves.png, " in pictures
    assert pictures.endswith("mistakes.png: cannot write it")
    assert any(", 1 epoch, " in line for line in lines)


def test_in_a_thread(rich, tiny, tmp_path):
    """Of a notebook, a server: Python gives signals to the main thread alone."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(run, tiny, tmp_path / "run", *RICH_SMALL).result()
    assert_same_run(tmp_path / "run", rich)


def test_a_second_start_says_complete_and_changes_nothing(complete, tiny):
    before = {p: p.stat().st_mtime_ns for p in complete.rglob("*") if p.is_file()}
    summary, lines = run(tiny, complete, *RICH)
    assert "complete" in lines[0]
    assert "Test accuracy" in lines[1]
    assert summary == json.loads((complete / "summary.json").read_text())
    before.pop(complete / ".lock")
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.fixture(scope="module")
def rich(tiny, small, tmp_path_factory):
    """The directory of a complete run of `RICH_SMALL`."""
    workdir = tmp_path_factory.mktemp("rich") / "run"
    run(tiny, workdir, *RICH_SMALL)
    return workdir


def test_the_streamed_feed_gives_the_same_run(rich, tiny, tmp_path, monkeypatch):
    """Chosen here by a device that is too small for the data; `--feed stream` asks for it."""
    monkeypatch.setattr(placement, "device_memory", lambda: 600 * 32 * 32 * 3)
    _, lines = run(tiny, tmp_path / "run", *RICH_SMALL)
    assert any("streamed from the host" in line for line in lines)
    assert_same_run(tmp_path / "run", rich)


@pytest.mark.extended
def test_a_data_set_too_large_for_a_device_gives_the_same_run(tiny, tmp_path, monkeypatch):
    arguments = [*QUICK, "--devices", "2"]
    whole, _ = run(tiny, tmp_path / "whole", *arguments)
    memory = 0.6 * 600 * 32 * 32 * 3 / placement.SHARE
    monkeypatch.setattr(placement, "device_memory", lambda: memory)
    split, lines = run(tiny, tmp_path / "split", *arguments)
    assert any("split over the 2 devices" in line for line in lines)
    assert (whole["feed"], split["feed"]) == ("resident", "split")
    assert split["test_correct"] == whole["test_correct"]
    assert split["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)
    assert rows_of(tmp_path / "split") == rows_of(tmp_path / "whole")
    # A streamed chunk goes to the devices in parts as well.
    streamed, _ = run(tiny, tmp_path / "stream", *arguments, "--feed", "stream")
    assert streamed["feed"] == "stream"
    assert_same_run(tmp_path / "stream", tmp_path / "whole")


@pytest.mark.parametrize("length", [1, 5])
def test_chunks_and_saves_change_nothing(rich, tiny, tmp_path, monkeypatch, length):
    monkeypatch.setattr(programs.Chunks, "ran", lambda self, *_: setattr(self, "_length", length))
    run(tiny, tmp_path / "run", *RICH_SMALL, "--save-minutes", "1e-5" if length == 5 else "1e9")
    assert_same_run(tmp_path / "run", rich)


def test_another_seed_is_another_run(rich, tiny, tmp_path):
    run(tiny, tmp_path / "run", *RICH_SMALL, "--seed", "43")
    rows, others = rows_of(tmp_path / "run", "window"), rows_of(rich, "window")
    assert all(a["loss"] != b["loss"] for a, b in zip(rows, others[: len(rows)], strict=True))


def test_without_validation_the_last_weights_are_tested(tiny, tmp_path):
    recipe = words(
        "--recipe tutorial --model small --devices 1 --epochs 1 --batch-size 50 --log-every 0"
    )
    summary, lines = run(tiny, tmp_path / "run", *recipe)
    assert (summary["training_images"], summary["validation_images"]) == (600, 0)
    assert summary["best_epoch"] is None
    assert summary["tested_epoch"] == 1
    assert [row["kind"] for row in rows_of(tmp_path / "run")] == ["epoch", "test"]
    assert not any("valid. loss" in line for line in lines)


def test_evaluation_batches_larger_than_the_split_hold_the_split(tiny, tmp_path):
    one, _ = run(tiny, tmp_path / "a", *QUICK, "--eval-batch-size", "1000000")
    other, _ = run(tiny, tmp_path / "b", *QUICK, "--eval-batch-size", "7")
    assert one["test_correct"] == other["test_correct"]
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)
    (a,), (b,) = rows_of(tmp_path / "a", "epoch"), rows_of(tmp_path / "b", "epoch")
    assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-5)


def test_divergence_stops_at_once_and_keeps_what_was_good(tiny, tmp_path):
    workdir = tmp_path / "run"
    # Each step multiplies the weights by 1 - 10 * rate; the rate climbs slowly enough for a
    # checkpoint, and surely beyond what float32 holds.
    rate = words("--optimizer sgd --weight-decay 10 --learning-rate 1000 --warmup-epochs 1000")
    arguments = [*QUICK, *rate, "--epochs", "1000", "--save-minutes", "1e-6"]
    with pytest.raises(UserError, match=r"not finite at step \d+ \(learning rate .*kept") as caught:
        run(tiny, workdir, *arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert "--learning-rate" in message
    state = evaluation.load(workdir, "latest")
    assert f"checkpoint of step {state.step} is kept" in message
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables))
    assert not (workdir / "summary.json").exists()


def test_a_loss_that_does_not_fall_brings_the_checklist(complete, tiny, tmp_path):
    assert "warning" not in (complete.parent / "said.txt").read_text()
    _, lines = run(tiny, tmp_path / "run", *QUICK, *words("--model tutorial_cnn --learning-rate 0"))
    (at,) = [i for i, line in enumerate(lines) if line.startswith("warning: the loss stayed")]
    assert "2.303" in lines[at]
    checklist = "\n".join(lines[at + 1 : at + 6])
    for word in ("learning rate", "--normalize", "state", "optimizer", "labels"):
        assert word in checklist


def test_the_labelled_fall_back_is_asked_for_and_announced(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shapes10, "COUNTS", {"train": 300, "test": 100})
    arguments = [*QUICK, "--no-download"]
    with pytest.raises(UserError) as caught:
        run(tmp_path / "data", tmp_path / "run", *arguments)
    for way in ("--archive", "--data-dir", "--dataset shapes10"):
        assert way in str(caught.value)
    assert not (tmp_path / "run").exists()
    lines, where = [], ["--data-dir", str(tmp_path / "data"), "--no-plots"]
    monkeypatch.chdir(tmp_path)
    summary = train.main([*arguments, *where, "--fallback-shapes10"], say=lines.append)
    assert (tmp_path / "runs" / "adam-model_small-batch_size60-seed42").is_dir(), "as if it were"
    assert sum(line.startswith("NOTICE") for line in lines) == 3
    assert any(line.startswith("Data set   shapes10") for line in lines)
    assert summary["dataset"]["name"] == summary["recipe"]["dataset"] == "shapes10"
