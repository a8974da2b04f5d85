"""Whether the convolution's lowering changes what a run reaches.

    python -m experiments.lowerings --recipe tutorial --seeds 0:8
    python -m experiments.lowerings --recipe dropout --epochs 2 --seeds 0:8

trains all seeds with each lowering (same weights, batches and draws; rounding differs) and writes
`results/lowerings_<recipe>.json` and `.md`: the accuracies, and the differences from `lax`, seed by
seed. Each lowering's runs are one `cifar_jax.train --seeds`, which resumes by itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax import train
from cifar_jax.recipes import RECIPES
from cifar_jax.replicas.statistics import spread
from cifar_jax.reporting.metrics_log import to_json, write_summary
from cifar_jax.runtime.errors import UserError, lookup, run_command
from experiments.reproduce import RESULTS, common_words, number, shown

COMPARED = ("lax", "gemm", "winograd")


def compare(runs: dict[str, list[dict]], reference: str = "lax") -> dict:
    """Returns the spread of each lowering's accuracy, and of its differences from `reference`.

    Args:
      runs: {lowering: [{"test_accuracy", "test_loss", ...}, in the order of the seeds]}.

    Returns:
      {lowering: {"accuracy", "loss" (spreads), "difference": spread of percentage points, seed
      by seed, "z": its mean over its standard error; nan where that is 0 or there is one seed}}.
    """
    found = {}
    for name, rows in runs.items():
        values = [100 * row["test_accuracy"] for row in rows]
        result = {"accuracy": spread(values), "loss": spread([row["test_loss"] for row in rows])}
        if name != reference:
            pairs = zip(rows, runs[reference], strict=True)
            points = [100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in pairs]
            difference = spread(points)
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
        cells = [name, shown(row["accuracy"]), shown(row["loss"], 4)]
        if "difference" in row:
            mean, error = row["difference"]["mean"], number(row["difference"]["standard_error"], 2)
            cells.append(f"{mean:+.2f} ± {error} (se) = {number(row['z'], 2)} se")
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
    parser.add_argument(
        "--runs", type=cli.path, default="runs/lowerings", help="where run directories go"
    )
    parser.add_argument("--out", type=cli.path, default=str(RESULTS), help="where the table goes")
    cli.add_data_options(parser)
    options = parser.parse(arguments)
    recipe = lookup(RECIPES, options.recipe, "recipe")
    epochs = options.epochs or recipe.epochs
    words = ["--recipe", options.recipe, "--epochs", str(epochs), *common_words(options)]
    words += ["--seeds", ",".join(str(seed) for seed in options.seeds)]
    runs, kept = {}, {"recipe": options.recipe, "epochs": epochs}
    for name in COMPARED:
        workdir = Path(options.runs) / f"{options.recipe}-{name}"
        summary = train.main([*words, "--conv", name, "--workdir", str(workdir)])
        if summary["diverged"]:
            raise UserError(f"--conv {name}: some runs diverged, so seeds cannot be paired")
        runs[name] = summary["runs"]
        kept |= {key: summary[key] for key in ("versions", "device", "cpu", "commit")}
        kept["dataset"] = summary["dataset"]["name"]  # its source is a path of the machine's
    results = to_json(compare(runs))
    text = table(results)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    kept |= {"lowerings": results, "runs": to_json(runs)}
    write_summary(out / f"lowerings_{options.recipe}.json", kept)
    (out / f"lowerings_{options.recipe}.md").write_text(text, encoding="utf-8")
    print(text)
    return results


if __name__ == "__main__":
    sys.exit(run_command(main))
