"""The training loop: chunks of steps, validation, checkpoints and rows, for one run or for several.

A run is a function of its `Config` and its data. Everything here that depends on time (chunk
lengths, saves between epochs, interruptions) decides when the host looks, never what is computed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cifar_jax import optimizers, steps
from cifar_jax.checkpoints.save_restore import Checkpoints
from cifar_jax.parallel import agreement, programs
from cifar_jax.reporting import console
from cifar_jax.reporting.metrics_log import MetricsLog, read_metrics
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.progress import Progress
from cifar_jax.runtime.timing import seconds_since_start
from cifar_jax.settings import Recipe
from cifar_jax.training.runs import Arrays, Chunk, OneRun, Print, Runs
from cifar_jax.training.setup import Run
from cifar_jax.training.workdir import Config


class Interrupted(Exception):
    """A signal asked to stop; all is saved. `args` is (signal number, step), and `at` where the
    run stands, where one was in training."""

    def __init__(self, signal: int | None, step: int, at: Position | None = None):
        super().__init__(signal, step)
        self.at = at


@dataclasses.dataclass
class Position:
    """Where runs stand: `step` steps into `epoch` (from 1).

    Attributes:
      arrays: what is on the devices.
      best_rows: each run's `epoch` row of its lowest validation loss, None before there is one.
      diverged: {member: its last step, counted from 1}.
      patience: of the recipe.
    """

    epoch: int
    step: int
    arrays: Arrays
    best_rows: list[dict | None]
    diverged: dict[int, int]
    patience: int = 0

    def sound(self) -> np.ndarray:
        """bool [R]: which runs have not diverged."""
        return np.array([i not in self.diverged for i in range(len(self.best_rows))])

    def alive(self) -> np.ndarray:
        """bool [R]: which runs go on: those that `patience` has ended do not."""
        best = np.array([row["epoch"] if row else 0 for row in self.best_rows])
        patient = not self.patience or self.epoch - 1 - best < self.patience
        return self.sound() & patient


# Sees the config of a run and each row of its log, when it is written.
Watch = Callable[[Config, dict], None]


class Loop:
    """Trains runs, writing `metrics.jsonl` and `checkpoints` in a folder; a context manager.

    Args:
      runs: what is trained.
      stop: returns the number of a signal that asks to stop, or None.
      bar: a `Progress` over the images of all runs, and perhaps of others.
      watch: sees every row.

    Raises (from `begin` and `train`):
      Interrupted: stopped by a signal, after saving.
      UserError: a full disk, no good checkpoint among those there, or a run alone diverged.
    """

    def __init__(
        self,
        runs: Runs,
        folder: Path,
        stop: Callable[[], int | None],
        bar: Progress,
        watch: Watch | None = None,
    ):
        self.runs, self.run, self.recipe = runs, runs.run, runs.recipe
        self.stop, self.bar, self.watch = stop, bar, watch or (lambda config, row: None)
        self.steps = self.run.steps_per_epoch
        self.lengths = programs.Chunks(self.steps, seconds=runs.chunk_seconds)
        self.saved_at = time.monotonic()
        self.log = MetricsLog(folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *error) -> None:
        try:
            self.checkpoints.__exit__(*error)
        finally:
            self.log.close()

    def rows(self) -> list[list[dict]]:
        """Returns each run's rows, as its own log would hold them."""
        found: list[list[dict]] = [[] for _ in self.runs.members]
        for row in read_metrics(self.log.path):
            found[row.pop("member", 0)].append(row)
        return found

    def begin(self, resume: bool = True) -> Position:
        """Returns where to train from: the newest good checkpoint, or the start where there is
        none or `resume` is False."""
        self.runs.load()
        if resume and self.checkpoints.committed():
            return self._restored()
        self.log.truncate(0)
        nothing = [None] * len(self.runs.members)
        return Position(1, 0, self.runs.begin(), nothing, {}, self.recipe.patience)

    def _restored(self) -> Position:
        say = self.runs.say
        with self.run.clock("restoring"):
            try:
                found = self.checkpoints.restore(self.runs.abstract_payload())
            except UserError as error:
                raise UserError(f"{error}; give --overwrite to start anew") from None
            arrays = self.runs.restored(found.state)
        for line in found.skipped:
            say(f"warning: {line}")
        extra = found.extra
        missing = self.log.truncate(extra["metrics_offset"])
        if missing:
            who = "run goes" if self.runs.alone else "runs go"
            say(f"warning: {self.log.path} lost {missing} bytes of earlier rows; the {who} on")
        self.run.clock.load(extra)
        # A run of an older version has its best epoch in its log.
        best_rows = extra.get("best_rows") or [console.best_epoch(rows) for rows in self.rows()]
        diverged = {int(i): step for i, step in extra.get("diverged", {}).items()}
        where = extra["epoch"], extra["step"]
        at = Position(*where, arrays, best_rows, diverged, self.recipe.patience)
        say(f"Going on from step {found.step} (epoch {at.epoch}, step {at.step})")
        epoch = self.run.config.images_per_epoch
        images = (at.epoch - 1) * epoch + min(at.step * self.recipe.batch_size, epoch)
        self.bar.skip(len(self.runs.members) * images)
        return at

    def train(self, at: Position) -> Position:
        """Trains to the recipe's last epoch, or until no run is left."""
        while at.epoch <= self.recipe.epochs and at.alive().any():
            at = self._epoch(at)
        if at.patience:
            self._say_ended(at)
        with self.run.clock("saving"):
            self.checkpoints.wait()
        return at

    def _say_ended(self, at: Position) -> None:
        """Says after which epochs `patience` has ended runs."""
        best = [at.best_rows[i] for i in np.flatnonzero(at.sound())]
        found = sorted(last_epoch(self.recipe, row) for row in best)
        early = [epoch for epoch in found if epoch < self.recipe.epochs]
        if early:
            who = "Ended" if self.runs.alone else f"{len(early)} of {len(found)} runs ended"
            when = f"{early[0]}" if early[0] == early[-1] else f"{early[0]} to {early[-1]}"
            epochs = console.counted(at.patience, "epoch")
            self.runs.say(f"{who} after epoch {when}: no lower validation loss in {epochs}")

    def _epoch(self, at: Position) -> Position:
        """Trains to the end of the epoch, validates, writes its rows and saves."""
        began = time.monotonic()
        chunks = self.runs.chunks(at.epoch, at.step, self.lengths)
        while at.step < self.steps and at.alive().any():
            at = self._chunk(at, chunks)
        return self._finish_epoch(at, began)

    def _chunk(self, at: Position, chunks: Iterator[Chunk]) -> Position:
        """Trains the next chunk, and looks at what came of it."""
        clock, before = self.run.clock, at.step
        with clock("training"):
            chunk = next(chunks)
            began = time.monotonic()
            arrays = self.runs.train(at.arrays, at.alive(), chunk)
            metrics = self.runs.on_host(arrays.step_metrics)
            self.lengths.ran(chunk.length, time.monotonic() - began)
        clock.first_step = clock.first_step or seconds_since_start()
        at = dataclasses.replace(at, step=before + chunk.length, arrays=arrays)
        self._look_at_losses(at, metrics["loss"], before)
        self._log_windows(at, metrics, before)
        signal = self.stop()
        due = time.monotonic() - self.saved_at > 60 * self.run.options.save_minutes
        due = agreement.broadcast(due)
        if at.step < self.steps and (signal or due):
            self._save(at, block=bool(signal))
            if signal:
                raise Interrupted(signal, (at.epoch - 1) * self.steps + at.step, at)
        return at

    def _look_at_losses(self, at: Position, losses: np.ndarray, before: int) -> None:
        for i in np.flatnonzero(at.alive()):
            bad = np.flatnonzero(~np.isfinite(losses[i, before : at.step]))
            if len(bad):
                step = (at.epoch - 1) * self.steps + before + int(bad[0]) + 1
                self._note_diverged(at, int(i), "loss", step)

    def _look_at_weights(self, at: Position, step: int) -> None:
        """A step of finite loss can still make weights infinite, which only the next would show."""
        for i in np.flatnonzero(at.sound() & ~self.runs.finite(at.arrays)):
            self._note_diverged(at, int(i), "weights", step)

    def _note_diverged(self, at: Position, i: int, what: str, step: int) -> None:
        at.diverged[i] = step
        self.runs.diverged(i, what, step, self.checkpoints.latest_step)

    def _log_windows(self, at: Position, metrics: dict[str, np.ndarray], before: int) -> None:
        alive = np.flatnonzero(at.alive())
        where = {"epoch": at.epoch, "first_step": (at.epoch - 1) * self.steps}
        counts = metrics["count"][:, : at.step]
        means = metrics["loss"][:, : at.step] / np.maximum(counts, 1)
        for i in alive.tolist():
            every = self.runs.members[i].config.recipe.log_every
            for values in console.window_rows(means[i], before, at.step, every, **where):
                row = self.log.append("window", **self.runs.label(i), **values)
                self.runs.show_window(row)
                self.watch(self.runs.members[i].config, row)
        images = int(counts[:, before:].sum(axis=1).max()) * len(self.runs.members)
        loss = float(means[alive, before:].mean()) if len(alive) else np.nan
        self.bar.update(images, epoch=f"{at.epoch}/{self.recipe.epochs}", loss=loss)

    def _finish_epoch(self, at: Position, began: float) -> Position:
        runs, step = self.runs, at.epoch * self.steps
        if not runs.alone:
            self._look_at_weights(at, step)
        sums = runs.validate(at.arrays)
        metrics = runs.on_host(at.arrays.step_metrics)
        timing = {"seconds": round(time.monotonic() - began, 3)}
        rows, improved, rates = [], np.zeros(len(runs.members), bool), {}
        for i in np.flatnonzero(at.alive()).tolist():
            recipe = runs.members[i].config.recipe
            if recipe not in rates:
                rates[recipe] = optimizers.learning_rate(recipe, self.steps, step - 1)
            values = console.epoch_row(
                {name: column[i] for name, column in metrics.items()},
                sums and {name: sums[name][i] for name in programs.METRICS},
                epoch=at.epoch,
                step=step,
                learning_rate=rates[recipe],
            )
            rows.append(self.log.append("epoch", **runs.label(i), **values, timing=timing))
            former = at.best_rows[i]
            at.best_rows[i] = console.best_epoch([row for row in (former, rows[-1]) if row])
            improved[i] = at.best_rows[i] is rows[-1]
        found = [row.get("validation_accuracy") for row in rows]
        self.bar.validated(float(np.mean(found)) if rows and None not in found else None)
        runs.show_epoch(rows, improved)
        for row in rows:
            self.watch(runs.members[row.get("member", 0)].config, row)
        arrays = runs.next_epoch(at.arrays, improved)
        at = dataclasses.replace(at, epoch=at.epoch + 1, step=0, arrays=arrays)
        signal = self.stop()
        metric = rows[0].get("validation_loss") if runs.alone else None
        self._save(at, block=bool(signal), metric=metric)
        if signal:
            raise Interrupted(signal, step, at)
        return at

    def _save(self, at: Position, block: bool, metric: float | None = None) -> None:
        step = (at.epoch - 1) * self.steps + at.step
        with self.run.clock("saving"):
            self.log.sync()
            extra = {
                "epoch": at.epoch,
                "step": at.step,
                "metrics_offset": self.log.offset(),
                "best_rows": at.best_rows,
                **self.run.clock.saved(),
            }
            if self.runs.alone:
                self._look_at_weights(at, step)
            else:
                extra["diverged"] = at.diverged
            payload = self.runs.payload(at.arrays)
            self.checkpoints.save(step, payload, extra, metric=metric, block=block)
        self.saved_at = time.monotonic()


def train(
    run: Run,
    workdir: Path,
    stop: Callable[[], int | None],
    say: Print,
    resume: bool,
    watch: Watch | None = None,
    keep: bool = False,
) -> tuple[steps.TrainState, dict]:
    """Trains a run to the recipe's last epoch, going on from the newest checkpoint if there is one.

    Args:
      workdir: the run directory, opened by `open_workdir`.
      stop: returns the number of a signal that asks to stop, or None.
      say: prints a line.
      resume: whether there may be checkpoints to go on from.
      watch: sees every row.
      keep: a run that is stopped is returned as it is, in place of `Interrupted`.

    Returns:
      The state to test (best or last, as the recipe says), and what `trained` returns, of a run
      that was stopped with "stopped": True.

    Raises:
      Interrupted: stopped by a signal, after saving.
      UserError: non-finite loss, a full disk, or no good checkpoint among those there.
    """
    recipe = run.config.recipe
    with Progress(recipe.epochs * run.config.images_per_epoch, shown=agreement.is_leader()) as bar:
        printer = bar.print if say is print else say
        runs = OneRun(run, printer)
        with Loop(runs, workdir, stop, bar, watch) as loop:
            if resume and not loop.checkpoints.committed():
                printer("No checkpoint was saved before: starting from the first step")
            at = loop.begin(resume)
            runs.events = run.log
            try:
                at = loop.train(at)
            except Interrupted as interrupted:
                if not keep:
                    raise
                at = interrupted.at
            state, (best,) = at.arrays.state, at.best_rows
            found = trained(run, best)
            if at.epoch <= found["epochs"]:
                found |= _stopped(run, at, best)
            if recipe.select_best and (best or "stopped" not in found):
                chosen = loop.checkpoints.restore(runs.payload(at.arrays), which="best")
                state, found["tested_epoch"] = chosen.state["state"], chosen.extra["epoch"] - 1
                if best and found["tested_epoch"] != best["epoch"]:
                    tested = f"{found['tested_epoch']} is tested"
                    for line in [*chosen.skipped, f"the best epoch was {best['epoch']}; {tested}"]:
                        printer(f"warning: {line}")
    signal = stop()
    if signal and not keep:
        raise Interrupted(signal, found["steps"])
    return state, found


def trained(run: Run, best: dict | None) -> dict:
    """Returns what `summary.json` holds of a run's training; `best`: its best epoch's row."""
    recipe = run.config.recipe
    epochs = last_epoch(recipe, best)
    return {
        "best_epoch": best["epoch"] if best else None,
        "best_validation_loss": best["validation_loss"] if best else None,
        "tested_epoch": best["epoch"] if best and recipe.select_best else epochs,
        "epochs": epochs,
        "steps": epochs * run.steps_per_epoch,
        **({"ended_early": epochs < recipe.epochs} if recipe.patience else {}),
    }


def last_epoch(recipe: Recipe, best: dict | None) -> int:
    """Returns after which epoch a run ends, given its best epoch's row of all that it has."""
    if not recipe.patience:
        return recipe.epochs
    return min((best["epoch"] if best else 0) + recipe.patience, recipe.epochs)


def _stopped(run: Run, at: Position, best: dict | None) -> dict:
    """What of `trained` is otherwise where a run was stopped."""
    done = at.epoch - 1
    return {
        "tested_epoch": best["epoch"] if best and run.config.recipe.select_best else done,
        "epochs": done,
        "steps": done * run.steps_per_epoch + at.step,
        "stopped": True,
    }
