"""The ordinary run directories of a trained group: the test, checkpoints, rows and summary of each
of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from cifar_jax import feed, files, finish, from_recipe, inference, records, replicas, steps
from cifar_jax.checkpoints import Checkpoints
from cifar_jax.group import Group, Position
from cifar_jax.run import Run
from cifar_jax.workdir import write_json


def folder_of(workdir: Path, member: Run) -> Path:
    """Returns where in the directory of several runs one of them lies."""
    return workdir / f"seed-{member.config.seed}"


def write_members(training: Group, at: Position, workdir: Path) -> dict[int, int]:
    """Tests a trained group and writes the directory of each of its runs.

    Returns:
      {seed: last step} of the runs that diverged: they are not tested and get no summary.
    """
    run, members = training.run, training.members
    sums, logits, lost = test_group(training, at)
    names, size = run.dataset.class_names, len(run.dataset.splits["test"].labels)
    rows = training.rows()
    arrays = jax.device_put(at.arrays, jax.local_devices()[0])
    for i, member in enumerate(members):
        folder = folder_of(workdir, member)
        files.remove(folder)
        folder.mkdir(parents=True)
        write_json(folder / "config.json", member.config.to_dict())
        with records.MetricsLog(folder / "metrics.jsonl") as log:
            with run.clock("saving"):
                _write_checkpoints(folder, member, arrays, i, at, rows[i], log)
            if i in lost:
                continue
            own = {name: values[i] for name, values in sums.items()}
            found, probabilities = inference.split_results(own, logits[i], names, size)
            log.append("test", **found)
        np.save(folder / "probabilities.npy", probabilities)
        together = {
            "runs_trained_together": len(members),
            "devices_sharing_a_batch": replicas.sharing_a_batch(training.mesh),
        }
        trained = _trained(member, at.best_rows[i]) | together
        summary = finish.summarize(member, trained, found)
        write_json(folder / "summary.json", records.to_json(summary))
    return {members[i].config.seed: step for i, step in lost.items()}


def _trained(member: Run, best: Mapping | None) -> dict:
    """What `training.train` returns of a run."""
    recipe = member.config.recipe
    return {
        "best_epoch": best["epoch"] if best else None,
        "best_validation_loss": best["validation_loss"] if best else None,
        "tested_epoch": best["epoch"] if recipe.select_best else recipe.epochs,
        "epochs": recipe.epochs,
        "steps": recipe.epochs * member.steps_per_epoch,
    }


def test_group(training: Group, at: Position) -> tuple[dict, np.ndarray, dict[int, int]]:
    """Tests, of each run of a trained group, the weights that its recipe says.

    Returns:
      The sums [R, ...] of `steps.eval_step` and the logits [R, batches, B, C], and of the runs
      that diverged, whose figures mean nothing, {place in the group: last step}.
    """
    run, mesh = training.run, training.mesh
    lost, selects = dict(at.diverged), run.config.recipe.select_best
    for i, best in enumerate(at.best_rows):
        if selects and best is None:  # no epoch had a validation loss that was finite
            lost.setdefault(i, run.config.recipe.epochs * run.steps_per_epoch)
    state = at.arrays["best" if selects else "state"]
    split = run.dataset.splits["test"]
    size = len(split.labels)
    batch = min(run.config.recipe.eval_batch_size, size)
    order = feed.batches(np.arange(size, dtype=np.int32), batch)
    variables = steps.inference_variables(state)
    count = jax.tree.leaves(variables)[0].shape[0]
    orders = replicas.split_evenly(np.broadcast_to(order, (count, *order.shape)), mesh)
    data = feed.on_host(split.images, split.labels)
    with run.clock("test"):
        sums = training.programs.evaluate((variables, orders), replicas.to_all(data, mesh))
        images = replicas.to_all(data["image"][np.maximum(order, 0)], mesh)
        sums, logits = jax.device_get((sums, training.programs.predict(variables, images)))
    return sums, logits, lost


def _write_checkpoints(
    folder: Path, member: Run, arrays: dict, i: int, at: Position, rows: Sequence[dict], log
) -> None:
    """Writes a run's rows and, as of the moments between them, its best and newest checkpoint."""
    best, ends = at.best_rows[i], {}
    for row in rows:
        log.append(**row)
        if row["kind"] == "epoch":
            ends[row["epoch"]] = (log.offset(), row.get("validation_loss"))
    log.sync()
    saves = {best["epoch"]: "best"} if best else {}
    if i not in at.diverged:
        saves.setdefault(member.config.recipe.epochs, "state")
    record = {name: np.zeros(member.steps_per_epoch, np.float32) for name in arrays["record"]}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for epoch, which in sorted(saves.items()):
            offset, metric = ends[epoch]
            state = replicas.pick(arrays[which], np.int32(i))
            extra = {
                "epoch": epoch + 1,
                "step": 0,
                "metrics_offset": offset,
                "seconds": member.clock.seconds(),
            }
            payload = from_recipe.payload(state, record)
            checkpoints.save(epoch * member.steps_per_epoch, payload, extra, metric=metric)
