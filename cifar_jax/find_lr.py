"""Which learning rate to take: short runs whose rate rises from far too small to far too large.

    cifar-jax find-lr --recipe dropout
    cifar-jax find-lr --model mynet.py:Net --dataset folder:photos --optimizer adam

Some hundred steps of several seeds, together in one program; the loss on the way is drawn, and a
tenth of the rate at which it is lowest is suggested (Smith 2017, arXiv:1506.01186). It knows
nothing of what is best after many epochs: where that counts, `cifar-jax sweep --learning-rate` asks
it. Writes `learning_rates.csv`, `.json` and `.png` into the workdir.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.runtime.files import absolute, make_folder, write_json


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m cifar_jax.find_lr",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=cli.seeds, default="0:8", help="a short run for each")
    parser.add_argument("--low", type=float, default=1e-6, help="rate of the first step")
    parser.add_argument("--high", type=float, default=10.0, help="rate of the last step")
    parser.add_argument(
        "--steps", type=cli.positive, help="of each run (default: 100 to 2,000, by the batch size)"
    )
    parser.add_argument("--replica-form", default="auto", help="map, vmap, or auto by device")
    parser.add_argument(
        "--workdir", type=cli.path, help="where the files go (default: runs/find-lr-<recipe>)"
    )
    cli.add_recipe_options(parser)
    cli.add_data_options(parser)
    cli.add_test_fraction(parser)
    cli.add_device_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, trains, writes and says what it found. Returns what `learning_rates.json` holds.

    Raises:
      UserError: what is wrong with the options, or nothing can be suggested (the files are there).
    """
    options = make_parser().parse(arguments)
    name, recipe = cli.recipe_from(options)
    from cifar_jax.replicas import programs, rate_ramp
    from cifar_jax.runtime.progress import Progress

    steps = options.steps or rate_ramp.default_steps(recipe.batch_size)
    ramp = rate_ramp.rates(options.low, options.high, steps)
    programs.check_form(options.replica_form)
    cli.start_device(options)
    workdir = absolute(options.workdir or f"runs/find-lr-{name}")
    group = _group(options, name, rate_ramp.held(recipe), workdir, say)
    make_folder(workdir)
    group.load()
    with Progress(steps * len(options.seeds) * recipe.batch_size) as bar:
        losses = rate_ramp.losses_along(group, ramp, bar)
    found = rate_ramp.read(losses, ramp)
    return _report(found, losses, ramp, group, workdir, say)


def _group(options, name: str, recipe, workdir: Path, say):
    """Returns the runs, one a seed, after saying what they are. Raises `UserError`."""
    from cifar_jax.replicas import programs, scheduler
    from cifar_jax.replicas.group import Group
    from cifar_jax.reporting.console import counted
    from cifar_jax.runtime.timing import Clock
    from cifar_jax.training import setup, summary
    from cifar_jax.training.workdir import config_of_seeds

    dataset = cli.load_data(options, recipe.dataset, test_fraction=options.test_fraction)
    config = config_of_seeds(name, recipe, dataset, options.seeds)
    form = programs.choose_form(options.replica_form)
    lowering = programs.choose_lowering(form, options.conv, recipe.model)
    run = setup.make_run(config, dataset, setup.Options(lowering=lowering), Clock())
    step, count = setup.swept_step_of(recipe, run.model, run.steps_per_epoch), len(options.seeds)
    plan = scheduler.make_plan(run, count, form, options.devices, None, step)
    if plan.size < count:
        raise UserError(f"{counted(count, 'run')} do not fit in memory: give --seeds 0:{plan.size}")
    for line in [*summary.head_lines(run, workdir), *scheduler.opening_lines(run, plan)]:
        say(line)
    seeds = [dataclasses.replace(config, seed=seed, seeds=()) for seed in options.seeds]
    return Group([run.with_config(one) for one in seeds], plan.programs, say)


def _report(found, losses, ramp, group, workdir: Path, say) -> dict:
    """Writes and says what the ramp found."""
    from cifar_jax.reporting import sweep_figures
    from cifar_jax.reporting.plots import attempt
    from cifar_jax.runtime.environment import environment

    config, taken = group.run.config, losses.shape[1]
    seeds = [member.config.seed for member in group.members]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["learning_rate", "smoothed", *(f"seed {seed}" for seed in seeds)])
    writer.writerows(zip(ramp[:taken], found.smooth, *losses, strict=True))
    (workdir / "learning_rates.csv").write_text(text.getvalue(), encoding="utf-8")
    summary = {
        **config.to_dict(),
        "seeds": seeds,
        "suggestion": found.suggestion,
        "lowest_at": found.lowest_at,
        "lowest_loss": found.lowest,
        "first_loss": found.first,
        "steps": taken,
        "planned_steps": len(ramp),
        "rates": [float(ramp[0]), float(ramp[-1])],
        **environment(),
    }
    write_json(workdir / "learning_rates.json", summary)
    heading = f"{config.recipe_name}, {len(losses)} seeds, batch {config.recipe.batch_size}"
    draw = functools.partial(sweep_figures.ramp, losses, ramp[:taken], found, heading=heading)
    attempt({workdir / "learning_rates.png": draw}, say)
    say(f"Written to {workdir}: learning_rates.csv, learning_rates.json, learning_rates.png")
    if found.why:
        raise UserError(f"no suggestion: {found.why}")
    say(
        f"Suggestion --learning-rate {found.suggestion:g}, a tenth of {found.lowest_at:.2g}, where "
        f"the loss is lowest ({found.first:.3f} to {found.lowest:.3f}); "
        f"the recipe has {group.recipe.learning_rate:g}"
    )
    return summary


if __name__ == "__main__":
    sys.exit(run_command(main))
