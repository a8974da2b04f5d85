"""Many runs of one recipe, of a seed each: `--seeds`. Groups that fit in memory are trained one
after another (`group.Group`), or dealt to the processes where there are several, which share the
directory and nothing else (`replicas/shared_workdir.py`); each run then gets a run directory of its
own, and all of them the spread of what they found."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_jax.models.layer_table import summarise
from cifar_jax.parallel.distributed import ALONE, Process
from cifar_jax.parallel.placement import Placement
from cifar_jax.replicas import programs as replica_programs
from cifar_jax.replicas import results, shared_workdir
from cifar_jax.replicas.group import Group
from cifar_jax.replicas.results import TrainedGroup, folder_of, write_members
from cifar_jax.reporting import metrics_log, predictions
from cifar_jax.reporting.console import counted
from cifar_jax.runtime import files
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import write_json
from cifar_jax.runtime.progress import Progress
from cifar_jax.runtime.timing import Clock
from cifar_jax.training.checks import check_first_forward
from cifar_jax.training.loop import Interrupted, Loop, Watch
from cifar_jax.training.runs import Print
from cifar_jax.training.setup import Run, input_shape
from cifar_jax.training.workdir import show_seeds


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many runs are trained: `programs` for groups of `size`, each run of about `bytes`."""

    programs: replica_programs.Programs
    size: int
    bytes: int
    available: int | None
    process: Process = ALONE


def make_plan(
    run: Run,
    count: int,
    asked_form: str,
    asked_devices: str,
    asked_size: int | None,
    step: Callable | None = None,
    process: Process = ALONE,
) -> Plan:
    """Decides form, devices and group size for `count` runs as `run`; `step` as
    `programs.make_programs` takes it. Of several processes each gets a share.

    Raises:
      UserError: unknown form, more devices than there are, or a data set too large for one.
    """
    if run.place is not Placement.RESIDENT:
        raise UserError("many runs at once need a data set that fits on every device; this is not")
    form = replica_programs.choose_form(asked_form)
    share = -(-count // process.count)
    mesh = replica_programs.replica_mesh(
        asked_devices, share, run.config.recipe.batch_size, run.parameters
    )
    available = available_bytes(process.count)
    rows, columns = mesh.devices.shape
    fitting, size = group_size(run, form, rows, available, columns)
    fitting = min(asked_size or fitting, share)
    programs = replica_programs.make_programs(run, form, mesh, step)
    return Plan(programs, fitting, size, available, process)


def opening_lines(run: Run, plan: Plan) -> list[str]:
    """Returns what is said of the replicas before training."""
    seeds, form, processes = run.config.seeds, plan.programs.form, plan.process.count
    how = {"map": "one after another on each", "vmap": "together in every step"}[form]
    lines = [
        f"Replicas   {counted(len(seeds), 'run')}, seeds {show_seeds(seeds)}, "
        f"{replica_programs.describe_mesh(plan.programs.mesh)}"
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


@dataclasses.dataclass(frozen=True)
class Groups:
    """Runs of the same programs and shapes, trained in groups that fit in memory. What is done is
    not done again. Several processes take every n-th group each, then those of processes that have
    ended, and share the folder:

        groups/size.json               {"size": runs in a group}, of the first start: it stays
        groups/<n>/metrics.jsonl       of group n in training: rows with their `member`
        groups/<n>/checkpoints/        likewise
        groups/<n>/complete.json       group n is done; in its place, for the two above are deleted.
                                       {"result": what `work` returned, "started": ISO date,
                                       "seconds": {phase: seconds},
                                       "process": the number of the one that trained it}

    `complete.json` is written after all that `work` writes, so a kill before repeats `work`.

    Attributes:
      members: the runs.
      folder: holds `groups/`.
      work: what is to be done with a trained group; returns something JSON holds.
      is_intact: whether what `work` did for these runs, and returned, is still there.
      hparams, names: of each run, as `Group` takes them.
      watch: sees every row, as `Loop` takes it.
    """

    members: Sequence[Run]
    plan: Plan
    folder: Path
    work: Callable[[TrainedGroup], Any]
    is_intact: Callable[[Sequence[Run], Any], bool] = lambda members, result: True
    hparams: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    names: Sequence[str] | None = None
    watch: Watch | None = None

    def size(self) -> int:
        """Returns how many runs make a group: as an earlier part of the same command, or another
        process, decided."""
        file = self.folder / "groups" / "size.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with shared_workdir.group_lock(file.parent / ".lock", self.plan.process, lambda: None):
            if not file.exists():
                write_json(file, {"size": self.plan.size})
            return _read(file)["size"]

    def train(self, stop: Callable[[], int | None], say: Print) -> list[dict]:
        """Trains what is not done yet; returns what each group's `complete.json` holds, when all
        groups are done.

        Raises:
          Interrupted: stopped by a signal, after saving.
          UserError: a full disk, or no good checkpoint among those there.
        """
        run, size, process = self.members[0], self.size(), self.plan.process
        epochs = run.config.recipe.epochs
        images, last_step = epochs * run.config.images_per_epoch, epochs * run.steps_per_epoch
        parts = [slice(i, i + size) for i in range(0, len(self.members), size)]
        locks = [self._complete(number).with_name(".lock") for number in range(len(parts))]
        done = set()
        with Progress(images * len(self.members), shown=process.leads) as bar:
            tell = bar.print if say is print else say
            with contextlib.closing(shared_workdir.turns(locks, process, stop, tell)) as turns:
                for number in turns:
                    part = parts[number]
                    count = len(self.members[part])
                    if self._is_done(number, part):
                        bar.skip(images * count)
                        done.add(number)
                        continue
                    signal = stop()
                    if signal and done:
                        raise Interrupted(signal, last_step)
                    if len(parts) > 1:
                        tell(f"Group {number + 1} of {len(parts)}: {counted(count, 'run')}")
                    self._train_group(number, part, stop, tell, bar)
                    done.add(number)
        if len(done) < len(parts):
            raise Interrupted(stop(), last_step)
        return [_read(self._complete(number)) for number in range(len(parts))]

    def _complete(self, number: int) -> Path:
        return self.folder / "groups" / str(number) / "complete.json"

    def _is_done(self, number: int, part: slice) -> bool:
        file = self._complete(number)
        return file.exists() and self.is_intact(self.members[part], _read(file)["result"])

    def _train_group(self, number: int, part: slice, stop, say: Print, bar: Progress) -> None:
        clock, file = Clock(), self._complete(number)
        group = Group(
            [dataclasses.replace(member, clock=clock) for member in self.members[part]],
            self.plan.programs,
            say,
            {name: values[part] for name, values in self.hparams.items()},
            self.names and self.names[part],
        )
        with Loop(group, file.parent, stop, bar, self.watch) as loop:
            at = loop.train(loop.begin())
            say("Testing every run")
            result = self.work(TrainedGroup(group, at, loop.rows()))
        result, process = metrics_log.to_json(result), self.plan.process.index
        write_json(file, {"result": result, **clock.saved(), "process": process})
        for name in ("metrics.jsonl", "checkpoints"):
            files.remove(file.parent / name)


def train_and_test(
    run: Run,
    plan: Plan,
    workdir: Path,
    stop: Callable[[], int | None],
    say: Print,
    watch: Watch | None = None,
) -> dict:
    """Trains, tests and writes what is not there yet; returns what `summary.json` holds. `watch`
    sees every row.

    Raises:
      Interrupted: stopped by a signal, after saving.
      UserError: a full disk, no good checkpoint among those there, or every run diverged.
    """
    configs = [dataclasses.replace(run.config, seed=s, seeds=()) for s in run.config.seeds]
    say(check_first_forward(run, run.create(initial=run.initial)))
    groups = Groups(
        [run.with_config(config) for config in configs],
        plan,
        workdir,
        functools.partial(write_members, workdir=workdir),
        functools.partial(_are_written, workdir=workdir),
        watch=watch,
    )
    done = groups.train(stop, say)
    return results.finish(run, groups, done, say) if plan.process.leads else {}


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _are_written(members: Sequence[Run], diverged: Mapping, workdir: Path) -> bool:
    folders = [folder_of(workdir, m) for m in members if str(m.config.seed) not in diverged]
    return all((f / "summary.json").exists() and predictions.are_in(f) for f in folders)


# How many runs fit in memory together.

# Of a state: as it goes into a program and as it comes out, its best so far, a save under way.
STATES = 4
# Of a layer's output in training: itself, what the backward pass keeps, its gradient, and patches
# of a convolution, several times an image. An upper estimate, not a measurement.
ACTIVATIONS = 16
# What is left to everything else.
SHARE = 0.7


def state_bytes(run: Run) -> int:
    """Returns the bytes of one run's state."""
    return sum(leaf.size * max(leaf.dtype.itemsize, 4) for leaf in jax.tree.leaves(run.shapes))


def activation_bytes(run: Run) -> int:
    """Returns about how many bytes a training step of one run holds besides the state."""
    recipe = run.config.recipe
    layers = summarise(run.model, input_shape(recipe, run.config.dataset["image_shape"]))
    numbers = sum(math.prod(layer.output_shape) for layer in layers)
    return ACTIVATIONS * 4 * numbers * -(-recipe.batch_size // recipe.accumulate)


def available_bytes(processes: int = 1) -> int | None:
    """Returns the memory that is free for replicas on all local devices, None if unknown.

    An accelerator says so itself (`memory_stats`); a CPU's is the host's, within the limit of the
    process's control group, which `processes` share alike, as if on one host.
    """
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return len(devices) * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    free = [_meminfo(), _cgroup()]
    found = min((value for value in free if value is not None), default=None)
    return found and found // processes


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _cgroup() -> int | None:
    """What the control group (version 2) leaves; None where it sets no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        return max(limit - int((folder / "memory.current").read_text()), 0)
    except (OSError, ValueError):
        return None


def group_size(
    run: Run, form: str, devices: int, available: int | None, shares: int = 1
) -> tuple[int, int]:
    """Returns how many runs are trained together, at least one a device, and the bytes of one.

    Args:
      run: any of the runs.
      form: under `map` one run of a device is in a step at a time, so that its activations count
        once a device.
      devices: over how many the runs are split; each holds the data set (on a CPU too).
      available: bytes in all, None for no limit.
      shares: devices that share a run's batches; they hold its state each.
    """
    state, activations = STATES * state_bytes(run), activation_bytes(run)
    order = 4 * (len(run.training) + 3 * run.steps_per_epoch)
    one = shares * (state + order) + (activations if form == "vmap" else 0)
    if available is None:
        return 2**31 - 1, one
    split = run.dataset.splits["train"]
    data = devices * shares * math.prod(split.images.shape)
    rest = SHARE * available - data - (activations * devices if form == "map" else 0)
    fitting = int(max(rest, 0) // one)
    return max(fitting - fitting % devices, devices), one
