"""What a run shows: sums become rates, rows and results become lines of text.

Pure functions from values to values or strings; the training loop prints. A *row* is one line of
`metrics.jsonl`, see `cifar_jax.reporting.metrics_log`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def rates(sums: Mapping) -> dict:
    """Returns {"loss", "accuracy", "count"}: the means of masked sums {"loss", "correct", "count"}.

    The sums may be host or device scalars. Over no image at all both means are nan.
    """
    count = int(sums["count"])
    if count == 0:
        return {"loss": math.nan, "accuracy": math.nan, "count": 0}
    return {
        "loss": float(sums["loss"]) / count,
        "accuracy": float(sums["correct"]) / count,
        "count": count,
    }


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Returns `1 epoch`, `2 epochs`; the plural is the noun with an s where none is given."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def results(sums: Mapping, confusion: np.ndarray, class_names: Sequence[str]) -> dict:
    """Returns what a test found, as it stands in `summary.json`.

    Args:
      sums: {"loss", "correct", "count"} over the tested images.
      confusion: int [C, C], of each true class (row), how many got each class (column).
      class_names: C names.

    Returns:
      {"test_loss", "test_accuracy" in [0, 1], "test_correct", "test_count", "per_class"}, the
      last a list of {"class", "correct", "count", "accuracy"} in label order; the accuracy of a
      class without images is nan.
    """
    means = rates(sums)
    per_class = [
        {
            "class": name,
            "correct": int(confusion[k, k]),
            "count": int(confusion[k].sum()),
            "accuracy": _ratio(int(confusion[k, k]), int(confusion[k].sum())),
        }
        for k, name in enumerate(class_names)
    ]
    return {
        "test_loss": means["loss"],
        "test_accuracy": means["accuracy"],
        "test_correct": int(sums["correct"]),
        "test_count": means["count"],
        "per_class": per_class,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def window_rows(
    losses: np.ndarray, before: int, after: int, every: int, *, epoch: int, first_step: int
) -> list[dict]:
    """Returns the values of the `window` rows that end within steps before+1..after of an epoch.

    Args:
      losses: float [steps] or longer, the mean loss of each of the epoch's steps.
      every: steps in a window; 0 is no window.
      epoch: its number, from 1.
      first_step: steps before this epoch.
    """
    ends = range((before // every + 1) * every, after + 1, every) if every else ()
    means = {end: float(losses[end - every : end].astype(np.float64).mean()) for end in ends}
    return [{"epoch": epoch, "step": first_step + end, "loss": means[end]} for end in ends]


def epoch_row(
    record: Mapping[str, np.ndarray],
    validation: Mapping | None,
    *,
    epoch: int,
    step: int,
    learning_rate: float,
) -> dict:
    """Returns the values of an `epoch` row.

    Args:
      record: sums of each of the epoch's steps, {"loss", "correct", "count"} [steps].
      validation: the same sums over the validation images, scalars; None where there are none.
      epoch, step: the epoch's number, from 1, and the steps done by its end.
      learning_rate: of its last step.
    """
    means = rates({name: values.sum(dtype=np.float64) for name, values in record.items()})
    row = {
        "epoch": epoch,
        "step": step,
        "train_loss": means["loss"],
        "train_accuracy": means["accuracy"],
        "learning_rate": learning_rate,
    }
    if validation is not None:
        found = rates(validation)
        row |= {"validation_loss": found["loss"], "validation_accuracy": found["accuracy"]}
    return row


def best_epoch(rows: Sequence[Mapping]) -> Mapping | None:
    """Returns the `epoch` row of the lowest validation loss, the earliest of equal ones.

    None when no row has a finite validation loss.
    """
    best = None
    for row in rows:
        loss = row.get("validation_loss")
        if row["kind"] != "epoch" or loss is None or not math.isfinite(loss):
            continue
        if best is None or loss < best["validation_loss"]:
            best = row
    return best


# Of the table that a run prints as it trains: a header once, then a line an epoch and a window.
# What is in a column, its heading and its width; of many runs a mean and a standard deviation.
_HEADINGS = {
    "train_loss": "train loss",
    "train_accuracy": "accuracy",
    "validation_loss": "valid. loss",
    "validation_accuracy": "accuracy",
}
WIDE = 100  # columns of a terminal from which many runs get all their digits


def label_width(epochs: int, steps_per_epoch: int = 0) -> int:
    """Returns the width of the table's first column; `steps_per_epoch` where windows are shown."""
    width = len(_epoch_label(epochs, epochs))
    return max(width, len(_window_label(epochs, 0, steps_per_epoch))) if steps_per_epoch else width


def _epoch_label(epoch: int, epochs: int) -> str:
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}"


def _window_label(epoch: int, step: int, steps_per_epoch: int) -> str:
    return f"epoch {epoch}  step {step:>{len(str(steps_per_epoch))}}/{steps_per_epoch}"


def header(width: int, *, validation: bool, runs: int = 1, columns: int = 80) -> str:
    """Returns the table's heading.

    Args:
      width: from `label_width`.
      validation: whether there are validation images.
      runs: over how many runs a line is.
      columns: of the terminal.
    """
    names = list(_HEADINGS)[: 4 if validation else 2]
    widths = _widths(runs, columns)
    cells = [f"{_HEADINGS[name]:>{widths[name.split('_')[1]]}}" for name in names]
    label = f"{runs} runs" if runs > 1 else ""
    return f"{label:<{width}}{''.join(cells)}{'seconds':>9}"


def _widths(runs: int, columns: int) -> dict[str, int]:
    if runs == 1:
        return {"loss": 12, "accuracy": 9}
    return {"loss": 18, "accuracy": 17} if columns >= WIDE else {"loss": 15, "accuracy": 14}


def window_line(row: Mapping, steps_per_epoch: int, width: int = 0) -> str:
    """Returns a line such as `epoch 1  step  2000/12500      2.1921`: the step in its epoch, and
    the mean loss, in the column of the training loss.

    Args:
      row: of kind `window`; its `step` counts from the start of the run.
      width: of the first column.
    """
    step = row["step"] - (row["epoch"] - 1) * steps_per_epoch
    label = _window_label(row["epoch"], step, steps_per_epoch)
    return f"{label:<{width}}{_loss(row, 4):>{_widths(1, 80)['loss']}}"


def epoch_line(row: Mapping, epochs: int, *, best: bool = False, width: int = 0) -> str:
    """Returns an epoch's one line: training loss and accuracy, then the validation's if any,
    seconds where they are known, and a star where its validation loss is the lowest so far.

    Args:
      row: of kind `epoch`.
      epochs: the run's number of epochs.
      best: whether there is a star.
      width: of the first column.
    """
    widths = _widths(1, 80)
    cells = [f"{_epoch_label(row['epoch'], epochs):<{width}}"]
    for part in ("train", "validation"):
        if f"{part}_loss" in row:
            cells.append(f"{_loss(row, 4, f'{part}_loss'):>{widths['loss']}}")
            cells.append(f"{_accuracy(row, part):>{widths['accuracy']}}")
    seconds = row.get("timing", {}).get("seconds")
    cells += [f"{seconds:>9.1f}"] if seconds is not None else []
    return "".join(cells) + ("  *" if best else "")


def epochs_line(rows: Sequence[Mapping], epochs: int, width: int = 0, columns: int = 80) -> str:
    """Returns one line for the same epoch of several runs: `epoch_line` with means over the runs
    and standard deviations, of at least one row of kind `epoch`.

    Args:
      width: of the first column.
      columns: of the terminal: below 100 there are fewer digits.
    """
    widths, more = _widths(max(len(rows), 2), columns), columns >= WIDE
    cells = [f"{_epoch_label(rows[0]['epoch'], epochs):<{width}}"]
    for part in ("train", "validation"):
        if f"{part}_loss" in rows[0]:
            loss = _mean_and_std([row[f"{part}_loss"] for row in rows], 4 if more else 3)
            percent = [100 * row[f"{part}_accuracy"] for row in rows]
            accuracy = f"{_mean_and_std(percent, 2 if more else 1)} %"
            cells += [f"{loss:>{widths['loss']}}", f"{accuracy:>{widths['accuracy']}}"]
    return "".join(cells) + f"{rows[0]['timing']['seconds']:>9.1f}"


def _mean_and_std(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def _accuracy(row: Mapping, part: str) -> str:
    accuracy = row.get(f"{part}_accuracy")
    return f"{100 * accuracy:.2f} %" if accuracy is not None else "nan %"


def _loss(row: Mapping, digits: int, name: str = "loss") -> str:
    # A row read back from JSON holds None where the number was not finite.
    return "nan" if row[name] is None else f"{row[name]:.{digits}f}"


def first_images_lines(
    true: Sequence[int], predicted: Sequence[int], class_names: Sequence[str], count: int = 4
) -> str:
    """Returns two lines: the classes of the first `count` test images, and those predicted."""
    truth = [class_names[k] for k in true[:count]]
    guess = [class_names[k] for k in predicted[:count]]
    widths = [max(len(a), len(b)) for a, b in zip(truth, guess, strict=True)]

    def line(title: str, names: Sequence[str]) -> str:
        cells = (f"{name:<{width}}" for name, width in zip(names, widths, strict=True))
        return f"{title:<12} {' '.join(cells)}".rstrip()

    return f"{line('GroundTruth:', truth)}\n{line('Predicted:', guess)}"


def results_lines(result: Mapping, *, split: str = "Test") -> str:
    """Returns the test loss, the accuracy (right/all), and each class's accuracy (right/all).

    Args:
      result: from `results`. Beyond 20 classes the classes stand in several columns.
      split: the name of what was tested, as the lines begin.
    """
    rows = result["per_class"]
    name_width = max(len(row["class"]) for row in rows)
    digits = len(str(max(row["count"] for row in rows)))
    cells = [
        f"  {row['class']:<{name_width}}  {_percent(row['correct'], row['count'])}"
        f" ({row['correct']:>{digits}}/{row['count']})"
        for row in rows
    ]
    cell_width = max(len(cell) for cell in cells)
    columns = 1 if len(cells) <= 20 else max(1, 100 // (cell_width + 2))
    height = math.ceil(len(cells) / columns)
    table = [
        "  ".join(f"{cell:<{cell_width}}" for cell in cells[start::height]).rstrip()
        for start in range(height)
    ]
    correct, count = result["test_correct"], result["test_count"]
    head = [
        f"{split} loss {result['test_loss']:.6f}",
        f"{split} accuracy {_percent(correct, count, 2).strip()} ({correct}/{count})",
    ]
    return "\n".join(head + table)


def _percent(part: int, whole: int, digits: int = 1) -> str:
    return f"{100 * part / whole:5.{digits}f} %" if whole else f"{'-':>5}  "


def timing_line(seconds: Mapping[str, float], images_per_second: float | None = None) -> str:
    """Returns one line of the seconds spent on each part, in the order given.

    Args:
      seconds: for instance {"data": ..., "compile": ..., "training": ..., "test": ...}.
      images_per_second: of training alone, without compiling and without reading data.
    """
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    if images_per_second is None:
        return f"Time: {parts}"
    return f"Time: {parts}; {images_per_second:,.0f} training images/s"
