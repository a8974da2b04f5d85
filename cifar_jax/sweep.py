"""Settings of a recipe as axes: which accuracy each point gives, over several seeds.

    cifar-jax sweep --recipe dropout --learning-rate log:1e-3:1:12 --momentum 0,0.9 \\
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
from collections.abc import Sequence

from cifar_jax import _cli as cli
from cifar_jax.recipes import MODEL_RECIPES, RECIPES
from cifar_jax.replicas import sweep as sweeps
from cifar_jax.replicas.sweep import Axis, Sweep
from cifar_jax.runtime.errors import UserError, lookup, run_command
from cifar_jax.runtime.files import absolute
from cifar_jax.settings import Recipe, option_of


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m cifar_jax.sweep",
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
        group.add_argument(option_of(field.name), metavar="AXIS", default=argparse.SUPPRESS)
    cli.add_training_options(parser)
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
        cli.check_model(model)
    name = options.recipe or MODEL_RECIPES.get(model, cli.DEFAULT_RECIPE)
    recipe = lookup(RECIPES, name, "recipe").replace(**fixed)
    if options.random:
        points = sweeps.by_chance(varied, options.random, options.random_seed)
    else:
        points = sweeps.grid(varied)
    names = [axis.name for axis in varied]
    for point in points:
        tried = recipe.replace(**point)
        cli.check_model(tried.model)
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
    from cifar_jax.replicas import shared_workdir, sweep_report
    from cifar_jax.train import interruptible
    from cifar_jax.training.workdir import config_of_seeds

    dataset = cli.load_data(options, recipe.dataset, test_fraction=options.test_fraction)
    axes = {axis.name: axis.text for axis in varied}
    axes |= {"random": [options.random, options.random_seed]} if options.random else {}
    config = config_of_seeds(name, recipe, dataset, options.seeds, axes)
    workdir = absolute(options.workdir or f"runs/sweep-{name}")
    sweep = Sweep(config, dataset, varied, points, options, process)
    settings = {
        **config.to_dict(),
        **agreement.machine(),
        "group size": options.group_size,
        "replica form": sweep.form,
        "convolutions": options.conv,
    }
    overwrite = options.overwrite
    with (
        shared_workdir.open_shared(workdir, config, process, settings, overwrite=overwrite),
        interruptible("cifar_jax.sweep", words, say) as stop,
    ):
        stop = shared_workdir.relayed(stop, workdir, process)
        rows, seconds = sweep.train(workdir, stop, say)
        if not process.leads:
            return {}
        return sweep_report.report(config, varied, points, rows, seconds, workdir, say)


if __name__ == "__main__":
    sys.exit(run_command(main))
