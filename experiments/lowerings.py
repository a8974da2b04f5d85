"""Whether the convolution's lowering changes what a run reaches.

    python -m experiments.lowerings --recipe tutorial --seeds 0:8
    python -m experiments.lowerings --recipe dropout --epochs 2 --seeds 0:8

trains every seed with each lowering (same weights, batches and draws; rounding differs) and
writes `results/lowerings_<recipe>.json` and `.md`: the accuracies, and the differences from
`lax`, seed by seed. Runs resume by themselves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_jax import cli
from cifar_jax.errors import lookup, run_command
from cifar_jax.recipes import RECIPES
from cifar_jax.records import to_json, write_summary
from cifar_jax.spread import spread
from experiments.reproduce import RESULTS, data_words, measure, ours

COMPARED = ("lax", "gemm", "winograd")


def compare(runs: dict[str, list[dict]], reference: str = "lax") -> dict:
    """Returns the spread of each lowering's accuracy, and of its differences from `reference`.

    Args:
      runs: {lowering: [run of `reproduce.ours`, in the order of the seeds]}.

    Returns:
      {lowering: {"accuracy", "loss" (spreads), "difference": spread of percentage points, seed
      by seed, "z": its mean over its standard error, None for the reference}}.
    """
    found = {}
    for name, rows in runs.items():
        measured = measure(rows)
        result = {key: measured[key] for key in ("accuracy", "loss", "values")}
        if name != reference:
            pairs = zip(rows, runs[reference], strict=True)
            difference = spread([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs])
            error = difference["standard_error"]
            result["difference"] = difference
            result["z"] = difference["mean"] / error if error > 0 else math.nan
        found[name] = result
    return found


def table(results: dict) -> str:
    """Returns the Markdown of a comparison."""
    lines = [
        "| lowering | test accuracy, % | test loss | difference from lax, points, seed by seed |",
        "|---|---|---|---|",
    ]
    for name, row in results.items():
        accuracy, loss = row["accuracy"], row["loss"]
        cells = [name, f"{accuracy['mean']:.2f} ± {accuracy['std']:.2f} (n={accuracy['n']})"]
        cells.append(f"{loss['mean']:.4f} ± {loss['std']:.4f}")
        if "difference" in row:
            d = row["difference"]
            cells.append(f"{d['mean']:+.2f} ± {d['standard_error']:.2f} (se) = {row['z']:.2f} se")
        else:
            cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parses, trains, writes the table."""
    parser = cli.Parser(prog="python -m experiments.lowerings", description=__doc__)
    parser.add_argument("--recipe", default="tutorial", help="its name")
    parser.add_argument("--epochs", type=cli.positive, help="in place of the recipe's")
    parser.add_argument("--seeds", type=cli.seeds, default="0:8", help="0:8 is 0 to 7")
    parser.add_argument("--runs", default="runs/lowerings", help="where run directories go")
    parser.add_argument("--out", default=str(RESULTS), help="where the table goes")
    cli.add_data_options(parser)
    options = parser.parse(arguments)
    recipe = lookup(RECIPES, options.recipe, "recipe")
    epochs = options.epochs or recipe.epochs
    extra = [*data_words(options), "--epochs", str(epochs)]
    runs: dict[str, list[dict]] = {name: [] for name in COMPARED}
    for seed in options.seeds:
        for name in COMPARED:
            root = Path(options.runs) / name
            runs[name] += ours(
                options.recipe, range(seed, seed + 1), root, [*extra, "--conv", name]
            )
    results = to_json(compare(runs))
    text = table(results)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = {"recipe": options.recipe, "epochs": epochs, "lowerings": results, "runs": to_json(runs)}
    write_summary(out / f"lowerings_{options.recipe}.json", kept)
    (out / f"lowerings_{options.recipe}.md").write_text(text, encoding="utf-8")
    print(text)
    return results


if __name__ == "__main__":
    sys.exit(run_command(main))
