"""The published runs again, over several seeds: published, ours and PyTorch side by side.

    python -m experiments.reproduce --recipes tutorial,adam,dropout,deep --seeds 0:8

trains what is missing (each run resumes by itself), and writes `reproduce.json`, `reproduce.md`
and `reproduce.png` into `experiments/results`; recipes not named keep their earlier results. The
PyTorch column is read from `experiments/results/torch_<recipe>.jsonl`, made by

    python -m benchmarks.torch_reference --recipe R --peer eager --seeds 0:8 --out FILE
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax import settings, train
from cifar_jax.recipes import PUBLISHED, RECIPES
from cifar_jax.replicas.statistics import spread
from cifar_jax.reporting.metrics_log import to_json, write_summary
from cifar_jax.reporting.plots import attempt
from cifar_jax.runtime.errors import lookup, run_command

RESULTS = Path(__file__).resolve().parent / "results"


def measure(runs: Sequence[dict]) -> dict:
    """Returns the spread of accuracy (percent), loss and each class's accuracy over runs."""
    rates = [[100 * c for c in run["classes"]] for run in runs]
    return {
        "accuracy": spread([100 * run["accuracy"] for run in runs]),
        "loss": spread([run["loss"] for run in runs]),
        "per_class": [spread(column) for column in zip(*rates, strict=True)],
        "values": [100 * run["accuracy"] for run in runs],
    }


def ours(recipe: str, found: Sequence[int], root: Path, extra: Sequence[str]) -> list[dict]:
    """Trains (or reads back) a run for each seed."""
    runs = []
    for seed in found:
        workdir = root / f"{recipe}-seed{seed}"
        options = ["--recipe", recipe, "--seed", str(seed), "--workdir", str(workdir), "--no-plots"]
        summary = train.main([*options, *extra])
        runs.append(
            {
                "seed": seed,
                "accuracy": summary["test_accuracy"],
                "loss": summary["test_loss"],
                "classes": [row["accuracy"] for row in summary["per_class"]],
                "names": [row["class"] for row in summary["per_class"]],
                "best_epoch": summary["best_epoch"],
                "seconds": summary["seconds"],
                "dataset": summary["dataset"]["name"],
                "environment": {k: summary[k] for k in ("versions", "device", "cpu", "commit")},
            }
        )
    return runs


def pytorch(recipe: str) -> list[dict]:
    """Reads PyTorch's runs of a recipe, [] where there are none."""
    file = RESULTS / f"torch_{recipe}.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "seed": row["seed"],
            "accuracy": row["test_accuracy"],
            "loss": row["test_loss"],
            "classes": [count / 1000 for count in row["per_class"]],
        }
        for row in rows
    ]


def common_words(options) -> list[str]:
    """Returns, as words of `train`, that it stays in this process, which calls it several times,
    and the data options that were given."""
    words = ["--num-processes", "1"]
    words += ["--data-dir", options.data_dir] if options.data_dir else []
    return words + (["--archive", options.archive] if options.archive else [])


def former(file: Path) -> dict:
    """Returns the results of recipes run before, {} where there are none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def number(value: float | None, digits: int) -> str:
    """Returns `value` in so many digits, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"  # no spread of a single run


def shown(value: dict, digits: int = 2) -> str:
    """Returns mean, standard deviation and number of a `spread`."""
    std = number(value["std"], digits)
    return f"{value['mean']:.{digits}f} ± {std} (n={value['n']})"


def table(results: dict) -> str:
    """Returns the markdown of `reproduce.md`."""
    lines = [
        "| recipe | published | ours, accuracy % | PyTorch, accuracy % | difference, standard"
        " errors | ours, test loss | PyTorch, test loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        published = ", ".join(f"{value:g}" for value in result["published"]["accuracy"])
        mine, theirs = result["ours"], result["pytorch"]
        cells = [name, published, shown(mine["accuracy"])]
        if theirs:
            errors = number(result["z"], 2)
            difference = f"{result['difference']:+.2f} = {errors} se"
            cells += [shown(theirs["accuracy"]), difference]
            cells += [shown(mine["loss"], 4), shown(theirs["loss"], 4)]
        else:
            cells += ["not run", "", shown(mine["loss"], 4), ""]
        lines.append(f"| {' | '.join(cells)} |")
    names = next(iter(results.values()))["names"]
    lines += [
        "",
        f"| accuracy by class, % | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for name, result in results.items():
        published = result["published"].get("per_class")
        if published:
            lines.append(f"| {name}, published | {' | '.join(f'{v:g}' for v in published)} |")
        for who in ("ours", "pytorch"):
            if result[who]:
                cells = [
                    f"{v['mean']:.1f} ± {number(v['std'], 1)}" for v in result[who]["per_class"]
                ]
                lines.append(f"| {name}, {who} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parses, trains, writes the table."""
    parser = cli.Parser(prog="python -m experiments.reproduce", description=__doc__)
    parser.add_argument(
        "--recipes", type=settings.parse_names, default=tuple(PUBLISHED), help="a,b,c"
    )
    parser.add_argument("--seeds", type=cli.seeds, default="0:8", help="0:8 is 0 to 7")
    parser.add_argument(
        "--runs", type=cli.path, default="runs/reproduce", help="where run directories go"
    )
    parser.add_argument("--out", type=cli.path, default=str(RESULTS), help="where the tables go")
    cli.add_data_options(parser)
    options = parser.parse(arguments)
    extra = common_words(options)
    out = Path(options.out)
    results = former(out / "reproduce.json")
    for name in options.recipes:
        lookup(RECIPES, name, "recipe")
        runs = ours(name, options.seeds, Path(options.runs), extra)
        theirs = pytorch(name)
        result = {
            "published": lookup(PUBLISHED, name, "published run"),
            "names": runs[0]["names"],
            "ours": measure(runs),
            "pytorch": measure(theirs) if theirs else None,
            "runs": runs,
            "torch_runs": theirs,
        }
        if theirs:
            a, b = result["ours"]["accuracy"], result["pytorch"]["accuracy"]
            result["difference"] = a["mean"] - b["mean"]
            result["z"] = result["difference"] / math.hypot(
                a["standard_error"], b["standard_error"]
            )
        results[name] = result
    out.mkdir(parents=True, exist_ok=True)
    results = to_json({name: results[name] for name in PUBLISHED if name in results})
    text = table(results)
    write_summary(out / "reproduce.json", results)
    (out / "reproduce.md").write_text(text, encoding="utf-8")
    print(text)
    attempt({out / "reproduce.png": functools.partial(draw, results)}, print)
    return results


def draw(results: dict, path: Path) -> None:
    """Draws every seed's accuracy, ours and PyTorch's, and the published figures."""
    from experiments import figures

    groups = {
        name: {
            "ours": result["ours"]["values"],
            "PyTorch": result["pytorch"]["values"] if result["pytorch"] else [],
            "published": result["published"]["accuracy"],
        }
        for name, result in results.items()
    }
    figures.strips(groups, path, value_name="test accuracy, %")


if __name__ == "__main__":
    sys.exit(run_command(main))
