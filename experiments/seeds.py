"""How far the published single runs lie from other seeds' runs of the same recipe.

    python -m experiments.seeds                                    64 tutorial, 64 adam, 32 dropout,
                                                                   16 deep
    python -m experiments.seeds --recipes tutorial --count 64      a part

trains each recipe's runs together (`cifar_jax.train --seeds`; the same command goes on where it
stopped) and writes `seeds.json`, `seeds.md` and `seeds.png` into `experiments/results`; recipes not
named keep their earlier results.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax import settings, train
from cifar_jax.recipes import PUBLISHED
from cifar_jax.replicas.statistics import spread
from cifar_jax.reporting.metrics_log import to_json, write_summary
from cifar_jax.reporting.plots import attempt
from cifar_jax.runtime.errors import lookup, run_command
from experiments.reproduce import RESULTS, common_words, former

COUNTS = {"tutorial": 64, "adam": 64, "dropout": 32, "deep": 16}
KEPT = (
    *("test_accuracy", "test_loss", "per_class", "runs", "ensemble", "diverged", "form", "devices"),
    *("group_size", "seconds", "images_per_second", "peak_memory_bytes", "versions", "device"),
    *("cpu", "commit"),
)


def accuracies(summary: Mapping) -> list[float]:
    """Returns the test accuracy of every run, in percent."""
    return [100 * run["test_accuracy"] for run in summary["runs"]]


def row(name: str, summary: Mapping) -> str:
    """Returns a recipe's row of the table; accuracies in percent."""
    values = accuracies(summary)
    found = spread(values)
    low, high = found["interval_95"]
    where = [
        f"{value:g}: above {sum(v < value for v in values)} of {len(values)}, "
        f"{(value - found['mean']) / found['std']:+.1f} std"
        for value in PUBLISHED[name]["accuracy"]
    ]
    cells = [
        name,
        str(found["n"]),
        f"{found['mean']:.2f}",
        f"{found['std']:.2f}",
        f"{found['standard_error']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{found['min']:.2f} to {found['max']:.2f}",
        f"{100 * summary['ensemble']['test_accuracy']:.2f}",
        "; ".join(where),
        f"{sum(summary['seconds'].values()) / 60:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(results: Mapping) -> str:
    """Returns the markdown of `seeds.md`."""
    lines = [
        "| recipe | runs | mean, % | std | standard error | 95 % interval of the mean | range |"
        " ensemble | published | minutes |",
        "|---" * 10 + "|",
    ]
    return "\n".join(lines + [row(name, summary) for name, summary in results.items()]) + "\n"


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parses, trains, writes the table and the picture."""
    parser = cli.Parser(prog="python -m experiments.seeds", description=__doc__)
    parser.add_argument("--recipes", type=settings.parse_names, default=tuple(COUNTS), help="a,b,c")
    parser.add_argument("--count", type=cli.positive, help="seeds 0 to COUNT - 1 of each recipe")
    parser.add_argument(
        "--runs", type=cli.path, default="runs/seeds", help="where run directories go"
    )
    parser.add_argument("--out", type=cli.path, default=str(RESULTS), help="where the table goes")
    cli.add_data_options(parser)
    options = parser.parse(arguments)
    results = former(Path(options.out) / "seeds.json")
    for name in options.recipes:
        count = options.count or lookup(COUNTS, name, "recipe with published figures")
        lookup(PUBLISHED, name, "recipe with published figures")
        words = ["--recipe", name, "--dataset", "cifar10", "--seeds", f"0:{count}"]
        workdir = Path(options.runs) / f"{name}-{count}"
        summary = train.main([*words, "--workdir", str(workdir), *common_words(options)])
        results[name] = {key: summary[key] for key in KEPT}
        results = to_json({name: results[name] for name in COUNTS if name in results})
        write(results, Path(options.out))
    print(table(results))
    return results


def write(results: Mapping, out: Path) -> None:
    """Writes what is there so far."""
    from experiments import figures

    out.mkdir(parents=True, exist_ok=True)
    write_summary(out / "seeds.json", results)
    (out / "seeds.md").write_text(table(results), encoding="utf-8")
    panels = {}
    for name, summary in results.items():
        values = accuracies(summary)
        panels[name] = {
            "values": values,
            "found": spread(values),
            "ensemble": 100 * summary["ensemble"]["test_accuracy"],
            "published": PUBLISHED[name]["accuracy"],
        }
    draw = functools.partial(figures.histograms, panels, value_name="test accuracy, %")
    attempt({out / "seeds.png": draw}, print)


if __name__ == "__main__":
    sys.exit(run_command(main))
