"""How good predictions are, and how well they know it: pure functions over NumPy arrays.

`probabilities` are float [N, C], rows that sum to 1; `labels` are int [N]. The confidence of a
prediction is the probability of the class predicted, the largest of its row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BINS = 15  # of Guo et al., "On Calibration of Modern Neural Networks" (2017), arXiv:1706.04599
_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a rate of which `correct` of `count` were seen, in [0, 1].

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927), JASA
    22(158). It says how far chance in the choice of test images reaches, not in training. Over no
    image at all it is (0, 1).
    """
    if count == 0:
        return 0.0, 1.0
    rate, square = correct / count, _Z95**2 / count
    middle = (rate + square / 2) / (1 + square)
    reach = _Z95 * math.sqrt(rate * (1 - rate) / count + square / (4 * count)) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def by_class(confusion: np.ndarray) -> list[dict[str, float]]:
    """Returns each class's {"precision", "recall", "f1"} in [0, 1], of counts int [C, C] of each
    true class (row) called each class (column). What divides by zero is nan: the precision of a
    class that was never said, the recall of one without images."""
    counts = np.asarray(confusion, np.float64)
    right, true, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = zip(right / said, right / true, 2 * right / (said + true), strict=True)
    return [{"precision": float(p), "recall": float(r), "f1": float(f)} for p, r, f in columns]


def log_likelihood_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean negative log-likelihood (NLL) of the true classes, in nats."""
    true = np.asarray(probabilities, np.float64)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(true, np.finfo(np.float32).tiny)).mean())


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean over images of the squared distance between the row of probabilities and
    that of the true class (1 there, else 0), in [0, 2]. Brier (1950), Monthly Weather Review 78."""
    distance = np.array(probabilities, np.float64)
    distance[np.arange(len(labels)), labels] -= 1
    return float(np.square(distance).sum(axis=1).mean())


class Reliability(NamedTuple):
    """Predictions by confidence, in bins of equal width over (0, 1]. Each is [bins]: how many
    there are, and of these the mean confidence and the share right, nan where there is none."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Sorts predictions into bins by their confidence; bin k of n is (k/n, (k+1)/n]."""
    probabilities = np.asarray(probabilities)
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    at = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(at, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            count,
            np.bincount(at, confidence, bins) / count,
            np.bincount(at, right, bins) / count,
        )


def calibration_error(found: Reliability) -> float:
    """Returns the expected calibration error (ECE): the mean over predictions of their bin's
    distance between mean confidence and share right, in [0, 1]. arXiv:1706.04599, equation 3."""
    gap = np.nan_to_num(np.abs(found.confidence - found.accuracy))
    return float((gap * found.count).sum() / max(found.count.sum(), 1))


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Returns softmax(logits / temperature) of the logits behind these probabilities, float64
    [N, C]; 1 changes nothing, more makes them less sure, and no prediction changes."""
    probabilities = np.asarray(probabilities, np.float64)
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)) / temperature
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature from 0.05 to 20 of the lowest NLL (arXiv:1706.04599, section 4.2).

    Fit it on validation images: the test's own would flatter.
    """
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)).astype(np.float64)
    true = logits[np.arange(len(labels)), labels].mean()
    # Newton's method in 1 / temperature, in which the NLL is convex, within what is known of the
    # minimum's place. Not scipy's minimiser, whose import takes as long as the rest of a page.
    low, high, inverse = 1 / 20, 1 / 0.05, 1.0
    for _ in range(50):
        shares = np.exp(inverse * (logits - logits.max(axis=1, keepdims=True)))
        shares /= shares.sum(axis=1, keepdims=True)
        mean = np.einsum("nc,nc->n", shares, logits)
        slope = mean.mean() - true
        curvature = (np.einsum("nc,nc,nc->n", shares, logits, logits) - mean**2).mean()
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        former, inverse = inverse, inverse - slope / max(curvature, 1e-12)
        if not low < inverse < high:
            inverse = math.sqrt(low * high)
        if abs(inverse - former) < 1e-6 * former:
            break
    return 1 / inverse


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns {"ece" (15 bins), "nll", "brier"} of these predictions."""
    return {
        "ece": calibration_error(reliability(probabilities, labels)),
        "nll": log_likelihood_loss(probabilities, labels),
        "brier": brier_score(probabilities, labels),
    }


def selective_accuracy(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the share kept, k / N for k = 1..N, and the accuracy among the k predictions of the
    highest confidence; both float64 [N]. Equal confidences keep the order of the images."""
    probabilities = np.asarray(probabilities)
    surest = np.argsort(-probabilities.max(axis=1), kind="stable")
    right = (probabilities.argmax(axis=1) == labels)[surest]
    kept = np.arange(1, len(right) + 1)
    return kept / len(right), np.cumsum(right) / kept


def agreement(predicted: np.ndarray, labels: np.ndarray) -> Mapping[str, np.ndarray]:
    """Returns what R runs say of the same images.

    Args:
      predicted: int [R, N], the class that each run says.

    Returns:
      {"right": int [N], how many runs are right; "classes": int [N], how many different classes
      they say; "all_agree": float, the share of images of which all say the same; "pairs": float,
      the mean share of images that two of the runs say different classes of, nan of one run}.
    """
    predicted = np.asarray(predicted)
    runs, images = predicted.shape
    votes = np.zeros((images, max(int(predicted.max()), int(labels.max())) + 1), np.int64)
    for row in predicted:
        votes[np.arange(images), row] += 1
    classes = (votes > 0).sum(axis=1)
    same = (votes * (votes - 1)).sum(axis=1)  # ordered pairs of runs that agree, of each image
    pairs = 1 - same.mean() / (runs * (runs - 1)) if runs > 1 else math.nan
    return {
        "right": votes[np.arange(images), labels],
        "classes": classes,
        "all_agree": float((classes == 1).mean()),
        "pairs": float(pairs),
    }
