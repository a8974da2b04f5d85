"""Is the comparison honest? A recipe against itself, many times: the p-values must be uniform.

    python -m experiments.null                       adam of two epochs, 640 runs as 40 pairs of 8
    python -m experiments.null --device gpu

trains `--pairs` x 2 x `--size` runs of the same settings, all with seeds of their own, deals them
to disjoint pairs of variants, and compares each pair as `cifar_jax.compare` does. The same command
goes on where it stopped. Writes `null.json` and `null.png` into `experiments/results`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifar_jax import _cli as cli
from cifar_jax.replicas import paired
from cifar_jax.reporting import plots
from cifar_jax.reporting.metrics_log import to_json, write_summary
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.runtime.files import absolute, make_folder

RESULTS = Path(__file__).parent / "results"


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m experiments.null", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=cli.positive, default=40, help="of variants")
    parser.add_argument("--size", type=cli.positive, default=8, help="seeds of each variant")
    parser.add_argument("--workdir", type=cli.path, help="resumes by itself (default: runs/null)")
    parser.add_argument("--out", type=cli.path, default=str(RESULTS), help="where the results go")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a used workdir")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between two saves")
    parser.add_argument("--replica-form", default="auto", help="map, vmap, or auto by device")
    parser.add_argument("--group-size", type=cli.positive, help="runs trained together")
    cli.add_recipe_options(parser)
    cli.add_data_options(parser)
    cli.add_device_options(parser)
    parser.set_defaults(recipe="adam", epochs=2)
    return parser


def p_values(accuracies: Sequence[float], size: int) -> list[dict]:
    """Returns what the comparison finds of each pair: {"mean", "p_t", "p_permutation", "covered":
    whether the 95 % interval holds the true difference, 0}.

    Args:
      accuracies: in percent, of 2 * size runs a pair, in the order of the seeds.
    """
    found = []
    for first, second in np.asarray(accuracies, float).reshape(-1, 2, size):
        one = paired.difference(first, second)
        low, high = one["interval_95"]
        kept = {name: one[name] for name in ("mean", "p_t", "p_permutation")}
        found.append({**kept, "covered": bool(low <= 0 <= high)})
    return found


def draw(found: Sequence[dict], path: str | Path) -> str | Path:
    """Draws the sorted p-values beside the uniform distribution's, with the band in which each lies
    with 95 % (the order statistics' beta distributions)."""
    from scipy.special import betaincinv

    n = len(found)
    k = np.arange(1, n + 1)
    low, high = (betaincinv(k, n + 1 - k, q) for q in (0.025, 0.975))
    with plots.drawing(path, 5.2, 4.8, palette=256) as figure:
        axis = figure.subplots()
        expected = k / (n + 1)
        axis.fill_between(
            expected, low, high, color=plots.QUIET, alpha=0.2, lw=0, label="95 % band"
        )
        axis.plot([0, 1], [0, 1], color=plots.QUIET, lw=0.9, ls=(0, (4, 3)), label="uniform")
        names = {"p_t": ("paired t", plots.BLUE), "p_permutation": ("permutation", plots.ORANGE)}
        for name, (label, color) in names.items():
            axis.plot(expected, sorted(row[name] for row in found), "o", color=color, ms=4)
            axis.plot([], [], "o", color=color, ms=4, label=label)
        axis.set(title=f"{n} comparisons of a recipe with itself", ylabel="p-value found")
        axis.set(xlabel="p-value expected", xlim=(0, 1), ylim=(0, 1))
        axis.grid()
        axis.legend(fontsize=8.5)
    return path


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, trains what is missing, writes the results. Returns what `null.json` holds."""
    options = make_parser().parse(arguments)
    if options.size < 2 or options.pairs < 2:
        raise UserError("--size and --pairs must be at least 2")
    from cifar_jax.parallel.distributed import ALONE
    from cifar_jax.replicas import sweep
    from cifar_jax.train import interruptible
    from cifar_jax.training.workdir import Config, describe_data, open_workdir

    name, recipe = cli.recipe_from(options)
    cli.start_device(options)
    dataset = cli.load_data(options, recipe.dataset)
    seeds = tuple(range(2 * options.pairs * options.size))
    data = describe_data(dataset)
    config = Config(name, recipe, 0, data, seeds=seeds, axes={"null": str(options.size)})
    workdir = absolute(options.workdir or "runs/null")
    words = sys.argv[1:] if arguments is None else arguments
    work = sweep.Sweep(config, dataset, [], [{}], options, ALONE)
    opened = open_workdir(workdir, config, overwrite=options.overwrite)
    with opened, interruptible("experiments.null", words, say) as stop:
        rows, seconds = work.train(workdir, stop, say)
    rows.sort(key=lambda row: row["seed"])
    lost = [row["seed"] for row in rows if row["diverged_at_step"] is not None]
    if lost:
        raise UserError(f"seeds {', '.join(map(str, lost))} diverged: no null experiment of those")
    return report(options, config, rows, seconds, say)


def report(options, config, rows: Sequence[dict], seconds: dict, say) -> dict:
    """Writes and says what came of it."""
    from scipy.stats import kstest

    from cifar_jax.runtime.environment import environment

    accuracies = [100 * row["test_accuracy"] for row in rows]
    found = p_values(accuracies, options.size)
    tests = {name: float(kstest([r[name] for r in found], "uniform").pvalue) for name in ("p_t",)}
    covered = sum(row["covered"] for row in found)
    results = {
        "recipe_name": config.recipe_name,
        "recipe": config.recipe.to_dict(),
        "dataset": config.dataset["name"],
        "size": options.size,
        "pairs": found,
        "covered": covered,
        "below_0.05": sum(row["p_t"] < 0.05 for row in found),
        "kolmogorov_smirnov_p": tests,
        "accuracies": accuracies,
        "seconds": seconds,
        **environment(),
    }
    out = Path(options.out)
    make_folder(out)
    write_summary(out / "null.json", to_json(results))
    plots.attempt({out / "null.png": functools.partial(draw, found)}, say)
    say(
        f"{len(found)} comparisons of {config.recipe_name} with itself, {options.size} seeds each: "
        f"{results['below_0.05']} with p below 0.05 (paired t), {covered} of the 95 % intervals "
        f"hold 0; uniform p-values: Kolmogorov-Smirnov p = {tests['p_t']:.2g}"
    )
    say(f"Written to {out}")
    return results


if __name__ == "__main__":
    sys.exit(run_command(main))
