"""Where a run's rows go beside `metrics.jsonl`: `train --log tensorboard,mlflow,wandb,trackio`.

A logger is a class that is made with a run's directory, its settings and the step that a resumed
run goes on after (None for a new one), and has `append(row)` and `close()`. A new one is a class
and an entry of `LOGGERS`. Where its data go is for its package's own settings to say
(`MLFLOW_TRACKING_URI`, `WANDB_MODE=offline`, ...).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cifar_jax.reporting.metrics_log import TensorBoardLog, numbers_of
from cifar_jax.runtime.errors import UserError, lookup, one_line

PROJECT = "cifar_jax"
ID_FILE = "log_id"  # in a run directory: by which a resumed run finds what it logged


def _id_of(folder: Path) -> str:
    file = folder / ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


class TensorBoard(TensorBoardLog):
    def __init__(self, folder: Path, settings: Mapping, resumed_at: int | None):
        super().__init__(folder / "tensorboard", resumed_at=resumed_at)
        if resumed_at is None:
            self.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))


class Mlflow:
    def __init__(self, folder: Path, settings: Mapping, resumed_at: int | None):
        import mlflow

        self._client, tag = mlflow.MlflowClient(), _id_of(folder)
        experiment = self._client.get_experiment_by_name(PROJECT)
        at = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        found = self._client.search_runs([at], f"tags.{PROJECT} = '{tag}'")
        tags = {PROJECT: tag}
        run = found[0] if found else self._client.create_run(at, tags=tags, run_name=folder.name)
        self._run = run.info.run_id
        if not found:
            for name, value in settings.items():
                self._client.log_param(self._run, name, str(value)[:6000] or "none")

    def append(self, row: Mapping) -> None:
        for name, value in numbers_of(row).items():
            self._client.log_metric(self._run, name, value, step=int(row["step"]))

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Wandb:
    def __init__(self, folder: Path, settings: Mapping, resumed_at: int | None):
        import wandb

        about = {"name": folder.name, "config": dict(settings), "dir": str(folder)}
        self._run = wandb.init(project=PROJECT, id=_id_of(folder), resume="allow", **about)

    def append(self, row: Mapping) -> None:
        self._run.log(numbers_of(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


class Trackio(Wandb):
    def __init__(self, folder: Path, settings: Mapping, resumed_at: int | None):
        import trackio

        name = f"{folder.name}-{_id_of(folder)}"
        about = {"config": dict(settings), "embed": False}
        self._run = trackio.init(project=PROJECT, name=name, resume="allow", **about)


# name, which is that of the extra too: (the package it needs, what makes it)
LOGGERS: dict[str, tuple[str, Callable]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "mlflow": ("mlflow", Mlflow),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
}


def check(names: Sequence[str]) -> None:
    """Raises `UserError` for an unknown logger, or one whose package is not installed."""
    for name in names:
        package = lookup(LOGGERS, name, "logger")[0]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--log {name} needs {package}: pip install 'cifar_jax[{name}]'")


def settings_of(config: Mapping) -> dict:
    """Returns a run's settings, from `config.json`'s contents, as {name: text, number or flag}."""
    flat = {**config["recipe"], "recipe": config["recipe_name"], "seed": config["seed"]}
    return {k: json.dumps(v) if isinstance(v, list) else v for k, v in flat.items()}


@contextlib.contextmanager
def opened(
    names: Sequence[str], folder: Path, config: Mapping, resume: bool, say: Callable[[str], None]
) -> Iterator[Callable[[Mapping], None]]:
    """Yields a function that hands a row to the loggers, which begin with the first one.

    What fails is told once, and that logger gets nothing more: no result needs it.

    Args:
      folder: the run directory.
      config: the contents of its `config.json`.
      resume: whether the run may go on from an earlier part; the first row's step says where.
    """
    alive = dict.fromkeys(names)

    def attempt(name: str, action: Callable, *arguments):
        try:
            return action(*arguments)
        except Exception as error:  # of a package that is not ours, of its server, of the disk
            logger = alive.pop(name)
            if logger is not None and action != logger.close:
                with contextlib.suppress(Exception):
                    logger.close()
            say(f"warning: --log {name}: {one_line(error)}; the run goes on without")

    def append(row: Mapping) -> None:
        # Rows of a training are written before its save, the test's after.
        resumed_at = int(row["step"]) - (row["kind"] != "test") if resume else None
        for name in list(alive):
            if alive[name] is None:
                make = LOGGERS[name][1]
                logger = attempt(name, make, folder, settings_of(config), resumed_at)
                if logger is None:
                    continue
                alive[name] = logger
            attempt(name, alive[name].append, row)

    try:
        yield append
    finally:
        for name, logger in list(alive.items()):
            if logger is not None:
                attempt(name, logger.close)
