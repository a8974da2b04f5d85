"""`cifar_jax.fit`: the train command's runs from Python, and what it returns."""

import importlib.util
import os
import signal
import tempfile
import threading

import flax.linen as nn
import numpy as np
import pytest
from tiny_data import assert_same_run, prepare_tiny, rows_of, small, tiny, words

import cifar_jax
from cifar_jax import evaluate, train
from cifar_jax.datasets import load_dataset
from cifar_jax.runtime.errors import UserError

__all__ = ["small", "tiny"]

SETTINGS = {"epochs": 2, "batch_size": 70, "learning_rate": 0.003, "log_every": 3}


@pytest.fixture(scope="module")
def data(tiny):
    return load_dataset("cifar10", data_dir=tiny, progress=False)


def fit(data, *arguments, **options):
    given = {"data": data, "model": "small", "verbose": False} | SETTINGS | options
    return cifar_jax.fit("adam", *arguments, **given)


@pytest.fixture(scope="module")
def done(data, small, tmp_path_factory):
    """(result, rows that a callback saw, the folder of temporary files)."""
    rows, folder = [], tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(folder))
        result = fit(data, seed=3, callbacks=[rows.append])
    return result, rows, folder


def test_it_is_the_commands_run_and_leaves_nothing(done, tiny, tmp_path):
    result, rows, temporary = done
    options = words("--recipe adam --model small --epochs 2 --batch-size 70 --learning-rate 0.003")
    options += words("--log-every 3 --seed 3 --no-plots --devices 1")
    train.main([*options, "--data-dir", str(tiny), "--workdir", str(tmp_path / "a")], say=id)
    assert_same_run(result.save(tmp_path / "b"), tmp_path / "a")
    assert not (tmp_path / "b" / "report.html").exists()
    # tensorflow-datasets makes a folder of its own when it is imported.
    assert not [path for path in temporary.iterdir() if not path.name.endswith("tfds")]
    assert rows == [row for row in result.history if row["kind"] != "test"]
    assert rows_of(tmp_path / "a", "epoch")[1]["epoch"] == rows[-1]["epoch"] == 2
    with pytest.raises(UserError, match="name a new directory"):
        result.save(tmp_path / "b")


def test_a_result_predicts_and_evaluates_and_shows_itself(done, data, tmp_path):
    result, test = done[0], data.splits["test"]
    probabilities = result.predict(test.images)
    assert (probabilities.shape, probabilities.dtype) == ((200, 10), np.float32)
    found = result.evaluate()
    assert (probabilities.argmax(axis=1) == test.labels).mean() == found["test_accuracy"]
    assert found["test_accuracy"] == result.summary["test_accuracy"]
    shown = f"{100 * found['test_accuracy']:.2f} %"
    assert shown in result._repr_html_()
    assert shown in repr(result)
    assert {"curves", "confusion_matrix"} <= result.plot().keys()
    if importlib.util.find_spec("pandas"):
        assert result.history.to_pandas().shape[0] == len(result.history)
    else:
        with pytest.raises(UserError, match="pip install pandas"):
            result.history.to_pandas()
    with pytest.raises(UserError, match="a batch axis is missing"):
        result.predict(test.images[0])
    with pytest.raises(UserError, match="must be uint8"):
        result.predict(test.images / 255)


def test_a_callback_ends_it_and_the_run_goes_on_where_it_is_saved(data, small, tmp_path):
    def enough(row):
        return row["kind"] == "epoch"

    kept = tmp_path / "kept"
    stopped = fit(data, seed=3, callbacks=[enough], workdir=kept)
    assert (stopped.summary["stopped"], stopped.summary["epochs"]) == (True, 1)
    assert 0 <= stopped.summary["test_accuracy"] <= 1
    assert not (kept / "summary.json").exists()
    assert not (kept / "report.html").exists()
    whole = fit(data, seed=3, workdir=stopped.save(tmp_path / "saved"))
    assert "stopped" not in whole.summary
    assert [row["epoch"] for row in whole.history if row["kind"] == "epoch"] == [1, 2]


def test_ctrl_c_returns_what_there_is(data, small):
    def interrupt(row):
        if row["kind"] == "epoch":
            os.kill(os.getpid(), signal.SIGINT)

    result = fit(data, seed=3, callbacks=[interrupt])
    assert result.summary["stopped"]
    assert result.predict(data.splits["test"].images).shape == (200, 10)


class Flat(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("make", [lambda: Flat(10), lambda: Flat])
def test_a_module_and_arrays_in_another_thread(make, data):
    found = []
    arrays = [(data.splits[name].images, data.splits[name].labels) for name in ("train", "test")]

    def work():
        found.append(fit(tuple(arrays), model=make(), epochs=1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].summary["parameters"] == 3072 * 10 + 10
    assert found[0].run.config.recipe.model.endswith(":Flat")
    # A shell has neither of the two, so what trains it again is the call.
    command = found[0].summary["command"]
    assert command.startswith("cifar_jax.fit('adam', ")
    assert f"model={Flat.__module__}.Flat, " in command
    assert "data=..., " in command
    assert command.endswith("seed=42)")


def test_many_seeds_are_one_result(data, small, tmp_path):
    result = fit(data, seeds=range(2, 4))
    assert [run.run.config.seed for run in result.runs] == [2, 3]
    assert result.summary["test_accuracy"]["n"] == 2
    assert {row["seed"] for row in result.history} == {2, 3}
    test = data.splits["test"]
    (picture,) = result.plot().items()
    assert picture[0] == "test_accuracy"
    assert min(picture[1].size) > 200
    mean = np.mean([run.predict(test.images) for run in result.runs], axis=0)
    np.testing.assert_allclose(result.predict(test.images), mean)
    assert result.evaluate()["test_accuracy"]["mean"] == pytest.approx(
        result.summary["test_accuracy"]["mean"]
    )
    member = result.save(tmp_path / "many") / "seed-3"
    assert not [path.name for path in member.parent.rglob("*") if path.suffix in (".html", ".png")]
    folder = prepare_tiny(tmp_path / "data")
    again = evaluate.main([str(member), "--data-dir", str(folder)], say=id)
    assert again["test_accuracy"] == result.runs[1].summary["test_accuracy"]


def test_many_seeds_that_are_stopped_keep_their_rows(data, small):
    result = fit(data, seeds=range(2), callbacks=[lambda row: row["kind"] == "epoch"])
    assert result.summary == {"stopped": True}
    assert {row["seed"] for row in result.history} == {0, 1}
    with pytest.raises(UserError, match="was stopped"):
        result.predict(data.splits["test"].images)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"recipe": "adm"}, "did you mean 'adam'"),
        ({"model": "smal"}, "unknown model"),
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"model": 3}, "linen module"),
        ({"data": 3}, "data must be a Dataset"),
        ({"data": ((np.zeros((4, 8, 8, 3)), [0] * 4), ([], []))}, "must be uint8"),
        ({"device": "cpux"}, "unknown device"),
    ],
)
def test_bad_input_is_a_user_error(options, expected, data):
    with pytest.raises(UserError, match=expected):
        cifar_jax.fit(**{"data": data, "recipe": "adam", "verbose": False} | options)
