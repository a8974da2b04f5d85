"""What a run said of each test image: `predictions.npz` and `predictions.csv` in its directory.

The arrays of `predictions.npz`: `probabilities` float32 [N, C]; `labels` int32 [N], the true
classes; `indices` int32 [N], the images' places in the test split. Where the run held out
validation images, the same of these, `validation_probabilities` and so on, whose indices are places
in the training split. `numpy.load` opens it.
"""

from __future__ import annotations

import csv
import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import replacing

NPZ, CSV = "predictions.npz", "predictions.csv"
_FORMER = "probabilities.npy"  # of many runs, before there was predictions.npz


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Probabilities float32 [N, C] of N images with `labels` and `indices`, both int32 [N]."""

    probabilities: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """int [N]: the class of the highest probability."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """float32 [N]: the highest probability."""
        return self.probabilities.max(axis=1)


def of_split(probabilities: np.ndarray, labels: np.ndarray) -> Predictions:
    """Returns the predictions of a whole split, in its order."""
    return Predictions(
        np.asarray(probabilities, np.float32),
        np.asarray(labels, np.int32),
        np.arange(len(labels), dtype=np.int32),
    )


def write(folder: Path, test: Predictions, validation: Predictions | None = None) -> Path:
    """Writes `predictions.npz` into a run directory. Raises `UserError` where it cannot."""
    arrays = dataclasses.asdict(test)
    if validation is not None:
        arrays |= {f"validation_{k}": v for k, v in dataclasses.asdict(validation).items()}
    path = Path(folder) / NPZ
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def are_in(folder: Path) -> bool:
    """Whether a run directory holds what `read` reads."""
    return any((Path(folder) / name).exists() for name in (NPZ, _FORMER))


def read(
    folder: Path, labels: np.ndarray | None = None
) -> tuple[Predictions | None, Predictions | None]:
    """Returns the predictions of the test and of the validation images that a run directory holds,
    None for what it does not.

    Args:
      labels: int [N] of the test images, for directories of before `predictions.npz`.

    Raises:
      UserError: the file is damaged.
    """
    path, former = Path(folder) / NPZ, Path(folder) / _FORMER
    try:
        if not path.exists() and former.exists() and labels is not None:
            return of_split(np.load(former), labels), None
        with open(path, "rb") as file, np.load(file) as arrays:
            return tuple(
                _checked(*(arrays[f"{part}{field.name}"] for field in _FIELDS))
                if f"{part}labels" in arrays
                else None
                for part in ("", "validation_")
            )
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); remove it") from None


_FIELDS = dataclasses.fields(Predictions)


def _checked(probabilities, labels, indices) -> Predictions:
    """Raises ValueError where the three are not of the same images."""
    if probabilities.ndim != 2 or not len(probabilities) == len(labels) == len(indices):
        raise ValueError("shapes")
    if len(labels) and not 0 <= labels.min() <= labels.max() < probabilities.shape[1]:
        raise ValueError("labels")
    return Predictions(probabilities, labels, indices)


def write_csv(folder: Path, test: Predictions, class_names: Sequence[str]) -> Path:
    """Writes `predictions.csv`, a row an image: index, true and predicted class, whether that is
    right (1 or 0), the two's probabilities, then each class's, with 6 significant digits.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(folder) / CSV
    head = ["index", "true", "predicted", "right", "p_true", "p_predicted"]
    columns = (test.indices, test.labels, test.predicted, test.probabilities)
    try:
        with (
            replacing(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            rows = csv.writer(file)
            rows.writerow([*head, *(f"p_{name}" for name in class_names)])
            for index, true, said, shares in zip(*(c.tolist() for c in columns), strict=True):
                shown = [f"{share:.6g}" for share in shares]
                names = [class_names[true], class_names[said], int(true == said)]
                rows.writerow([index, *names, shown[true], shown[said], *shown])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path
