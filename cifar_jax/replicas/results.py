"""The end of many runs of one recipe: their spread, its report, `summary.json` and the picture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from cifar_jax import input_pipeline, recipes, steps
from cifar_jax.checkpoints.save_restore import Checkpoints
from cifar_jax.parallel import placement, programs
from cifar_jax.parallel import programs as parallel_programs
from cifar_jax.replicas import programs as replica_programs
from cifar_jax.replicas import statistics
from cifar_jax.replicas.group import Group
from cifar_jax.reporting import console, distribution, metrics_log, predictions
from cifar_jax.reporting.console import counted
from cifar_jax.reporting.plots import attempt
from cifar_jax.reporting.run_files import command
from cifar_jax.runtime import files
from cifar_jax.runtime.environment import environment
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import write_json
from cifar_jax.runtime.timing import peak_memory
from cifar_jax.training import evaluation, loop, setup
from cifar_jax.training import summary as run_summary
from cifar_jax.training.loop import Position
from cifar_jax.training.runs import Print
from cifar_jax.training.setup import Run
from cifar_jax.training.workdir import write_config

if TYPE_CHECKING:
    from cifar_jax.replicas.scheduler import Groups


def all_seconds(run: Run, groups: Sequence[Mapping]) -> dict[str, float]:
    """Returns {phase: seconds} of this process's start and of all groups
    (`scheduler.Groups.train`); where several processes trained them, of the one that took
    longest."""
    seconds, sums = run.clock.seconds(), {}
    for part in groups:
        for phase, value in part["seconds"].items():
            of_phase = sums.setdefault(phase, {})
            process = part.get("process", 0)
            of_phase[process] = of_phase.get(process, 0.0) + value
    for phase, of_phase in sums.items():
        seconds[phase] = round(seconds.get(phase, 0.0) + max(of_phase.values()), 4)
    return seconds


def finish(run: Run, groups: Groups, done: Sequence[Mapping], say: Print) -> dict:
    """Adds up what the directories hold, draws, and writes `summary.json` last.

    Args:
      run: the first of the runs, as of the start; its config knows all seeds.
      groups: all of them, trained.
      done: from `Groups.train`.

    Returns:
      What `summary.json` holds.

    Raises:
      UserError: every run diverged, or the disk is full.
    """
    members, programs, workdir = groups.members, groups.plan.programs, groups.folder
    diverged = {int(seed): step for part in done for seed, step in part["result"].items()}
    seconds = all_seconds(run, done)
    folders = [folder_of(workdir, m) for m in members if m.config.seed not in diverged]
    if not folders:
        rate = run.config.recipe.learning_rate
        which = "the only run" if len(members) == 1 else f"all {len(members)} runs"
        raise UserError(
            f"{which} diverged, the last at step {max(diverged.values())}; "
            f"try --learning-rate {rate / 10:g}, --clip-norm 1 or --warmup-epochs 1, "
            "with --overwrite"
        )
    processes = groups.plan.process.count
    found = statistics.of_directories(folders, run.dataset.splits["test"].labels)
    epochs = sum(one["epochs"] for one in found["runs"])
    epochs += len(diverged) * run.config.recipe.epochs
    images = epochs * run.config.images_per_epoch
    training = seconds.get("training")
    summary = metrics_log.to_json(
        {
            **run.config.to_dict(),
            "dataset": {**run.config.dataset, "source": run.dataset.source},
            "training_images": len(run.training),
            "validation_images": len(run.validation),
            "parameters": run.parameters,
            "lowering": run.options.lowering,
            "form": programs.form,
            "devices": programs.mesh.size * processes,
            "processes": processes,
            "devices_sharing_a_batch": parallel_programs.sharing_a_batch(programs.mesh),
            "group_size": min(groups.size(), len(members)),
            **found,
            "diverged": [{"seed": seed, "step": step} for seed, step in sorted(diverged.items())],
            "published_accuracy": [value / 100 for value in _published(run)],
            "images_per_second": images / training if training else None,
            "command": command(run.config.to_dict()),
            "started": min([run.clock.started, *(p["started"] for p in done if "started" in p)]),
            "seconds": seconds,
            "total_seconds": round(sum(seconds.values()), 4),
            "peak_memory_bytes": peak_memory(),
            **environment(),
        }
    )
    say("")
    say(results_text(summary))
    if run.options.plots:
        percent = [100 * member["test_accuracy"] for member in summary["runs"]]
        histogram = functools.partial(
            distribution.histogram,
            percent,
            statistics.spread(percent),
            heading=f"{run.config.recipe_name}: test accuracy of {counted(len(folders), 'run')}",
            value_name="test accuracy, %",
            ensemble=100 * summary["ensemble"]["test_accuracy"],
            published=_published(run),
        )
        attempt({workdir / "plots" / "test_accuracy.png": histogram}, say)
    write_json(workdir / "summary.json", summary)
    if run.options.report:
        run_summary.write_report(run, workdir, say)
    say(f"Written to {workdir}; each run is a run directory: {folders[0]} ...")
    return summary


def _published(run: Run) -> list[float]:
    config = run.config
    return recipes.published_accuracies(config.recipe_name, config.recipe, config.dataset["name"])


def results_text(summary: Mapping) -> str:
    """Returns the lines of a `summary.json` of several runs."""
    percent = {"scale": 100.0, "digits": 2, "unit": " %"}
    lines = [
        statistics.line("Test loss", summary["test_loss"]),
        statistics.line("Test accuracy", summary["test_accuracy"], **percent),
    ]
    width = max(len(row["class"]) for row in summary["per_class"])
    percent["digits"] = 1
    lines += [
        statistics.line(f"  {row['class']:<{width}}", row, **percent)
        for row in summary["per_class"]
    ]
    ensemble = summary["ensemble"]
    lines.append(
        f"Ensemble of {len(summary['runs'])}: test loss {ensemble['test_loss']:.6f}, accuracy "
        f"{100 * ensemble['test_accuracy']:.2f} % "
        f"({ensemble['test_correct']}/{ensemble['test_count']})"
    )
    for value in summary["published_accuracy"]:
        below = sum(run["test_accuracy"] < value for run in summary["runs"])
        runs = counted(len(summary["runs"]), "run lies", "runs lie")
        lines.append(f"Published {100 * value:.2f} %: {below} of {runs} below it")
    for row in summary["diverged"]:
        lines.append(f"Diverged: seed {row['seed']}, at step {row['step']}; counts nowhere above")
    lines.append(console.timing_line(summary["seconds"], summary["images_per_second"]))
    return "\n".join(lines)


# The ordinary run directories of a trained group: the test, checkpoints, rows and summary of each
# of its runs.


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
        write_config(folder, member.config)
        with metrics_log.MetricsLog(folder / "metrics.jsonl") as log:
            best = at.best_rows[i]
            saves = {best["epoch"]: "best"} if best else {}
            if i not in at.diverged:
                saves.setdefault(loop.last_epoch(member.config.recipe, best), "last")
            with run.clock("saving"):
                ends = _write_rows(trained.rows[i], log)
                with Checkpoints(folder / "checkpoints") as checkpoints:
                    for epoch, which in sorted(saves.items()):
                        state = replica_programs.pick(states[which], np.int32(i))
                        _save(checkpoints, member, state, epoch, *ends[epoch])
            if i in lost:
                continue
            own = {name: values[i] for name, values in sums.items()}
            found, probabilities = evaluation.split_results(own, logits[i], names, size)
            log.append("test", **found)
        said = predictions.of_split(probabilities, run.dataset.splits["test"].labels)
        predictions.write(folder, said)
        if run.options.csv:
            predictions.write_csv(folder, said, names)
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
    each = replica_programs.split_evenly(np.broadcast_to(indices, (count, *indices.shape)), mesh)
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
    extra = {"epoch": epoch + 1, "step": 0, "metrics_offset": offset, **member.clock.saved()}
    payload = setup.payload(state, metrics)
    checkpoints.save(epoch * member.steps_per_epoch, payload, extra, metric=metric)
