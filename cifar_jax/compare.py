"""Does a change help? Trains variants with the same seeds and says how far they differ, with error
bars; or puts finished runs in one table.

    python -m cifar_jax.compare --recipe adam --variants "" "label_smoothing=0.1" --seeds 0:32
    python -m cifar_jax.compare tutorial adam --seeds 0:16 --epochs 2
    python -m cifar_jax.compare --recipe adam --variants "" "augment=flip" --seeds 0:128 --until 0.2
    python -m cifar_jax.compare runs/adam-seed42 runs/deep-seed42

A variant is key=value pairs of the recipe's settings ("" for none), or another recipe's name; the
first is what the others are compared with. All runs train together, in as few programs as there can
be: learning rate, momentum, weight decay, clipping, label smoothing and averaging are arrays of
one program. The same command goes on where it stopped. The workdir gets `results.csv`, a row a run,
`summary.json` and `plots/`.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax.recipes import RECIPES
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.runtime.files import absolute, write_json
from cifar_jax.runtime.streams import json_text
from cifar_jax.settings import Recipe

LOOK = 8  # seeds between two looks of `--until`


class _Formatter(cli._Formatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands."""


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m cifar_jax.compare", description=__doc__, formatter_class=_Formatter
    )
    parser.add_argument("what", nargs="*", help="finished run directories; with --seeds variants")
    parser.add_argument(
        "--variants", nargs="+", help='two or more, as "" "label_smoothing=0.1 augment=flip"'
    )
    cli.add_replica_options(parser)
    parser.add_argument(
        "--until",
        type=float,
        metavar="POINTS",
        help="train --look seeds at a time, and stop once the interval is ± so many points; it is "
        "one that stays true at every look (Wang and Ramdas 2023)",
    )
    parser.add_argument(
        "--look", type=cli.positive, help=f"seeds between two looks of --until (default: {LOOK})"
    )
    parser.add_argument(
        "--workdir", type=cli.path, help="resumes by itself (default: runs/compare-...)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in a used workdir")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between two saves")
    parser.add_argument("--no-plots", action="store_true", help="draw no pictures at the end")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--csv", action="store_true", help="print the table as CSV, nothing else")
    cli.add_recipe_options(parser)
    cli.add_training_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, compares, prints. Returns what `--json` prints. Raises `UserError`."""
    options = make_parser().parse(arguments)
    if options.json and options.csv:
        raise UserError("--json and --csv are two ways to print the same; give one")
    if options.seeds is None:
        return _compare_finished(options, say)
    if options.variants and options.what:
        raise UserError(f"--variants and {options.what[0]!r} both name variants; give one of them")
    for text in options.what:
        if Path(text).is_dir():
            raise UserError(f"{text} is a directory; finished runs are compared without --seeds")
    words = sys.argv[1:] if arguments is None else arguments
    return _compare_variants(options, words, say)


def _compare_finished(options, say) -> dict:
    from cifar_jax.replicas import finished
    from cifar_jax.reporting import metrics_log

    if options.variants or options.until is not None or options.look:
        raise UserError("variants are trained with --seeds, as --seeds 0:32; give them")
    variants = [text for text in options.what if not Path(text).exists()]
    if variants and (variants[0] in RECIPES or "=" in variants[0]):
        raise UserError(f"{variants[0]!r} is a variant to train: give --seeds too, as --seeds 0:32")
    runs = finished.read([Path(cli.path(text)) for text in options.what])
    found = {"runs": finished.rows_of(runs), **finished.answer(runs, _loader(options))}
    found = metrics_log.to_json(found)
    if options.json:
        say(json_text(found))
    elif options.csv:
        say(csv_text(found["runs"]).rstrip("\n"))
    else:
        say(finished.text_of(found))
    return found


def _loader(options):
    """Returns `load(config)`: the data set of a finished run, on a device that is started then."""

    def load(config):
        own = config.dataset
        side = own["image_shape"][0]
        if options.image_size is None and side != 32:
            options.image_size = side
        cli.start_device(options)
        splits, fraction = tuple(own["sizes"]), own.get("test_fraction", 0.0)
        return cli.load_data(options, own["name"], splits, fraction)

    return load


def _variants_of(options) -> tuple[str, Recipe, list]:
    """Returns the recipe's name, the recipe, and the variants. Raises `UserError`."""
    from cifar_jax.replicas import variants

    texts = options.variants or options.what
    named = [text.strip() for text in texts if text.strip() in RECIPES]
    if options.recipe is None and named and len(named) == len(texts):
        options.recipe = named[0]
    given = cli.given_settings(options)
    name, recipe = cli.recipe_from(options)
    return name, recipe, variants.parse(texts, name, recipe, given)


def _check(options) -> int:
    """Returns the seeds between two looks, 0 for one look. Raises `UserError`."""
    if not options.save_minutes > 0:
        raise UserError(f"--save-minutes must be above 0, got {options.save_minutes:g}")
    if len(options.seeds) < 2:
        raise UserError("a difference has an interval from two seeds on; give more --seeds")
    from cifar_jax.replicas.programs import check_form

    check_form(options.replica_form)
    if options.until is None:
        if options.look:
            raise UserError("--look is about --until: give both")
        return 0
    if not (math.isfinite(options.until) and options.until > 0):
        raise UserError(f"--until must be above 0 points, got {options.until:g}")
    return options.look or LOOK


def _compare_variants(options, words: Sequence[str], say) -> dict:
    look = _check(options)
    name, recipe, compared = _variants_of(options)
    from cifar_jax.parallel import agreement, distributed
    from cifar_jax.replicas import shared_workdir, variants
    from cifar_jax.train import interruptible, safe_name
    from cifar_jax.training.workdir import Config, describe_data, show_seeds

    process = distributed.numbered(options.coordinator, options.num_processes, options.process_id)
    cli.start_device(options)
    quiet = options.json or options.csv
    tell = (_silent if quiet else say) if process.leads else process.warn
    data_name, fraction = compared[0].recipe.dataset, options.test_fraction
    dataset = cli.load_data(options, data_name, test_fraction=fraction)
    axes = {"variants": " | ".join(variant.name for variant in compared)}
    axes |= {"until": f"{options.until:g}", "look": str(look)} if look else {}
    config = Config(
        name, recipe, options.seeds[0], describe_data(dataset), seeds=options.seeds, axes=axes
    )
    whole = f"compare-{name}-{'-'.join(axes.values())}-seeds{show_seeds(options.seeds)}"
    workdir = absolute(options.workdir or f"runs/{safe_name(whole)}")
    comparison = variants.Comparison(config, dataset, compared, options, process)
    settings = {
        **config.to_dict(),
        **agreement.machine(),
        "group size": options.group_size,
        "replica form": comparison.form,
        "convolutions": options.conv,
    }
    opened = shared_workdir.open_shared(
        workdir, config, process, settings, overwrite=options.overwrite
    )
    with opened, interruptible("cifar_jax.compare", words, say) as stop:
        stop = shared_workdir.relayed(stop, workdir, process)
        rows, seconds, looks = _train(options, look, comparison, compared, workdir, stop, tell)
        if not process.leads:
            return {}
        return _report(options, config, comparison, compared, rows, seconds, looks, workdir, say)


def _silent(line: str) -> None:
    """Says nothing: the result alone is printed."""


def _train(options, look: int, comparison, compared, workdir: Path, stop, say) -> tuple:
    """Returns the rows of all runs, {phase: seconds}, and the numbers of seeds looked at."""
    from cifar_jax.replicas import variants
    from cifar_jax.replicas.comparison import against_first

    if not look:
        return *comparison.train(workdir, stop, say), []
    names, classes = [variant.name for variant in compared], comparison.dataset.class_names
    seeds, looks = comparison.config.seeds, []
    rows, seconds = [], {}
    for so_far in variants.train_in_looks(comparison, look, workdir, stop, say):
        rows, seconds = so_far
        looks.append(min(look * (len(looks) + 1), len(seeds)))
        if looks[-1] < 2:
            continue
        found = against_first(names, rows, classes, looks)
        reach = max(one["sequential"]["reach"] for one in found)
        wide = f"±{reach:.2f} points" if math.isfinite(reach) else "without end so far"
        say(f"After {looks[-1]} seeds the interval is {wide}; --until {options.until:g}")
        if reach <= options.until:
            break
    else:
        say(f"These were all --seeds: the interval is wider than --until {options.until:g}")
    return rows, seconds, looks


def _report(options, config, comparison, compared, rows, seconds, looks, workdir, say) -> dict:
    """Says and writes what came of it; returns what `summary.json` holds."""
    from cifar_jax.replicas import comparison as answers
    from cifar_jax.replicas import paired
    from cifar_jax.reporting import metrics_log
    from cifar_jax.reporting.plots import attempt
    from cifar_jax.runtime.environment import environment

    names, classes = [variant.name for variant in compared], comparison.dataset.class_names
    found = answers.against_first(names, rows, classes, looks)
    summary = metrics_log.to_json(
        {
            **config.to_dict(),
            "variants": [
                {**one, **cost, "recipe": variant.recipe.to_dict()}
                for one, cost, variant in zip(
                    answers.by_variant(names, rows), comparison.costs(), compared, strict=True
                )
            ],
            "variants_in_programs": len(comparison.programs),
            "seeds_trained": len({row["seed"] for row in rows}),
            "comparisons": found,
            "methods": [paired.TEST, *([paired.SEQUENTIAL] if looks else [])],
            "runs": rows,
            "seconds": seconds,
            **environment(),
        }
    )
    table = csv_text([_row(row, names, classes) for row in rows])
    (workdir / "results.csv").write_text(table, encoding="utf-8")
    if not options.no_plots:
        pictures = {
            workdir / "plots" / f"difference-{place}.png": _picture(answers, one, rows, place)
            for place, one in enumerate(found, 1)
        }
        attempt(pictures, _silent if options.json or options.csv else say)
    write_json(workdir / "summary.json", summary)
    if options.json or options.csv:
        say(json_text(summary) if options.json else table.rstrip("\n"))
        return summary
    say("")
    say(answers.text_of(summary))
    say(f"Written to {workdir}")
    return summary


def _picture(answers, found: Mapping, rows: Sequence[Mapping], place: int):
    return lambda path: answers.draw(found, rows, place, path)


def _row(row: Mapping, names: Sequence[str], classes: Sequence[str]) -> dict:
    """A run's row of `results.csv`."""
    skipped = ("point", "per_class")
    return {
        "variant": names[row["point"]],
        **{name: value for name, value in row.items() if name not in skipped},
        **{f"accuracy of {name}": v for name, v in zip(classes, row["per_class"], strict=True)},
    }


def csv_text(rows: Sequence[Mapping]) -> str:
    """Returns rows with the same keys as CSV with a heading."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(main))
