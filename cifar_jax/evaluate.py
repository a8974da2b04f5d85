"""Tests trained weights on a split: `python -m cifar_jax.evaluate runs/dropout-seed42`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cifar_jax import _cli as cli
from cifar_jax.runtime.errors import UserError, run_command
from cifar_jax.runtime.streams import json_text


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.evaluate", description=__doc__)
    parser.add_argument(
        "run", type=cli.path, help="a run directory, its checkpoints, or one checkpoint"
    )
    parser.add_argument("--checkpoint", help="best, latest or a step (default: as the recipe says)")
    parser.add_argument("--dataset", help="another prepared set (default: the run's own)")
    parser.add_argument(
        "--split", default="test", help="split to evaluate; validation is what the run held out"
    )
    parser.add_argument("--batch-size", type=cli.positive, default=500, help="images in a batch")
    cli.add_tta(parser)
    parser.add_argument(
        "--corruptions",
        nargs="?",
        type=cli.path,
        const=True,
        metavar="FOLDER",
        help="also on fifteen corruptions at five severities: made of the split's images, or read "
        "from a FOLDER with CIFAR-10-C's .npy files; writes corruptions.json and .png to the run",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    cli.add_data_options(parser)
    cli.add_device_options(parser)
    cli.add_trust_option(parser)
    return parser


def _load(options, config):
    """Returns the data set and the split in it that the options name, of a run's config.

    Raises:
      UserError: no such data or split, or other images than those the run held out.
    """
    own = config.dataset
    name = options.dataset or own["name"]
    same, share = name == own["name"], config.recipe.validation_fraction
    fraction = own.get("test_fraction", 0.0) if same else 0.0
    held_out = options.split == "validation" and same and share
    splits = tuple(own["sizes"]) if held_out else (options.split,)
    try:
        dataset = cli.load_data(options, name, splits=splits, test_fraction=fraction)
    except UserError as error:
        if options.split != "validation" or share:
            raise
        raise UserError(f"this run held out no validation images, and {error}") from None
    if not held_out:
        return dataset, dataset.splits[options.split]
    if dataset.fingerprint != own["fingerprint"]:
        raise UserError(
            "the validation images are those that the run held out of its own training images; "
            f"{dataset.source} holds others"
        )
    from cifar_jax.datasets import Split
    from cifar_jax.training.setup import drawn

    train, (_, _, chosen) = dataset.splits["train"], drawn(config)
    return dataset, Split(train.images[chosen], train.labels[chosen])


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, evaluates, prints. Returns the results. Raises `UserError`."""
    options = make_parser().parse(arguments)
    from cifar_jax.parallel import hardware
    from cifar_jax.reporting import console, metrics_log
    from cifar_jax.training import evaluation

    cli.start_device(options)
    trained = evaluation.load(
        options.run,
        cli.checkpoint_name(options.checkpoint),
        lowering=options.conv,
        trust_code=options.trust_code,
    )
    side = trained.config.dataset["image_shape"][0]
    if options.image_size is None and side != 32:
        options.image_size = side
    dataset, split = _load(options, trained.config)
    evaluation.check_fits(trained, dataset)
    if options.corruptions is not None:
        _check_corruptible(split.images)
    programs = evaluation.programs(trained, options.devices, options.batch_size, options.tta)
    found, _ = evaluation.evaluate_split(
        *programs, trained.variables, split, trained.class_names, options.batch_size
    )
    result = metrics_log.to_json(
        {
            "run": str(trained.directory),
            "step": trained.step,
            "dataset": dataset.source,
            "split": options.split,
            "device": hardware.describe_device(),
            **found,
        }
    )
    if not options.json:
        for line in trained.notices:
            say(f"warning: {line}")
        say(f"{trained.config.recipe.model} after step {trained.step}, from {trained.directory}")
        say(f"{options.split} split of {dataset.source}, on {hardware.describe_device()}")
        say(console.results_lines(result, split=options.split.capitalize()))
    if options.corruptions is not None:
        result["corruptions"] = _corruptions(options, trained, programs[0], split, result, say)
    if options.json:
        say(json_text(result))
    return result


def _check_corruptible(images) -> None:
    if images.shape[1:3] != (32, 32):
        raise UserError(
            "the numbers of --corruptions are for images of 32x32 pixels, these have "
            f"{images.shape[1]}x{images.shape[2]}"
        )


def _corruptions(options, trained, evaluate, split, clean, say) -> dict:
    """Evaluates on every corruption; writes and says what was found, and returns it."""
    from cifar_jax.datasets import Split, corruptions
    from cifar_jax.reporting import plots, robustness
    from cifar_jax.runtime.files import write_json
    from cifar_jax.runtime.progress import Progress
    from cifar_jax.training import evaluation

    folder, errors = None if options.corruptions is True else options.corruptions, {}
    severities = range(1, corruptions.SEVERITIES + 1)
    total = len(corruptions.CORRUPTIONS) * len(severities) * len(split.labels)
    with Progress(total, doing="corrupting", shown=not options.json) as bar:
        for name in corruptions.CORRUPTIONS:
            errors[name] = []
            for severity in severities:
                if folder:
                    corrupted = Split(*corruptions.load_prepared(folder, name, severity))
                    highest = corrupted.labels.max(initial=0)
                    if highest >= len(trained.class_names):
                        raise UserError(f"{folder} has a label {highest}: another set's images")
                else:
                    images = corruptions.corrupt(split.images, name, severity)
                    corrupted = Split(images, split.labels)
                accuracy = evaluation.accuracy_on(
                    evaluate, trained.variables, corrupted, options.batch_size
                )
                errors[name].append(1 - accuracy)
                bar.update(len(corrupted.labels))
    found = robustness.summarize(errors, 1 - clean["test_accuracy"])
    found = {"images": folder or "made of the split's", **clean, **found}
    path = trained.directory / "corruptions.json"
    write_json(path, found)
    picture = path.with_suffix(".png")
    title = f"{trained.config.recipe.model}, step {trained.step}"
    plots.attempt(
        {picture: lambda path: robustness.heat_map(found, title, path)},
        lambda line: None if options.json else say(line),
    )
    if not options.json:
        say(robustness.lines(found))
        say(f"Written to {path} and {picture.name}")
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
