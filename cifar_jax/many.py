"""Many runs of one recipe, of a seed each: `--seeds`. Groups that fit in memory are trained one
after another (`group.py`); each run then gets a run directory of its own, and all of them the
spread of what they found."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax import group_size, published, records, replicas, report
from cifar_jax import spread as spreads
from cifar_jax.checks import check_first_forward
from cifar_jax.clock import Clock, peak_memory
from cifar_jax.environment import environment
from cifar_jax.errors import UserError
from cifar_jax.group import Group, Position, Programs, make_programs
from cifar_jax.members import folder_of, write_members
from cifar_jax.progress import Progress
from cifar_jax.run import Run
from cifar_jax.training import Interrupted, Print
from cifar_jax.workdir import Config, show_seeds, write_json

DONE = "complete.json"  # in a group's folder: what became of it


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many runs are trained: `programs` for groups of `size`, each run of about `bytes`."""

    programs: Programs
    size: int
    bytes: int
    available: int | None


def make_plan(
    run: Run,
    count: int,
    asked_form: str,
    asked_devices: str,
    asked_size: int | None,
    step: Callable | None = None,
) -> Plan:
    """Decides form, devices and group size for `count` runs as `run`; `step` as `make_programs`
    takes it.

    Raises:
      UserError: unknown form, more devices than there are, or a data set too large for one.
    """
    if run.place != "resident":
        raise UserError("many runs at once need a data set that fits on every device; this is not")
    form = replicas.choose_form(asked_form)
    mesh = replicas.replica_mesh(asked_devices, count, run.config.recipe.batch_size, run.parameters)
    available = group_size.available_bytes()
    rows, columns = mesh.devices.shape
    fitting, size = group_size.group_size(run, form, rows, available, columns)
    fitting = min(asked_size or fitting, count)
    return Plan(make_programs(run, form, mesh, step), fitting, size, available)


def opening_lines(run: Run, plan: Plan) -> list[str]:
    """Returns what is said of the replicas before training."""
    seeds, form = run.config.seeds, plan.programs.form
    how = {"map": "one after another on each", "vmap": "together in every step"}[form]
    lines = [
        f"Replicas   {len(seeds)} runs, seeds {show_seeds(seeds)}, "
        f"{replicas.describe_mesh(plan.programs.mesh)}, form {form} ({how})"
    ]
    groups = -(-len(seeds) // plan.size)
    if groups > 1:
        free = f" of {plan.available / 2**30:,.1f} GiB free" if plan.available else ""
        lines.append(
            f"Groups     {groups} of up to {plan.size} runs, one after another: a run takes about "
            f"{plan.bytes / 2**20:,.1f} MiB{free}"
        )
    return lines


def train_and_test(
    run: Run, plan: Plan, workdir: Path, stop: Callable[[], int | None], say: Print
) -> dict:
    """Trains, tests and writes what is not there yet; returns what `summary.json` holds.

    Raises:
      Interrupted: stopped by a signal, after saving.
      UserError: a full disk, no good checkpoint among those there, or every run diverged.
    """
    recipe = run.config.recipe
    members = [run.with_config(_config_of(run, seed)) for seed in run.config.seeds]
    say(check_first_forward(run, run.create(initial=run.initial)))
    images = recipe.epochs * len(run.training)
    with Progress(images * len(members)) as bar:
        done = train_groups(
            members,
            plan,
            workdir,
            functools.partial(write_members, workdir=workdir),
            functools.partial(_are_written, workdir=workdir),
            stop,
            bar.print if say is print else say,
            bar,
        )
    return _finish(run, members, plan, done, workdir, say)


def train_groups(
    members: Sequence[Run],
    plan: Plan,
    workdir: Path,
    work: Callable[[Group, Position], Any],
    is_intact: Callable[[Sequence[Run], Any], bool],
    stop: Callable[[], int | None],
    say: Print,
    bar: Progress,
    numbers: Mapping[str, np.ndarray] | None = None,
    names: Sequence[str] | None = None,
) -> list[dict]:
    """Trains runs in groups that fit in memory, one after another; what is done is not done again.

    Args:
      members: the runs, all of the same programs and shapes.
      workdir: `groups/` in it holds what it takes to go on.
      work: what is to be done with a trained group; returns something JSON holds.
      is_intact: whether what `work` did for these runs, and returned, is still there.
      bar: over the images of all runs.
      numbers, names: of each run, as `Group` takes them.

    Returns:
      For each group {"result": what `work` returned, "seconds": {phase: seconds}}.

    Raises:
      Interrupted: stopped by a signal, after saving.
      UserError: a full disk, or no good checkpoint among those there.
    """
    size, found = _group_size(plan.size, workdir), []
    recipe = members[0].config.recipe
    for number, first in enumerate(range(0, len(members), size)):
        part = slice(first, first + size)
        group, folder = members[part], workdir / "groups" / str(number)
        if (folder / DONE).exists() and is_intact(group, _read(folder / DONE)["result"]):
            bar.skip(recipe.epochs * len(members[0].training) * len(group))
            found.append(_read(folder / DONE))
            continue
        signal = stop()
        if signal and found:
            raise Interrupted(signal, recipe.epochs * members[0].steps_per_epoch)
        if size < len(members):
            runs = f"{len(group)} run{'s' if len(group) > 1 else ''}"
            say(f"Group {number + 1} of {-(-len(members) // size)}: {runs}")
        clock = Clock()
        group = [dataclasses.replace(member, clock=clock) for member in group]
        own = {name: values[part] for name, values in (numbers or {}).items()}
        called = names[part] if names else None
        with Group(group, plan.programs, folder, stop, say, bar, own, called) as training:
            at = training.train()
            say("Testing every run")
            result = work(training, at)
        write_json(folder / DONE, {"result": records.to_json(result), "seconds": clock.seconds()})
        for name in ("metrics.jsonl", "checkpoints"):
            _remove(folder / name)
        found.append(_read(folder / DONE))
    return found


def _config_of(run: Run, seed: int) -> Config:
    return dataclasses.replace(run.config, seed=seed, seeds=())


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _group_size(size: int, workdir: Path) -> int:
    """Returns how many runs make a group: as an earlier part of the same command decided."""
    file = workdir / "groups" / "size.json"
    if file.exists():
        return _read(file)["size"]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"size": size})
    return size


def _are_written(group: Sequence[Run], diverged: Mapping, workdir: Path) -> bool:
    return all(
        (folder_of(workdir, member) / name).exists()
        for member in group
        if str(member.config.seed) not in diverged
        for name in ("summary.json", "probabilities.npy")
    )


def all_seconds(run: Run, groups: Sequence[Mapping]) -> dict[str, float]:
    """Returns {phase: seconds} of this process's start and of all groups (`train_groups`)."""
    seconds = run.clock.seconds()
    for part in groups:
        for phase, value in part["seconds"].items():
            seconds[phase] = round(seconds.get(phase, 0.0) + value, 4)
    return seconds


def _finish(
    run: Run, members: Sequence[Run], plan: Plan, done: Sequence[Mapping], workdir: Path, say: Print
) -> dict:
    """Adds up what the directories hold, draws, and writes `summary.json` last."""
    diverged = {int(seed): step for part in done for seed, step in part["result"].items()}
    seconds = all_seconds(run, done)
    folders = [folder_of(workdir, m) for m in members if m.config.seed not in diverged]
    if not folders:
        rate = run.config.recipe.learning_rate
        raise UserError(
            f"all {len(members)} runs diverged, the last at step {max(diverged.values())}; "
            f"try --learning-rate {rate / 10:g}, --clip-norm 1 or --warmup-epochs 1, "
            "with --overwrite"
        )
    found = spreads.of_directories(folders, run.dataset.splits["test"].labels)
    images = run.config.recipe.epochs * len(run.training) * len(members)
    training = seconds.get("training")
    summary = records.to_json(
        {
            **run.config.to_dict(),
            "dataset": {**run.config.dataset, "source": run.dataset.source},
            "training_images": len(run.training),
            "validation_images": len(run.validation),
            "parameters": run.parameters,
            "lowering": run.options.lowering,
            "form": plan.programs.form,
            "devices": plan.programs.mesh.size,
            "devices_sharing_a_batch": replicas.sharing_a_batch(plan.programs.mesh),
            "group_size": min(_group_size(plan.size, workdir), len(members)),
            **found,
            "diverged": [{"seed": seed, "step": step} for seed, step in sorted(diverged.items())],
            "published_accuracy": [value / 100 for value in _published(run)],
            "images_per_second": images / training if training else None,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
            **environment(),
        }
    )
    if run.options.plots:
        percent = [100 * member["test_accuracy"] for member in summary["runs"]]
        spreads.histogram(
            percent,
            spreads.spread(percent),
            workdir / "plots" / "test_accuracy.png",
            heading=f"{run.config.recipe_name}: test accuracy of {len(folders)} runs",
            value_name="test accuracy, %",
            ensemble=100 * summary["ensemble"]["test_accuracy"],
            published=_published(run),
        )
    say("")
    say(results_text(summary))
    write_json(workdir / "summary.json", summary)
    say(f"Written to {workdir}; each run is a run directory: {folders[0]} ...")
    return summary


def _published(run: Run) -> list[float]:
    config = run.config
    return published.accuracies(config.recipe_name, config.recipe, config.dataset["name"])


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
        count = len(summary["runs"])
        lines.append(f"Published {100 * value:.2f} %: {below} of {count} runs lie below it")
    for row in summary["diverged"]:
        lines.append(f"Diverged: seed {row['seed']}, at step {row['step']}; counts nowhere above")
    lines.append(report.timing_line(summary["seconds"], summary["images_per_second"]))
    return "\n".join(lines)
