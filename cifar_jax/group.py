"""Training a group of runs together: the loop of `training.py` over a replica axis.

Every run of the group is what it would be by itself; the group shares its programs, its log and
its checkpoints, and saves at the same moments.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cifar_jax import feed, from_recipe, optimizers, parallel, replicas, report, steps
from cifar_jax.checkpoints import Checkpoints
from cifar_jax.clock import seconds_since_start
from cifar_jax.errors import UserError
from cifar_jax.progress import Progress
from cifar_jax.records import MetricsLog, read_metrics
from cifar_jax.run import Run
from cifar_jax.training import Interrupted, Print

# Longer than one run's chunk: every replica's state goes in and out of each. 256 runs of the
# tutorial on two cores: 6,083 images/s in chunks of 0.3 s, 12,072 of 1 s, 11,992 of 4 s.
CHUNK_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of groups of one recipe, for any number of replicas."""

    form: str
    mesh: Mesh
    train: Callable
    evaluate: Callable
    predict: Callable


def make_programs(run: Run, form: str, mesh: Mesh, step: Callable | None = None) -> Programs:
    """Builds the programs; nothing is compiled yet.

    Args:
      run: any of the runs.
      form: `map` or `vmap` (`replicas.choose_form`).
      step: `step(state, batch, **numbers)`; by default the recipe's, without numbers.
    """
    recipe = run.config.recipe
    step = step or from_recipe.step_of(recipe, run.model, run.steps_per_epoch)
    parts = {"model": run.model, "preprocess": from_recipe.preprocess_of(recipe)}
    return Programs(
        form=form,
        mesh=mesh,
        train=replicas.compile_training(step, form, mesh, recipe.remat),
        evaluate=replicas.compile_evaluation(functools.partial(steps.eval_step, **parts), mesh),
        predict=replicas.compile_prediction(functools.partial(steps.predict_step, **parts), mesh),
    )


@dataclasses.dataclass
class Position:
    """Where a group stands: `step` steps into `epoch` (from 1).

    Attributes:
      arrays: {"state", "record", "best"}, [R, ...] on the mesh, R padded to divide by it; `best`
        is the states of each run's lowest validation loss so far, {} without validation.
      best_rows: each run's `epoch` row of that loss, None before there is one.
      diverged: {run's place in the group: its last step, counted from 1}.
    """

    epoch: int
    step: int
    arrays: dict[str, Any]
    best_rows: list[dict | None]
    diverged: dict[int, int]

    def alive(self) -> np.ndarray:
        """bool [runs]: which runs go on."""
        return np.array([i not in self.diverged for i in range(len(self.best_rows))])


class Group:
    """One group of runs with a directory of its own; a context manager.

    Args:
      members: a `Run` for each, all of the same programs and shapes.
      numbers: keyword arguments of the step by name, each [R]: what a sweep varies.
      folder: for the group's `metrics.jsonl` (rows of a single run and their run's `member`, its
        place in the group) and `checkpoints`.
      stop, say: as in `training.train`.
      bar: a `Progress` over the images of all groups.
      names: what messages call the members, by default after their seeds.
    """

    def __init__(
        self,
        members: Sequence[Run],
        programs: Programs,
        folder: Path,
        stop: Callable[[], int | None],
        say: Print,
        bar: Progress,
        numbers: dict[str, np.ndarray] | None = None,
        names: Sequence[str] | None = None,
    ):
        self.members, self.programs, self.run = members, programs, members[0]
        self.recipe, self.mesh = self.run.config.recipe, programs.mesh
        self.names = names or [f"seed {member.config.seed}" for member in members]
        self.stop, self.say, self.bar = stop, say, bar
        self.log = MetricsLog(folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.chunks = parallel.Chunks(self.run.steps_per_epoch, seconds=CHUNK_SECONDS)
        self.saved_at = time.monotonic()
        self.numbers = self._place(numbers or {})
        self.data: dict[str, jax.Array] = {}
        self.validation_order = None
        if len(self.run.validation):
            batch = min(self.recipe.eval_batch_size, len(self.run.validation))
            orders = [feed.batches(member.validation, batch) for member in members]
            self.validation_order = self._place(np.stack(orders))

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error) -> None:
        try:
            self.checkpoints.__exit__(*error)
        finally:
            self.log.close()

    def _place(self, tree: Any) -> Any:
        return replicas.split_evenly(tree, self.mesh)

    def rows(self) -> list[list[dict]]:
        """Returns each run's rows, as its own log would hold them."""
        found: list[list[dict]] = [[] for _ in self.members]
        for row in read_metrics(self.log.path):
            found[row["member"]].append({k: v for k, v in row.items() if k != "member"})
        return found

    def train(self) -> Position:
        """Trains to the last epoch, or until no run is left, going on from the newest checkpoint.

        Raises:
          Interrupted: stopped by a signal, after saving.
          UserError: a full disk, or no good checkpoint among those there.
        """
        with self.run.clock("data"):
            split = self.run.dataset.splits["train"]
            self.data = replicas.to_all(feed.on_host(split.images, split.labels), self.mesh)
        position = self._begin()
        while position.epoch <= self.recipe.epochs and position.alive().any():
            position = self._epoch(position)
        with self.run.clock("saving"):
            self.checkpoints.wait()
        return position

    def images_done(self, at: Position) -> int:
        """Returns how many images all runs have been trained on."""
        in_epoch = min(at.step * self.recipe.batch_size, len(self.run.training))
        return len(self.members) * ((at.epoch - 1) * len(self.run.training) + in_epoch)

    def _begin(self) -> Position:
        count, has_best = len(self.members), self.validation_order is not None
        if self.checkpoints.committed():
            return self._restored(count, has_best)
        self.log.truncate(0)
        with self.run.clock("initialisation"):
            states = [member.create(initial=member.initial) for member in self.members]
            state = self._place(replicas.stack(states))
        arrays = {"state": state, "record": self._empty_record()}
        # Not an alias: both are donated.
        arrays["best"] = self._place(replicas.stack(states)) if has_best else {}
        return Position(1, 0, arrays, [None] * count, {})

    def _restored(self, count: int, has_best: bool) -> Position:
        one = from_recipe.abstract_payload(self.run.shapes, self.run.steps_per_epoch)
        one["best"] = self.run.shapes if has_best else {}
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), one)
        with self.run.clock("restoring"):
            try:
                found = self.checkpoints.restore(wanted)
            except UserError as error:
                raise UserError(f"{error}; give --overwrite to start anew") from None
            arrays = self._place(found.state)
        for line in found.skipped:
            self.say(f"warning: {line}")
        extra = found.extra
        missing = self.log.truncate(extra["metrics_offset"])
        if missing:
            self.say(f"warning: {self.log.path} lost {missing} bytes of rows; the runs go on")
        self.run.clock.load(extra["seconds"])
        diverged = {int(i): step for i, step in extra["diverged"].items()}
        at = Position(extra["epoch"], extra["step"], arrays, extra["best_rows"], diverged)
        self.say(f"Going on from step {found.step} (epoch {at.epoch}, step {at.step})")
        self.bar.skip(self.images_done(at))
        return at

    def _empty_record(self) -> dict[str, jax.Array]:
        shape = (len(self.members), self.run.steps_per_epoch)
        return self._place({name: np.zeros(shape, np.float32) for name in parallel.RECORD_FIELDS})

    def _epoch(self, at: Position) -> Position:
        """Trains to the end of the epoch, validates, writes its rows and saves."""
        run, clock, began = self.run, self.run.clock, time.monotonic()
        with clock("training"):
            size = self.recipe.batch_size
            orders = [
                feed.epoch_order(member.keys["order"], at.epoch, member.training, size)
                for member in self.members
            ]
            order = self._place(np.stack(orders))
        while at.step < run.steps_per_epoch and at.alive().any():
            length, started = self.chunks.next(run.steps_per_epoch - at.step), time.monotonic()
            with clock("training"):
                at, host = self._chunk(at, order, length)
                self.chunks.ran(length, time.monotonic() - started)
            clock.first_step = clock.first_step or seconds_since_start()
            self._after_chunk(at, host, length)
        return self._finish_epoch(at, began)

    def _chunk(self, at: Position, order: jax.Array, length: int):
        """Returns the position `length` steps on, and the record [runs, steps] on the host."""
        padded = order.shape[0] - len(self.members)
        alive = self._place(np.concatenate([at.alive(), np.zeros(padded, bool)]))
        own = (at.arrays["state"], at.arrays["record"], alive, order, self.numbers)
        state, record, alive = self.programs.train(own, self.data, at.step, at.step, length)
        host = {name: np.asarray(values)[: len(self.members)] for name, values in record.items()}
        arrays = {**at.arrays, "state": state, "record": record}
        at = dataclasses.replace(at, step=at.step + length, arrays=arrays)
        self._note_diverged(at, host, np.asarray(alive))
        return at, host

    def _note_diverged(self, at: Position, host: dict, alive: np.ndarray) -> None:
        for i in np.flatnonzero(at.alive() & ~alive[: len(self.members)]):
            last = int(np.flatnonzero(~np.isfinite(host["loss"][i]))[0])
            self._freeze(at, int(i), (at.epoch - 1) * self.run.steps_per_epoch + last + 1, "loss")

    def _freeze(self, at: Position, i: int, step: int, what: str) -> None:
        at.diverged[i] = step
        self.say(
            f"warning: {self.names[i]}: {what} not finite at step {step}; frozen, the others go on"
        )

    def _after_chunk(self, at: Position, host: dict, length: int) -> None:
        before, alive = at.step - length, np.flatnonzero(at.alive())
        first_step = (at.epoch - 1) * self.run.steps_per_epoch
        where = {"epoch": at.epoch, "first_step": first_step}
        means = host["loss"][:, : at.step] / np.maximum(host["count"][:, : at.step], 1)
        for i in alive:
            every = self.members[i].config.recipe.log_every
            for values in report.window_rows(means[i], before, at.step, every, **where):
                self.log.append("window", member=int(i), **values)
        images = int(host["count"][:, before : at.step].sum(axis=1).max()) * len(self.members)
        loss = float(means[alive, before:].mean()) if len(alive) else np.nan
        self.bar.update(images, epoch=at.epoch, loss=loss)
        signal = self.stop()
        due = time.monotonic() - self.saved_at > 60 * self.run.options.save_minutes
        if at.step < self.run.steps_per_epoch and (signal or due):
            self._save(at, block=bool(signal))
            if signal:
                raise Interrupted(signal, first_step + at.step)

    def _finish_epoch(self, at: Position, began: float) -> Position:
        run, state = self.run, at.arrays["state"]
        step, sums = at.epoch * run.steps_per_epoch, None
        finite = np.asarray(replicas.all_finite(state.params))[: len(self.members)]
        for i in np.flatnonzero(at.alive() & ~finite):
            self._freeze(at, int(i), step, "weights")
        if self.validation_order is not None:
            with run.clock("validation"):
                own = (steps.inference_variables(state), self.validation_order)
                sums = jax.device_get(self.programs.evaluate(own, self.data))
        record = jax.device_get(at.arrays["record"])
        timing = {"seconds": round(time.monotonic() - began, 3)}
        improved = np.zeros(at.arrays["record"]["loss"].shape[0], bool)
        rows = []
        for i in np.flatnonzero(at.alive()).tolist():
            values = report.epoch_row(
                {name: column[i] for name, column in record.items()},
                sums and {name: sums[name][i] for name in parallel.RECORD_FIELDS},
                epoch=at.epoch,
                step=step,
                learning_rate=self._rate(self.members[i].config.recipe, step - 1),
            )
            rows.append(self.log.append("epoch", member=i, **values, timing=timing))
            former = at.best_rows[i]
            at.best_rows[i] = report.best_epoch([row for row in (former, rows[-1]) if row])
            improved[i] = at.best_rows[i] is rows[-1]
        if rows:
            self.say(report.epochs_line(rows, self.recipe.epochs))
        arrays = {**at.arrays, "record": self._empty_record()}
        if improved.any():
            arrays["best"] = replicas.keep(self._place(improved), state, arrays["best"])
        at = dataclasses.replace(at, epoch=at.epoch + 1, step=0, arrays=arrays)
        signal = self.stop()
        self._save(at, block=bool(signal))
        if signal:
            raise Interrupted(signal, step)
        return at

    @functools.cached_property
    def _rate(self) -> Callable:
        return functools.cache(
            lambda recipe, step: optimizers.learning_rate(recipe, self.run.steps_per_epoch, step)
        )

    def _save(self, at: Position, block: bool) -> None:
        with self.run.clock("saving"):
            self.log.sync()
            extra = {
                "epoch": at.epoch,
                "step": at.step,
                "metrics_offset": self.log.offset(),
                "seconds": self.run.clock.seconds(),
                "best_rows": at.best_rows,
                "diverged": at.diverged,
            }
            step = (at.epoch - 1) * self.run.steps_per_epoch + at.step
            count = len(self.members)
            whole = jax.tree.map(lambda x: x if x.shape[0] == count else x[:count], at.arrays)
            self.checkpoints.save(step, whole, extra, block=block)
        self.saved_at = time.monotonic()
