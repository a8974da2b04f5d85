"""Tests trained weights on a split: `python -m cifar_jax.evaluate runs/dropout-seed42`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cifar_jax import cli
from cifar_jax.errors import run_command
from cifar_jax.streams import json_text


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.evaluate", description=__doc__)
    parser.add_argument("run", help="a run directory, its checkpoints, or one checkpoint")
    parser.add_argument("--checkpoint", help="best, latest or a step (default: as the recipe says)")
    parser.add_argument("--dataset", help="another prepared set (default: the run's own)")
    parser.add_argument("--split", default="test", help="split to evaluate")
    parser.add_argument("--batch-size", type=cli.positive, default=500, help="images in a batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    cli.add_data_options(parser)
    cli.add_device_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, evaluates, prints. Returns the results. Raises `UserError`."""
    options = make_parser().parse(arguments)
    from cifar_jax import hardware, inference, records, report

    cli.start_device(options)
    trained = inference.load(
        options.run, cli.checkpoint_name(options.checkpoint), lowering=options.conv
    )
    name = options.dataset or trained.config.dataset["name"]
    side = trained.config.dataset["image_shape"][0]
    if options.image_size is None and side != 32:
        options.image_size = side
    dataset = cli.load_data(options, name, splits=(options.split,))
    inference.check_fits(trained, dataset)
    split = dataset.splits[options.split]
    found, _ = inference.evaluate_split(
        *inference.programs(trained, options.devices, options.batch_size),
        trained.variables,
        split,
        dataset.class_names,
        options.batch_size,
    )
    result = records.to_json(
        {
            "run": str(trained.directory),
            "step": trained.step,
            "dataset": dataset.source,
            "split": options.split,
            "device": hardware.describe_device(),
            **found,
        }
    )
    if options.json:
        say(json_text(result))
        return result
    for line in trained.notices:
        say(f"warning: {line}")
    say(f"{trained.config.recipe.model} after step {trained.step}, from {trained.directory}")
    say(f"{options.split} split of {dataset.source}, on {hardware.describe_device()}")
    say(report.results_lines(result, split=options.split.capitalize()))
    return result


if __name__ == "__main__":
    sys.exit(run_command(main))
