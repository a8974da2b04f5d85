"""Statistics of several runs, by hand."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from cifar_jax.replicas import statistics
from cifar_jax.reporting import distribution


def test_spread_of_four_values():
    found = statistics.spread([1.0, 2.0, 3.0, 4.0])
    assert (found["n"], found["mean"], found["min"], found["max"]) == (4, 2.5, 1.0, 4.0)
    assert found["std"] == pytest.approx(math.sqrt(5 / 3))
    assert found["standard_error"] == pytest.approx(math.sqrt(5 / 12))
    # 3.182446 is the 97.5 % quantile for 3 degrees of freedom in every table of Student's t.
    reach = 3.182446 * math.sqrt(5 / 12)
    assert found["interval_95"] == pytest.approx([2.5 - reach, 2.5 + reach])


def test_one_value_has_no_spread():
    found = statistics.spread([1.0])
    assert math.isnan(found["std"])
    assert all(math.isnan(bound) for bound in found["interval_95"])
    assert "mean" in found
    assert "std -" in statistics.line("x", found)


def test_line_scales_and_names():
    text = statistics.line(
        "Test accuracy", statistics.spread([0.5, 0.6]), scale=100, digits=2, unit=" %"
    )
    assert text.startswith("Test accuracy 55.00 %  std 7.07  standard error 5.00  95 % interval")
    assert text.endswith("range 50.00 to 60.00  n 2")


def test_the_ensemble_is_the_mean_of_probabilities(tmp_path):
    shares = [[[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [0.3, 0.7]]]
    labels = np.array([0, 0])
    for i, share in enumerate(shares):
        folder = tmp_path / str(i)
        folder.mkdir()
        np.save(folder / "probabilities.npy", np.array(share, np.float32))
        per_class = [{"class": "cat", "accuracy": 0.5 * (1 - i)}, {"class": "dog", "accuracy": 0.0}]
        run = {"seed": i, "test_accuracy": 0.5 * (1 - i), "test_loss": 1.0, "per_class": per_class}
        run |= {"epochs": 2, "best_epoch": None, "best_validation_loss": None}
        (folder / "summary.json").write_text(json.dumps(run))
    found = statistics.of_directories([tmp_path / "0", tmp_path / "1"], labels)
    assert (found["ensemble"]["test_correct"], found["ensemble"]["test_accuracy"]) == (1, 0.5)
    assert found["ensemble"]["test_loss"] == pytest.approx(
        -(math.log(0.55) + math.log(0.35)) / 2, rel=1e-6
    )
    assert found["per_class"][0]["mean"] == 0.25
    assert [run["seed"] for run in found["runs"]] == [0, 1]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_histogram_is_drawn(count, tmp_path):
    values = np.random.default_rng(0).normal(55, 1, count).tolist()
    path = tmp_path / "h.png"
    distribution.histogram(
        values, statistics.spread(values), path, heading="runs", value_name="%", published=[55, 54]
    )
    with Image.open(path) as picture:
        assert picture.size == (900, 504 if count >= 15 else 360)
