"""The end of many runs of one recipe: their spread, its report, `summary.json` and the picture."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cifar_jax import recipes
from cifar_jax import spread as spreads
from cifar_jax.members import folder_of
from cifar_jax.parallel import programs as parallel_programs
from cifar_jax.reporting import console, metrics_log
from cifar_jax.reporting.console import counted
from cifar_jax.reporting.plots import attempt
from cifar_jax.runtime.environment import environment
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.timing import peak_memory
from cifar_jax.training.runs import Print
from cifar_jax.training.setup import Run
from cifar_jax.training.workdir import write_json

if TYPE_CHECKING:
    from cifar_jax.many import Groups


def all_seconds(run: Run, groups: Sequence[Mapping]) -> dict[str, float]:
    """Returns {phase: seconds} of this process's start and of all groups (`many.Groups.train`);
    where several processes trained them, of the one that took longest."""
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
    found = spreads.of_directories(folders, run.dataset.splits["test"].labels)
    images = run.config.recipe.epochs * len(run.training) * len(members)
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
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
            **environment(),
        }
    )
    say("")
    say(results_text(summary))
    if run.options.plots:
        percent = [100 * member["test_accuracy"] for member in summary["runs"]]
        histogram = functools.partial(
            spreads.histogram,
            percent,
            spreads.spread(percent),
            heading=f"{run.config.recipe_name}: test accuracy of {counted(len(folders), 'run')}",
            value_name="test accuracy, %",
            ensemble=100 * summary["ensemble"]["test_accuracy"],
            published=_published(run),
        )
        attempt({workdir / "plots" / "test_accuracy.png": histogram}, say)
    write_json(workdir / "summary.json", summary)
    say(f"Written to {workdir}; each run is a run directory: {folders[0]} ...")
    return summary


def _published(run: Run) -> list[float]:
    config = run.config
    return recipes.published_accuracies(config.recipe_name, config.recipe, config.dataset["name"])


def results_text(summary: Mapping) -> str:
    """Returns the lines of a `summary.json` of several runs."""
    percent = {"scale": 100.0, "digits": 2, "unit": " %"}
    lines = [
        spreads.line("Test loss", summary["test_loss"]),
        spreads.line("Test accuracy", summary["test_accuracy"], **percent),
    ]
    width = max(len(row["class"]) for row in summary["per_class"])
    percent["digits"] = 1
    lines += [
        spreads.line(f"  {row['class']:<{width}}", row, **percent) for row in summary["per_class"]
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
