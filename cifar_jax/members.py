"""The ordinary run directories of a trained group: the test, checkpoints, rows and summary of each
of its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from cifar_jax import input_pipeline, replicas, steps
from cifar_jax.checkpoints.saving import Checkpoints
from cifar_jax.parallel import placement, programs
from cifar_jax.reporting import metrics_log
from cifar_jax.runtime import files
from cifar_jax.training import evaluation, loop, setup
from cifar_jax.training import summary as run_summary
from cifar_jax.training.loop import Position
from cifar_jax.training.runs import Group
from cifar_jax.training.setup import Run
from cifar_jax.training.workdir import write_json


@dataclasses.dataclass(frozen=True)
class TrainedGroup:
    """A group at the end of its training, with each run's rows as its own log would hold them."""

    group: Group
    at: Position
    rows: list[list[dict]]


def folder_of(workdir: Path, member: Run) -> Path:
    """Returns where in the directory of several runs one of them lies."""
    return workdir / f"seed-{member.config.seed}"


def write_members(trained: TrainedGroup, workdir: Path) -> dict[int, int]:
    """Tests a trained group and writes the directory of each of its runs.

    Returns:
      {seed: last step} of the runs that diverged: they are not tested and get no summary.
    """
    group, at = trained.group, trained.at
    run, members = group.run, group.members
    sums, logits, lost = test_group(trained)
    names, size = run.dataset.class_names, len(run.dataset.splits["test"].labels)
    states = {"best": at.arrays.best, "last": at.arrays.state}
    states = jax.device_put(states, jax.local_devices()[0])
    for i, member in enumerate(members):
        folder = folder_of(workdir, member)
        files.remove(folder)
        folder.mkdir(parents=True)
        write_json(folder / "config.json", member.config.to_dict())
        with metrics_log.MetricsLog(folder / "metrics.jsonl") as log:
            best = at.best_rows[i]
            saves = {best["epoch"]: "best"} if best else {}
            if i not in at.diverged:
                saves.setdefault(member.config.recipe.epochs, "last")
            with run.clock("saving"):
                ends = _write_rows(trained.rows[i], log)
                with Checkpoints(folder / "checkpoints") as checkpoints:
                    for epoch, which in sorted(saves.items()):
                        state = replicas.pick(states[which], np.int32(i))
                        _save(checkpoints, member, state, epoch, *ends[epoch])
            if i in lost:
                continue
            own = {name: values[i] for name, values in sums.items()}
            found, probabilities = evaluation.split_results(own, logits[i], names, size)
            log.append("test", **found)
        np.save(folder / "probabilities.npy", probabilities)
        how = {
            "runs_trained_together": len(members),
            "devices_sharing_a_batch": programs.sharing_a_batch(group.mesh),
        }
        summary = run_summary.summarize(member, loop.trained(member, best) | how, found)
        write_json(folder / "summary.json", metrics_log.to_json(summary))
    return {members[i].config.seed: step for i, step in lost.items()}


def test_group(trained: TrainedGroup) -> tuple[dict, np.ndarray, dict[int, int]]:
    """Tests, of each run of a trained group, the weights that its recipe says.

    Returns:
      The sums [R, ...] of `steps.eval_step` and the logits [R, batches, B, C], and of the runs
      that diverged, whose figures mean nothing, {place in the group: last step}.
    """
    group, at = trained.group, trained.at
    run, mesh, recipe = group.run, group.mesh, group.recipe
    lost = dict(at.diverged)
    for i, best in enumerate(at.best_rows):
        if recipe.select_best and best is None:  # no epoch had a validation loss that was finite
            lost.setdefault(i, recipe.epochs * run.steps_per_epoch)
    variables = steps.inference_variables(at.arrays.best if recipe.select_best else at.arrays.state)
    split = run.dataset.splits["test"]
    size = len(split.labels)
    indices = input_pipeline.batches(
        np.arange(size, dtype=np.int32), min(recipe.eval_batch_size, size)
    )
    count = jax.tree.leaves(variables)[0].shape[0]
    each = replicas.split_evenly(np.broadcast_to(indices, (count, *indices.shape)), mesh)
    with run.clock("test"):
        examples = placement.put(split.images, split.labels, mesh)
        sums = group.programs.evaluate(variables, examples, each)
        images = placement.replicate(np.asarray(split.images)[np.maximum(indices, 0)], mesh)
        sums, logits = jax.device_get((sums, group.programs.predict(variables, images)))
    return sums, logits, lost


def _write_rows(rows: Sequence[dict], log: metrics_log.MetricsLog) -> dict[int, tuple]:
    """Returns {epoch: (the log's length after its row, its validation loss)}."""
    ends = {}
    for row in rows:
        log.append(**row)
        if row["kind"] == "epoch":
            ends[row["epoch"]] = (log.offset(), row.get("validation_loss"))
    log.sync()
    return ends


def _save(
    checkpoints: Checkpoints, member: Run, state, epoch: int, offset: int, metric: float | None
) -> None:
    """Saves a run's state as of the end of an epoch."""
    metrics = programs.empty_metrics(member.steps_per_epoch)
    seconds = member.clock.seconds()
    extra = {"epoch": epoch + 1, "step": 0, "metrics_offset": offset, "seconds": seconds}
    payload = setup.payload(state, metrics)
    checkpoints.save(epoch * member.steps_per_epoch, payload, extra, metric=metric)
