"""predictions.npz and predictions.csv are read back by NumPy and csv alone."""

import csv

import numpy as np
import pytest

from cifar_jax.reporting import predictions
from cifar_jax.runtime.errors import UserError

NAMES = ["cat", "dog, small", "ship"]
SHARES = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], np.float32)
TEST = predictions.of_split(SHARES, np.array([1, 2]))


def test_they_are_read_back_and_numpy_alone_reads_them_too(tmp_path):
    held_out = predictions.Predictions(SHARES[:1], np.array([0], np.int32), np.array([7], np.int32))
    path = predictions.write(tmp_path, TEST, held_out)
    test, validation = predictions.read(tmp_path)
    np.testing.assert_array_equal(test.probabilities, SHARES, strict=True)
    np.testing.assert_array_equal(test.predicted, [0, 2])
    np.testing.assert_array_equal(validation.indices, [7])
    with np.load(path) as arrays:
        assert {"probabilities", "labels", "indices"} < set(arrays)
        np.testing.assert_array_equal(arrays["indices"], [0, 1])
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.npz"]


def test_equal_predictions_are_equal_files(tmp_path):
    first = predictions.write(tmp_path, TEST).read_bytes()
    assert predictions.write(tmp_path, TEST).read_bytes() == first


def test_the_table_has_a_row_an_image(tmp_path):
    with open(predictions.write_csv(tmp_path, TEST, NAMES), newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "index": "0", "true": "dog, small", "predicted": "cat", "right": "0", "p_true": "0.3",
        "p_predicted": "0.5", "p_cat": "0.5", "p_dog, small": "0.3", "p_ship": "0.2",
    }  # fmt: skip
    assert second["right"] == "1"


def test_directories_of_before_are_read_and_damage_is_told(tmp_path):
    assert predictions.read(tmp_path) == (None, None)
    np.save(tmp_path / "probabilities.npy", SHARES)
    assert predictions.read(tmp_path) == (None, None)
    test, validation = predictions.read(tmp_path, np.array([1, 2]))
    np.testing.assert_array_equal(test.labels, [1, 2])
    assert validation is None
    for content in (b"", b"PK\x03\x04 cut"):
        (tmp_path / "predictions.npz").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            predictions.read(tmp_path)
    predictions.write(tmp_path, predictions.of_split(SHARES, np.array([1, 3])))
    with pytest.raises(UserError, match="damaged"):
        predictions.read(tmp_path)
