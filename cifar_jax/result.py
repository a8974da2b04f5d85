"""What `cifar_jax.fit` returns: summary, history and weights of a run, or of several."""

from __future__ import annotations

import dataclasses
import html
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax import steps
from cifar_jax.datasets import Dataset
from cifar_jax.replicas import statistics
from cifar_jax.reporting import distribution, metrics_log
from cifar_jax.runtime import files
from cifar_jax.runtime.errors import UserError, check_batched
from cifar_jax.training import evaluation, summary
from cifar_jax.training.setup import Run


class History(list):
    """The rows of a run's `metrics.jsonl` as dicts, in order: of kind `window`, `epoch`, `test`. Of
    several runs each row has its "seed"."""

    def to_pandas(self):
        """Returns a pandas DataFrame, a row each. Raises `UserError` where there is no pandas."""
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install pandas") from None
        return pandas.DataFrame(list(self))


@dataclasses.dataclass(eq=False, repr=False)
class Result:
    """What `fit` returns.

    Attributes:
      summary: what `summary.json` holds. Of a run that was stopped it has "stopped": True. Of
        several runs their spread; where these were stopped {"stopped": True} and no more.
      history: rows of training and of the test.
      state: `steps.TrainState` of the weights that were tested; of several runs None.
      run: the run's constant parts: `run.model`, `run.config`, `run.dataset`.
      runs: of several runs each one's Result, of those that are complete; else ().
      directory: of the run, None where nothing is kept on disk.
    """

    summary: dict
    history: History
    state: steps.TrainState | None
    run: Run
    runs: tuple[Result, ...] = ()
    directory: Path | None = None
    _contents: Mapping[Path, bytes] | None = None

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the classes' probabilities, float32 [N, classes], of several runs their mean.

        Args:
          images: uint8 [N, S, S, 3], of the size trained on.

        Raises:
          UserError: other images, or no run that is complete.
        """
        if self.state is None:
            return np.mean([run.predict(images) for run in self._runs()], axis=0)
        images = np.asarray(images)
        check_batched(images)
        shape = tuple(self.run.config.dataset["image_shape"])
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise UserError(
                f"images must be uint8 [N, {', '.join(map(str, shape))}], these are "
                f"{images.dtype} {list(images.shape)}"
            )
        size = len(images)
        each = min(self.run.config.recipe.eval_batch_size, size)
        variables = steps.inference_variables(self.state)
        return evaluation.probabilities_of(
            self.run.predict, variables, images, -(-size // each), each
        )

    def evaluate(self, dataset: Dataset | None = None, split: str = "test") -> dict:
        """Returns {"test_loss", "test_accuracy", "per_class", ...} of a split, of several runs
        their spreads (`statistics.of_runs`).

        Args:
          dataset: by default the one trained on.

        Raises:
          UserError: other classes or image size, no such split, or no run that is complete.
        """
        names = self.run.dataset.class_names
        if self.state is None:
            found = [run.evaluate(dataset, split) for run in self._runs()]
            return statistics.of_runs(found, names)
        dataset = dataset or self.run.dataset
        if split not in dataset.splits:
            raise UserError(f"no split {split!r}; there are {', '.join(dataset.splits)}")
        images = dataset.splits[split].images
        trained_on = list(self.run.config.dataset["image_shape"])
        if list(dataset.class_names) != list(names) or list(images.shape[1:]) != trained_on:
            raise UserError(
                f"trained on {len(names)} classes ({', '.join(names[:4])} ...) and images of "
                f"{trained_on}; {dataset.name} has {len(dataset.class_names)} "
                f"({', '.join(dataset.class_names[:4])} ...) and {list(images.shape[1:])}"
            )
        return self._tested(dataset, split)[0]

    def plot(self) -> dict[str, Any]:
        """Returns the run's pictures by name as Pillow images, and shows them in a notebook's cell:
        those of a run directory, or of several runs the histogram of their test accuracy."""
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            self._draw(Path(folder))
            pictures = {}
            for path in sorted(Path(folder, "plots").glob("*.png")):
                with Image.open(path) as picture:
                    pictures[path.stem] = picture.copy()
        if "ipykernel" in sys.modules:
            from IPython.display import display

            for picture in pictures.values():
                display(picture)
        return pictures

    def save(self, directory: str | Path) -> Path:
        """Writes an ordinary run directory, as `python -m cifar_jax.train` leaves it; a run that
        was stopped goes on there. Returns its path.

        Raises:
          UserError: there is something at `directory`, or it cannot be written.
        """
        target = files.absolute(directory)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists; name a new directory")
        try:
            if self._contents is None:
                ignored = shutil.ignore_patterns(".lock")
                shutil.copytree(self.directory, target, ignore=ignored, dirs_exist_ok=True)
            for path, content in (self._contents or {}).items():
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(content)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None
        return target

    def _runs(self) -> tuple[Result, ...]:
        if not self.runs:
            raise UserError("no run is complete: the training was stopped")
        return self.runs

    def _tested(self, dataset: Dataset, split: str) -> tuple[dict, np.ndarray]:
        return evaluation.evaluate_split(
            self.run.evaluate,
            self.run.predict,
            steps.inference_variables(self.state),
            dataset.splits[split],
            dataset.class_names,
            self.run.config.recipe.eval_batch_size,
        )

    def _draw(self, folder: Path) -> None:
        if self.state is None:
            values = [100 * run.summary["test_accuracy"] for run in self._runs()]
            found, path = statistics.spread(values), folder / "plots" / "test_accuracy.png"
            heading = f"{self.run.config.recipe_name}: test accuracy of {len(values)} runs"
            name = "test accuracy, %"
            distribution.histogram(values, found, path, heading=heading, value_name=name)
            return
        with metrics_log.MetricsLog(folder / "metrics.jsonl") as log:
            for row in self.history:
                log.append(**row)
        key = self.state.key.addressable_data(0)
        summary.draw(self.run, folder, key, *self._tested(self.run.dataset, "test"), print)

    def _lines(self) -> list[tuple[str, str]]:
        """What there is to say, in two columns."""
        config, found = self.run.config, self.summary
        lines = [
            ("recipe", f"{config.recipe_name}: {summary.describe(config.recipe)}"),
            ("data set", f"{config.dataset['name']} {config.dataset['version']}"),
            ("weights", f"{self.run.parameters:,}"),
        ]
        if "stopped" in found:
            step = found.get("steps")
            lines.append(("stopped", f"after step {step:,}" if step else "before its end"))
        accuracy, loss = found.get("test_accuracy"), found.get("test_loss")
        if isinstance(accuracy, Mapping):
            mean, std = 100 * accuracy["mean"], 100 * (accuracy["std"] or 0)
            lines.append(("test accuracy", f"{mean:.2f} ± {std:.2f} % (n {accuracy['n']})"))
        elif accuracy is not None:
            shown = "nan" if loss is None else f"{loss:.4f}"
            lines.append(("test accuracy", f"{100 * accuracy:.2f} % (loss {shown})"))
            for row in found["per_class"]:
                lines.append((f"  {row['class']}", f"{row['correct']} of {row['count']}"))
        if "seconds" in found:
            lines.append(("seconds", f"{sum(found['seconds'].values()):.1f}"))
        return lines

    def __repr__(self) -> str:
        short = [text for text in self._lines() if not text[0].startswith(" ")]
        return "Result\n" + "\n".join(f"  {name:<14} {value}" for name, value in short)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._lines()
        )
        return f"<table>{rows}</table>"
