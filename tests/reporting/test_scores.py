"""Scores against values computed by hand and by other ways of computing them."""

import math

import numpy as np
import pytest

from cifar_jax.reporting import scores

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 5, 400)
LOGITS = RNG.normal(size=(400, 5)) + 1.5 * np.eye(5)[LABELS]
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)


def test_wilson_interval_is_the_published_one():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for correct, count, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        assert scores.wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)
    assert scores.wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert scores.wilson_interval(0, 0) == (0.0, 1.0)


def test_precision_recall_and_f1_by_hand():
    rows = scores.by_class(np.array([[8, 2, 0], [4, 6, 0], [0, 0, 0]]))
    assert rows[0] == pytest.approx({"precision": 8 / 12, "recall": 0.8, "f1": 16 / 22})
    assert rows[1] == pytest.approx({"precision": 6 / 8, "recall": 0.6, "f1": 12 / 18})
    assert all(math.isnan(value) for value in rows[2].values())


def test_nll_and_brier_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]], np.float32)
    labels = np.array([0, 1])
    nll = -(math.log(0.7) + math.log(0.25)) / 2
    assert scores.log_likelihood_loss(probabilities, labels) == pytest.approx(nll, rel=1e-6)
    brier = ((0.3**2 + 0.2**2 + 0.1**2) + (0.25**2 + 0.75**2 + 0.5**2)) / 2
    assert scores.brier_score(probabilities, labels) == pytest.approx(brier, rel=1e-6)
    impossible = scores.log_likelihood_loss(np.array([[0.0, 1.0]]), np.array([0]))
    assert 80 < impossible < 100, "finite: a float32 softmax does reach 0"


def test_reliability_and_ece_by_hand():
    #       confidence    0.9   0.8   0.8   0.35
    probabilities = np.array(
        [[0.9, 0.1, 0], [0.8, 0.1, 0.1], [0.8, 0.2, 0], [0.35, 0.33, 0.32]], np.float64
    )
    labels = np.array([0, 0, 1, 0])
    found = scores.reliability(probabilities, labels, bins=4)
    np.testing.assert_array_equal(found.count, [0, 1, 0, 3])
    np.testing.assert_allclose(found.confidence, [np.nan, 0.35, np.nan, 2.5 / 3])
    np.testing.assert_allclose(found.accuracy, [np.nan, 1, np.nan, 2 / 3])
    expected = (0.65 * 1 + (2.5 / 3 - 2 / 3) * 3) / 4
    assert scores.calibration_error(found) == pytest.approx(expected)


def test_ece_is_the_sum_over_bins_of_its_definition():
    """arXiv:1706.04599, equation 3, written out bin by bin."""
    confidence, said = PROBABILITIES.max(axis=1), PROBABILITIES.argmax(axis=1)
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            gap = (said == LABELS)[inside].mean() - confidence[inside].mean()
            total += abs(gap) * inside.mean()
    assert scores.calibration(PROBABILITIES, LABELS)["ece"] == pytest.approx(total)
    edges = scores.reliability(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 0]), bins=2)
    np.testing.assert_array_equal(edges.count, [1, 1])  # a bin holds its upper edge


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_applied_is_found_again(factor):
    labels = np.array([RNG.choice(5, p=p) for p in np.repeat(PROBABILITIES, 50, axis=0)])
    true = np.repeat(PROBABILITIES, 50, axis=0)  # calibrated: the labels are drawn from it
    sharpened = scores.tempered(true, 1 / factor)
    assert scores.fit_temperature(sharpened, labels) == pytest.approx(factor, rel=0.05)


def test_tempered_probabilities_are_the_softmax_of_divided_logits():
    divided = np.exp(LOGITS / 2.5)
    expected = divided / divided.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores.tempered(PROBABILITIES, 2.5), expected, rtol=1e-10)
    np.testing.assert_allclose(scores.tempered(PROBABILITIES, 1.0), PROBABILITIES, rtol=1e-10)
    certain = scores.tempered(np.array([[0.0, 1.0]], np.float32), 2.0)
    assert np.isfinite(certain).all()


def test_selective_accuracy_by_hand():
    probabilities = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    kept, accuracy = scores.selective_accuracy(probabilities, np.array([1, 0, 1, 0]))
    np.testing.assert_allclose(kept, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(accuracy, [1, 1, 2 / 3, 1 / 2])


def test_agreement_by_hand():
    predicted = np.array([[0, 1, 2], [0, 1, 0], [0, 2, 1]])
    found = scores.agreement(predicted, np.array([0, 1, 0]))
    np.testing.assert_array_equal(found["right"], [3, 2, 1])
    np.testing.assert_array_equal(found["classes"], [1, 2, 3])
    assert found["all_agree"] == pytest.approx(1 / 3)
    different = [np.mean(a != b) for a, b in ((predicted[0], predicted[1]),
                 (predicted[0], predicted[2]), (predicted[1], predicted[2]))]  # fmt: skip
    assert found["pairs"] == pytest.approx(np.mean(different))
    assert math.isnan(scores.agreement(predicted[:1], np.array([0, 1, 0]))["pairs"])
