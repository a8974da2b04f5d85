"""Many runs of one recipe, of a seed each: `--seeds`. Groups that fit in memory are trained one
after another (`group.py`), or dealt to the processes where there are several, which share the
directory and nothing else; each run then gets a run directory of its own, and all of them the
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

from cifar_jax import group_size, hosts, many_finish, records, replicas, together
from cifar_jax.checks import check_first_forward
from cifar_jax.clock import Clock
from cifar_jax.errors import UserError
from cifar_jax.group import Group, Position, Programs, make_programs
from cifar_jax.members import folder_of, write_members
from cifar_jax.progress import Progress
from cifar_jax.report import counted
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
    takes it. Of several processes each gets a share; all must call it.

    Raises:
      UserError: unknown form, more devices than there are, or a data set too large for one.
    """
    if run.place != "resident":
        raise UserError("many runs at once need a data set that fits on every device; this is not")
    form = replicas.choose_form(asked_form)
    share = -(-count // hosts.count())
    mesh = replicas.replica_mesh(asked_devices, share, run.config.recipe.batch_size, run.parameters)
    available = group_size.available_bytes()
    rows, columns = mesh.devices.shape
    fitting, size = group_size.group_size(run, form, rows, available, columns)
    fitting = min(asked_size or fitting, share)
    return Plan(make_programs(run, form, mesh, step), fitting, size, available)


def opening_lines(run: Run, plan: Plan) -> list[str]:
    """Returns what is said of the replicas before training."""
    seeds, form, processes = run.config.seeds, plan.programs.form, hosts.count()
    how = {"map": "one after another on each", "vmap": "together in every step"}[form]
    lines = [
        f"Replicas   {counted(len(seeds), 'run')}, seeds {show_seeds(seeds)}, "
        f"{replicas.describe_mesh(plan.programs.mesh)}"
        f"{f' of each of {processes} processes' if processes > 1 else ''}, form {form} ({how})"
    ]
    groups = -(-len(seeds) // plan.size)
    if groups > 1:
        free = f" of {plan.available / 2**30:,.1f} GiB free" if plan.available else ""
        order = "one after another" if processes == 1 else f"dealt to {processes} processes"
        lines.append(
            f"Groups     {groups} of up to {counted(plan.size, 'run')}, {order}: a run takes about "
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
    with Progress(images * len(members), shown=together.is_leader()) as bar:
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
    size = _group_size(plan.size, workdir)
    return together.by_leader(
        lambda: many_finish.finish(run, members, plan.programs, size, done, workdir, say)
    )


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
    Of several processes each takes its share of the groups, and all return together.

    Args:
      members: the runs, all of the same programs and shapes.
      workdir: `groups/` in it holds what it takes to go on.
      work: what is to be done with a trained group; returns something JSON holds.
      is_intact: whether what `work` did for these runs, and returned, is still there.
      bar: over the images of all runs.
      numbers, names: of each run, as `Group` takes them.

    Returns:
      For each group {"result": what `work` returned, "seconds": {phase: seconds}, "process": the
      number of the one that trained it}.

    Raises:
      Interrupted: stopped by a signal, after saving.
      UserError: a full disk, or no good checkpoint among those there.
    """
    size = together.by_leader(lambda: _group_size(plan.size, workdir))
    recipe, processes, this = members[0].config.recipe, hosts.count(), hosts.index()
    images = recipe.epochs * len(members[0].training)
    last_step = recipe.epochs * members[0].steps_per_epoch
    folders, trained = [], 0
    for number, first in enumerate(range(0, len(members), size)):
        part = slice(first, first + size)
        group, folder = members[part], workdir / "groups" / str(number)
        folders.append(folder)
        mine = number % processes == this
        if not mine or _is_done(folder, group, is_intact):
            bar.skip(images * len(group))
            trained += mine
            continue
        signal = stop()
        if signal and trained:
            raise Interrupted(signal, last_step)
        if size < len(members):
            runs = counted(len(group), "run")
            say(f"Group {number + 1} of {-(-len(members) // size)}: {runs}")
        clock = Clock()
        group = [dataclasses.replace(member, clock=clock) for member in group]
        own = {name: values[part] for name, values in (numbers or {}).items()}
        called = names[part] if names else None
        with Group(group, plan.programs, folder, stop, say, bar, own, called) as training:
            at = training.train()
            say("Testing every run")
            result = work(training, at)
        done = {"result": records.to_json(result), "seconds": clock.seconds(), "process": this}
        write_json(folder / DONE, done)
        for name in ("metrics.jsonl", "checkpoints"):
            _remove(folder / name)
        trained += 1
    signal = together.wait_for_all(stop)
    if signal:
        raise Interrupted(signal, last_step)
    return [_read(folder / DONE) for folder in folders]


def _is_done(folder: Path, group: Sequence[Run], is_intact: Callable) -> bool:
    return (folder / DONE).exists() and is_intact(group, _read(folder / DONE)["result"])


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
