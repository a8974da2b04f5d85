"""The training loop: chunks of steps, validation, checkpoints, rows, and the test at the end.

A run is a function of its `Config` and its data. Everything here that depends on time (chunk
lengths, saves between epochs, interruptions) decides when the host looks, never what is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from cifar_jax import (
    feed,
    from_recipe,
    hardware,
    optimizers,
    parallel,
    report,
    resident,
    steps,
    together,
)
from cifar_jax.checks import check_first_forward, check_loss, check_weights, stuck_advice
from cifar_jax.clock import seconds_since_start
from cifar_jax.datasets import record_source
from cifar_jax.errors import UserError
from cifar_jax.progress import Progress
from cifar_jax.records import MetricsLog, TensorBoardLog, read_metrics
from cifar_jax.run import Run

Print = Callable[[str], None]


class Interrupted(Exception):
    """A signal asked the run to stop; all is saved. `args` is (signal number, step)."""


def train(
    run: Run, workdir: Path, stop: Callable[[], int | None], say: Print, resume: bool
) -> tuple[steps.TrainState, dict]:
    """Trains to the recipe's last epoch, going on from the newest checkpoint if there is one.

    Args:
      workdir: the run directory, opened by `open_workdir`.
      stop: returns the number of a signal that asks to stop, or None.
      say: prints a line.
      resume: whether there may be checkpoints to go on from.

    Returns:
      The state to test (best or last, as the recipe says), and {"best_epoch",
      "best_validation_loss", "epochs", "steps"}.

    Raises:
      Interrupted: stopped by a signal, after saving.
      UserError: non-finite loss, a full disk, or no good checkpoint among those there.
    """
    recipe, clock = run.config.recipe, run.clock
    total = recipe.epochs * run.steps_per_epoch
    with (
        MetricsLog(workdir / "metrics.jsonl") as log,
        together.open_checkpoints(workdir / "checkpoints") as checkpoints,
    ):
        position = _begin(run, checkpoints, log, say, resume)
        clock.load(position.seconds)
        data = _resident(run)
        images_done = _images(run, position)
        with (
            Progress(
                recipe.epochs * len(run.training), done=images_done, shown=together.is_leader()
            ) as bar,
            _tensorboard(run, workdir, position, say) as events,
        ):
            printer = bar.print if say is print else say
            loop = _Loop(run, checkpoints, log, events, data, stop, printer, bar)
            while position.epoch <= recipe.epochs:
                position = loop.epoch(position)
        with clock("saving"):
            checkpoints.wait()
        best = report.best_epoch(read_metrics(log.path, "epoch"))
        state, tested = position.state, recipe.epochs
        if recipe.select_best:
            payload = from_recipe.payload(position.state, position.record)
            chosen = checkpoints.restore(payload, which="best")
            state, tested = chosen.state["state"], chosen.extra["epoch"] - 1
            if best and tested != best["epoch"]:
                instead = f"the best epoch was {best['epoch']}; {tested} is tested"
                for line in [*chosen.skipped, instead]:
                    say(f"warning: {line}")
    signal = stop()
    if signal:
        raise Interrupted(signal, total)
    found = {
        "best_epoch": best["epoch"] if best else None,
        "best_validation_loss": best["validation_loss"] if best else None,
        "tested_epoch": tested,
        "epochs": recipe.epochs,
        "steps": total,
    }
    return state, found


@dataclasses.dataclass
class Position:
    """Where a run stands: `step` steps into `epoch` (from 1), with that epoch's record."""

    epoch: int
    step: int
    state: steps.TrainState
    record: dict[str, jax.Array]
    seconds: dict[str, float]


def _images(run: Run, position: Position) -> int:
    in_epoch = min(position.step * run.config.recipe.batch_size, len(run.training))
    return (position.epoch - 1) * len(run.training) + in_epoch


@contextlib.contextmanager
def _tensorboard(run: Run, workdir: Path, at: Position, say: Print) -> Iterator[Callable]:
    """Yields a function that writes a row as TensorBoard events where they are asked for. Of what
    cannot be written it warns once: no result needs it."""
    if not run.options.tensorboard:
        yield lambda row: None
        return
    step = (at.epoch - 1) * run.steps_per_epoch + at.step
    log, told = TensorBoardLog(workdir / "tensorboard", resumed_at=step or None), False

    def attempt(action: Callable, *arguments) -> None:
        nonlocal told
        try:
            action(*arguments)
        except UserError as error:
            if not told:
                say(f"warning: {error}; the run goes on without")
            told = True

    try:
        yield functools.partial(attempt, log.append)
    finally:
        attempt(log.close)


def _begin(run: Run, checkpoints, log: MetricsLog, say: Print, resume: bool):
    """Returns the position to train from: the newest good checkpoint, or the start."""
    if resume and checkpoints.committed():
        abstract = from_recipe.abstract_payload(run.shapes, run.steps_per_epoch)
        with run.clock("restoring"):
            try:
                found = checkpoints.restore(abstract)
            except UserError as error:
                raise UserError(f"{error}; give --overwrite to start anew") from None
        for line in found.skipped:
            say(f"warning: {line}")
        extra = found.extra
        missing = log.truncate(extra["metrics_offset"])
        if missing:
            say(f"warning: {log.path} lost {missing} bytes of earlier rows; the run goes on")
        say(f"Going on from step {found.step} (epoch {extra['epoch']}, step {extra['step']})")
        return Position(
            extra["epoch"],
            extra["step"],
            *jax.device_put((found.state["state"], found.state["record"])),
            extra["seconds"],
        )
    if resume:
        say("No checkpoint was saved before: starting from the first step")
    log.truncate(0)
    state = together.share(run.create(initial=run.initial))
    say(check_first_forward(run, state))
    return Position(1, 0, state, parallel.empty_record(run.steps_per_epoch), {})


def _resident(run: Run) -> dict[str, jax.Array] | None:
    """The training split on the device; None where only the streamed feed will read it."""
    if run.place == "stream" and not len(run.validation):
        return None
    split = run.dataset.splits["train"]
    with run.clock("data"):
        if run.place == "split":
            return resident.put_split(split.images, split.labels, run.mesh)
        if run.place == "resident":
            return resident.put_whole(feed.on_host(split.images, split.labels), run.mesh)
        # Validation reads its own images only; positions are then 0, 1, 2 ...
        images, labels = split.images[run.validation], split.labels[run.validation]
        if together.several():
            return resident.put_split(images, labels, run.mesh)
        return feed.to_device(images, labels)


class _Loop:
    """One epoch after another; it owns no state of the run, `Position` does."""

    def __init__(self, run, checkpoints, log, events, data, stop, say, bar):
        self.run, self.checkpoints, self.data = run, checkpoints, data
        self.log, self.events = log, events
        self.stop, self.say, self.bar = stop, say, bar
        self.recipe = run.config.recipe
        self.chunks = parallel.Chunks(run.steps_per_epoch)
        self.saved_at = time.monotonic()
        positions = run.validation
        if run.place == "stream":
            positions = np.arange(len(run.validation), dtype=np.int32)
        size = min(self.recipe.eval_batch_size, len(positions))
        self.validation_order = feed.batches(positions, size) if size else None

    def epoch(self, at: Position) -> Position:
        """Trains to the end of the epoch, validates, writes its row and saves."""
        run, recipe, clock = self.run, self.recipe, self.run.clock
        started = time.monotonic()
        with clock("training"):
            order = feed.epoch_order(run.keys["order"], at.epoch, run.training, recipe.batch_size)
        source = self._chunks(order, at.step)
        while at.step < len(order):
            with clock("training"):
                length, data, rows, row = next(source)
                began = time.monotonic()
                state, record = run.train_many(
                    at.state, at.record, data, rows, row, at.step, length
                )
                host = {name: np.array(values) for name, values in record.items()}
                self.chunks.ran(length, time.monotonic() - began)
            if clock.first_step is None:
                clock.first_step = seconds_since_start()
            before, at = (
                at.step,
                dataclasses.replace(at, step=at.step + length, state=state, record=record),
            )
            self._after_chunk(at, host, before, order)
        return self._finish_epoch(at, host, started)

    def _chunks(self, order, start):
        """Yields (length, data, order, its first row) until the epoch's end."""
        run = self.run
        if run.place != "stream":
            order = resident.put_whole(order, run.mesh)
            while start < len(order):
                length = int(together.numbers(self.chunks.next(len(order) - start))[0, 0])
                yield length, self.data, order, start
                start += length
            return
        per_chunk, where = self.chunks.streamed(order.shape[1]), hardware.everywhere(run.mesh)
        source = record_source(run.dataset.splits["train"])
        several = together.several()
        if several:  # a process reads the images of its own devices only
            order = feed.columns(order, jax.process_index(), jax.process_count(), run.devices)
        for data, rows, length in feed.stream(source, order, start, per_chunk):
            if several:
                yield length, *resident.put_own(data, rows, run.mesh), 0
            else:
                yield length, jax.device_put(data, where), jax.device_put(rows), 0

    def _after_chunk(self, at: Position, host: dict, before: int, order: np.ndarray) -> None:
        run, recipe = self.run, self.recipe
        first_step = (at.epoch - 1) * len(order)
        check_loss(host, before, at.step, first_step, recipe, len(order), self.checkpoints)
        losses = host["loss"][: at.step] / host["count"][: at.step]
        where = {"epoch": at.epoch, "first_step": first_step}
        for values in report.window_rows(losses, before, at.step, recipe.log_every, **where):
            self.say(report.window_line(self._row("window", **values), len(order)))
        images = int(host["count"][before : at.step].sum())
        self.bar.update(images, epoch=at.epoch, loss=float(losses[before:].mean()))
        signal = self.stop()
        due = time.monotonic() - self.saved_at > 60 * run.options.save_minutes
        due = bool(together.numbers(due)[0, 0])
        if at.step < len(order) and (signal or due):
            self._save(at, metric=None, block=bool(signal))
        if signal and at.step < len(order):
            raise Interrupted(signal, first_step + at.step)

    def _row(self, kind: str, **values) -> dict:
        row = self.log.append(kind, **values)
        self.events(row)
        return row

    def _finish_epoch(self, at: Position, host: dict, started: float) -> Position:
        run, recipe = self.run, self.recipe
        step, sums = at.epoch * run.steps_per_epoch, None
        if self.validation_order is not None:
            with run.clock("validation"):
                variables = steps.inference_variables(at.state)
                sums = jax.device_get(run.evaluate(variables, self.data, self.validation_order))
        rate = optimizers.learning_rate(recipe, run.steps_per_epoch, step - 1)
        row = report.epoch_row(host, sums, epoch=at.epoch, step=step, learning_rate=rate)
        metric = row.get("validation_loss")
        row = self._row("epoch", **row, timing={"seconds": round(time.monotonic() - started, 3)})
        best = report.best_epoch(read_metrics(self.log.path, "epoch"))
        is_best = best is not None and best["epoch"] == at.epoch
        self.say(report.epoch_line(row, recipe.epochs, best=is_best))
        if at.epoch == 1:
            for line in stuck_advice(row["train_loss"], len(run.dataset.class_names)):
                self.say(line)
        record = parallel.empty_record(run.steps_per_epoch)
        at = dataclasses.replace(at, epoch=at.epoch + 1, step=0, record=record)
        signal = self.stop()
        self._save(at, metric=metric, block=bool(signal))
        if signal:
            raise Interrupted(signal, step)
        return at

    def _save(self, at: Position, metric: float | None, block: bool) -> None:
        run = self.run
        with run.clock("saving"):
            self.log.sync()
            extra = {
                "epoch": at.epoch,
                "step": at.step,
                "metrics_offset": self.log.offset(),
                "seconds": run.clock.seconds(),
            }
            step = (at.epoch - 1) * run.steps_per_epoch + at.step
            check_weights(at.state, step, run.config.recipe, run.steps_per_epoch, self.checkpoints)
            payload = from_recipe.payload(at.state, at.record)
            self.checkpoints.save(step, payload, extra, metric=metric, block=block)
        self.saved_at = time.monotonic()
