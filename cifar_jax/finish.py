"""The end of a run: the test, its report, `summary.json` and the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cifar_jax import augment, feed, hardware, inference, records, report, steps
from cifar_jax.clock import peak_memory
from cifar_jax.environment import environment
from cifar_jax.from_recipe import input_shape
from cifar_jax.model_summary import format_table, summarise
from cifar_jax.models import fold
from cifar_jax.recipes import Recipe
from cifar_jax.run import Run
from cifar_jax.training import Print
from cifar_jax.workdir import show_seeds, write_json


def test(run: Run, state: steps.TrainState, split: str) -> tuple[dict, np.ndarray]:
    """Evaluates every image of a split once; see `inference.evaluate_split`."""
    with run.clock("test"):
        return inference.evaluate_split(
            run.evaluate,
            run.predict,
            steps.inference_variables(state),
            run.dataset.splits[split],
            run.dataset.class_names,
            run.config.recipe.eval_batch_size,
        )


def summarize(run: Run, trained: dict, found: dict) -> dict:
    """Returns the contents of `summary.json`."""
    recipe, seconds = run.config.recipe, run.clock.seconds()
    trained_images = recipe.epochs * len(run.training)
    training = seconds.get("training", 0.0)
    dataset = dict(run.config.dataset) | {"source": run.dataset.source}
    return {
        **run.config.to_dict(),
        "dataset": dataset,
        "training_images": len(run.training),
        "validation_images": len(run.validation),
        "feed": run.place,
        "lowering": run.options.lowering,
        "devices_sharing_a_batch": run.devices,
        "cpu_threads": hardware.computing_threads(),
        "precision": recipe.precision,
        "parameters": run.parameters,
        **trained,
        **found,
        "images_per_second": trained_images / training if training else None,
        "seconds": seconds,
        "seconds_to_first_step": run.clock.first_step,
        "peak_memory_bytes": peak_memory(),
        **environment(),
    }


def opening_lines(run: Run, workdir: Path) -> list[str]:
    """Returns what a run says before it trains: device, data, precision, model, directory."""
    recipe, here = run.config.recipe, environment()
    device, cpu = here["device"], here["cpu"]
    where = f"{device['count']} x {device['kind']} ({device['platform']})"
    if device["platform"] == "cpu":
        where = f"cpu, {cpu['usable']} cores ({cpu['model']})"
        if hardware.computing_threads() < cpu["usable"]:
            where += f", {hardware.computing_threads()} thread: faster for steps this small"
    if run.devices > 1:
        where += f", {run.devices} devices share each batch"
    train = len(run.training)
    tested = len(run.dataset.splits["test"].labels)
    split = f"{train:,} training, {len(run.validation):,} validation, {tested:,} test images"
    seeds = f"of each of {show_seeds(run.config.seeds)}" if run.config.seeds else run.config.seed
    lines = [
        f"Device     {where}, jax {here['versions']['jax']}",
        f"Data set   {run.dataset.source}",
        f"Split      {split}, seed {seeds}",
        f"Precision  {recipe.precision}, convolutions {run.options.lowering}",
        f"Recipe     {run.config.recipe_name}: {describe(recipe)}",
        *run.notices,
        f"Workdir    {workdir}",
        "",
        format_table(summarise(run.model, input_shape(recipe, run.config.dataset["image_shape"]))),
        "",
    ]
    return lines + vgg_lines(run)


def vgg_lines(run: Run) -> list[str]:
    """Returns what there is to say about VGG16 alone: its fold, and what it needs to learn.

    Raises:
      UserError: the optimizer cannot train the folded layer exactly.
    """
    if run.config.recipe.model != "vgg16":
        return []
    lines = []
    if fold.is_folded(run.shapes.params):
        lines.append(
            f"{fold.LAYER} is folded: its {fold.BLOCKS} equal blocks are trained as one, exactly "
            "(--no-fold trains them all)"
        )
    if run.config.init_from is None:
        lines.append(
            "warning: from random weights this network, which has no batch norm, tends to stay "
            "at chance; give --pretrained imagenet, or train vgg16_bn"
        )
    return [*lines, ""]


def describe(recipe: Recipe) -> str:
    """Returns a recipe's main settings as one phrase."""
    parts = [f"{recipe.optimizer} lr {recipe.learning_rate:g}"]
    if recipe.momentum and recipe.optimizer == "sgd":
        parts.append(f"momentum {recipe.momentum:g}")
    parts += [f"batch {recipe.batch_size}", f"{recipe.epochs} epochs", f"norm {recipe.normalize}"]
    parts += [f"augment {'+'.join(recipe.augment)}"] if recipe.augment else []
    parts += [f"resized to {recipe.resize}x{recipe.resize}"] if recipe.resize else []
    parts += [f"frozen {'+'.join(recipe.freeze)}"] if recipe.freeze else []
    parts += [f"rates {' '.join(recipe.rate_scale)}"] if recipe.rate_scale else []
    parts += [f"{recipe.accumulate} parts a batch"] if recipe.accumulate > 1 else []
    parts += ["rematerialised"] if recipe.remat else []
    parts.append("tests the best epoch" if recipe.select_best else "tests the last epoch")
    return ", ".join(parts)


def results_text(summary: dict) -> str:
    """Returns the test's lines and the time's, from `summary.json`'s contents."""
    result = report.results_lines(summary, split="Test")
    return f"{result}\n{report.timing_line(summary['seconds'], summary['images_per_second'])}"


def finish(run: Run, workdir: Path, state: steps.TrainState, trained: dict, say: Print) -> dict:
    """Tests the chosen weights, draws, writes `summary.json` last, and returns its contents."""
    which = "best" if run.config.recipe.select_best else "last"
    say(f"Testing the weights of the {which} epoch ({trained['tested_epoch']})")
    found, probabilities = test(run, state, "test")
    with records.MetricsLog(workdir / "metrics.jsonl") as log:
        log.append("test", **found)
    if run.options.plots:
        draw(run, workdir, found, probabilities)
    summary = records.to_json(summarize(run, trained, found))
    predicted = probabilities.argmax(axis=-1)
    say("")
    say(
        report.first_images_lines(
            run.dataset.splits["test"].labels, predicted, run.dataset.class_names
        )
    )
    say(results_text(summary))
    write_json(workdir / "summary.json", summary)
    say(f"Written to {workdir}")
    return summary


def draw(run: Run, workdir: Path, found: dict, probabilities: np.ndarray) -> list[Path]:
    """Draws the run's pictures into `workdir/plots`; returns their paths."""
    from cifar_jax import plots

    names = run.dataset.class_names
    folder = workdir / "plots"
    train, test_split = run.dataset.splits["train"], run.dataset.splits["test"]
    order = feed.epoch_order(run.keys["order"], 1, run.training, run.config.recipe.batch_size)
    shown = order.reshape(-1)[: plots.GRID_IMAGES]
    first = np.asarray(train.images[shown[:1]])
    normalized = np.asarray(augment.normalize(first, run.config.recipe.normalize))[0]
    labels, predicted = test_split.labels, probabilities.argmax(axis=-1)
    few = slice(0, plots.GRID_IMAGES)
    rows = records.read_metrics(workdir / "metrics.jsonl", "epoch")
    heading = f"{run.config.recipe.model} on {run.config.dataset['name']}"
    with run.clock("pictures"):
        return [
            plots.training_grid(
                train.images[shown], train.labels[shown], names, folder / "training_batch.png"
            ),
            plots.channels(normalized, folder / "channels.png"),
            plots.curves(rows, folder / "curves.png", heading=heading),
            plots.confusion_matrix(found["confusion"], names, folder / "confusion_matrix.png"),
            plots.predictions(
                test_split.images[few],
                labels[few],
                predicted[few],
                names,
                folder / "predictions.png",
            ),
            plots.mistakes(
                test_split.images,
                labels,
                predicted,
                probabilities,
                names,
                folder / "mistakes.png",
            ),
        ]
