"""Settings of a recipe as axes: which accuracy each point gives, over several seeds.

    python -m experiments.sweep --recipe dropout --learning-rate log:1e-3:1:12 --momentum 0,0.9 \\
        --seeds 0:4

trains every combination (`--random N`: N points by chance) and writes `results.csv`, one row a
run, `summary.json` and pictures into the workdir. Learning rate, momentum, weight decay, clipping,
label smoothing and averaging are arrays of one program in which all their points train together;
other settings are taken one after another. The same command goes on where it stopped. A run whose
loss is not finite is frozen, reported, and disturbs no other. Several processes take a share of the
runs each (docs/scaling.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax.models import MODELS
from cifar_jax.recipes import MODEL_RECIPES, RECIPES, Recipe
from cifar_jax.replicas import sweep as sweeps
from cifar_jax.replicas.sweep import Axis
from cifar_jax.runtime.errors import UserError, lookup, run_command
from cifar_jax.runtime.files import absolute
from experiments import sweep_report


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m experiments.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", help=f"what the axes vary: {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=cli.seeds, default="0:1", help="of every point; 0:4, 3,5")
    parser.add_argument("--random", type=cli.positive, help="so many points by chance, not a grid")
    parser.add_argument("--random-seed", type=cli.seed, default=0, help="of these points")
    parser.add_argument(
        "--workdir", type=cli.path, help="resumes by itself (default: runs/sweep-<recipe>)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in a used workdir")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between two saves")
    parser.add_argument("--replica-form", default="auto", help="map, vmap, or auto by device")
    parser.add_argument("--group-size", type=cli.positive, help="runs trained together")
    group = parser.add_argument_group(
        "axes", "values with commas (one value is no axis), or log:low:high:count, lin:..."
    )
    for field in dataclasses.fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        group.add_argument(option, metavar="AXIS", default=argparse.SUPPRESS)
    cli.add_data_options(parser)
    cli.add_test_fraction(parser)
    cli.add_device_options(parser)
    cli.add_host_options(parser)
    return parser


def plan_of(options: argparse.Namespace) -> tuple[str, Recipe, list[Axis], list[dict]]:
    """Returns the recipe's name, the recipe, the axes with several values, and the points.

    Raises:
      UserError: unknown names, nothing to vary, or a point that is no recipe.
    """
    given = [
        sweeps.parse(field.name, getattr(options, field.name), bool(options.random))
        for field in dataclasses.fields(Recipe)
        if hasattr(options, field.name)
    ]
    varied = [axis for axis in given if len(axis.values) > 1]
    fixed = {axis.name: axis.values[0] for axis in given if len(axis.values) == 1}
    if not varied:
        raise UserError("nothing to vary: give an axis, as --learning-rate log:1e-3:1:12")
    model = fixed.get("model")
    if model is not None:
        lookup(MODELS, model, "model")
    name = options.recipe or MODEL_RECIPES.get(model, cli.DEFAULT_RECIPE)
    recipe = lookup(RECIPES, name, "recipe").replace(**fixed)
    if options.random:
        points = sweeps.by_chance(varied, options.random, options.random_seed)
    else:
        points = sweeps.grid(varied)
    names = [axis.name for axis in varied]
    for point in points:
        tried = recipe.replace(**point)
        lookup(MODELS, tried.model, "model")
        if "momentum" in names and tried.optimizer != "sgd":
            raise UserError(f"--momentum is an axis of sgd; {tried.optimizer} has none")
    if "dataset" in names:
        raise UserError("--dataset is no axis: make a sweep for each")
    return name, recipe, varied, points


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, trains what is missing, writes tables and pictures. Returns `summary.json`."""
    options = make_parser().parse(arguments)
    name, recipe, varied, points = plan_of(options)
    if not options.save_minutes > 0:
        raise UserError(f"--save-minutes must be above 0, got {options.save_minutes:g}")
    from cifar_jax.parallel import distributed

    process = distributed.numbered(options.coordinator, options.num_processes, options.process_id)
    cli.start_device(options)
    words = sys.argv[1:] if arguments is None else arguments
    tell = say if process.leads else process.warn
    return _main(options, name, recipe, varied, points, words, tell, process)


def _main(
    options, name: str, recipe: Recipe, varied, points, words: Sequence[str], say, process
) -> dict:
    """`main` in each of the processes, of which the leader alone prints and reports."""
    from cifar_jax.parallel import agreement
    from cifar_jax.replicas import shared_workdir
    from cifar_jax.train import interruptible
    from cifar_jax.training.workdir import Config, describe_data

    dataset = cli.load_data(options, recipe.dataset, test_fraction=options.test_fraction)
    config = Config(
        name,
        recipe,
        options.seeds[0],
        describe_data(dataset),
        seeds=options.seeds,
        axes={axis.name: axis.text for axis in varied}
        | ({"random": [options.random, options.random_seed]} if options.random else {}),
    )
    workdir = absolute(options.workdir or f"runs/sweep-{name}")
    sweep = Sweep(config, dataset, varied, points, options, process)
    settings = {
        **config.to_dict(),
        **agreement.machine(),
        "group size": options.group_size,
        "replica form": sweep.form,
        "convolutions": sweep.run_options.lowering,
    }
    overwrite = options.overwrite
    with (
        shared_workdir.open_shared(workdir, config, process, settings, overwrite=overwrite),
        interruptible("experiments.sweep", words, say) as stop,
    ):
        stop = shared_workdir.relayed(stop, workdir, process)
        rows, seconds = sweep.train(workdir, stop, say)
        if not process.leads:
            return {}
        return sweep_report.report(config, varied, points, rows, seconds, workdir, say)


class Sweep:
    """All programs of a sweep, one after another."""

    def __init__(
        self, config, dataset, varied: Sequence[Axis], points: Sequence[dict], options, process
    ):
        from cifar_jax.replicas import programs as replica_programs
        from cifar_jax.training.setup import Options

        self.config, self.dataset, self.points, self.options = config, dataset, points, options
        self.process = process
        self.programs = sweeps.programs_of(points, varied)
        self.form = replica_programs.choose_form(options.replica_form)
        lowering = replica_programs.choose_lowering(self.form, options.conv)
        self.run_options = Options(lowering=lowering, save_minutes=options.save_minutes)
        self.count = len(points) * len(config.seeds)

    def train(self, workdir: Path, stop, say) -> tuple[list[dict], dict]:
        """Trains what is missing; returns a row for each run, and {phase: seconds}."""
        from cifar_jax.replicas import programs as replica_programs
        from cifar_jax.replicas import results as replica_results
        from cifar_jax.replicas import scheduler
        from cifar_jax.reporting.console import counted
        from cifar_jax.runtime.timing import Clock
        from cifar_jax.training import setup
        from cifar_jax.training.setup import make_run

        rows, seconds = [], {}
        runs, points = counted(self.count, "run"), counted(len(self.points), "point")
        what = f"{points}, {counted(len(self.config.seeds), 'seed')} each"
        programs = counted(len(self.programs), "program")
        say(f"Sweep      {runs}: {what}, in {programs}; {workdir}")
        for number, (static, places) in enumerate(self.programs):
            runs = [(self.points[i], seed) for i in places for seed in self.config.seeds]
            fixed = self.config.recipe.replace(**static)
            base, hparams = sweeps.base_of(fixed, [point for point, _ in runs])
            config = dataclasses.replace(self.config, recipe=base, axes=None)
            run = make_run(config, self.dataset, self.run_options, Clock())
            members = [run.with_config(self._config_of(point, seed)) for point, seed in runs]
            plan = scheduler.make_plan(
                run,
                len(runs),
                self.form,
                self.options.devices,
                self.options.group_size,
                setup.swept_step_of(base, run.model, run.steps_per_epoch),
                self.process,
            )
            if static:
                say(f"Program {number + 1} of {len(self.programs)}: {sweep_report.shown(static)}")
            say(
                f"{counted(len(runs), 'run')} together, {plan.size} at a time, "
                f"form {plan.programs.form}, {replica_programs.describe_mesh(plan.programs.mesh)}"
            )
            groups = scheduler.Groups(
                members,
                plan,
                workdir / "groups" / f"program-{number}",
                sweep_report.rows_of,
                hparams=hparams,
                names=[f"{sweep_report.shown(point)}, seed {seed}" for point, seed in runs],
            )
            done = groups.train(stop, say)
            results = [row for part in done for row in part["result"]]
            rows += [
                {"point": place, **self.points[place], "seed": seed, **row}
                for (place, seed), row in zip(
                    ((i, seed) for i in places for seed in self.config.seeds), results, strict=True
                )
            ]
            for phase, value in replica_results.all_seconds(run, done).items():
                seconds[phase] = seconds.get(phase, 0.0) + value
        return sorted(rows, key=lambda row: row["point"]), seconds

    def _config_of(self, point: Mapping, seed: int):
        recipe = self.config.recipe.replace(**point, log_every=0)
        return dataclasses.replace(self.config, recipe=recipe, seed=seed, seeds=(), axes=None)


if __name__ == "__main__":
    sys.exit(run_command(main))
