"""The end of a run: the test, its report, `summary.json` and the pictures."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from cifar_jax import augment, input_pipeline, steps
from cifar_jax.models import fold
from cifar_jax.models.layer_table import format_table, summarise
from cifar_jax.parallel import hardware
from cifar_jax.reporting import confusion, console, metrics_log, page, plots, predictions
from cifar_jax.reporting.plots import attempt
from cifar_jax.reporting.predictions import Predictions
from cifar_jax.reporting.run_files import command
from cifar_jax.runtime.environment import environment
from cifar_jax.runtime.files import write_json
from cifar_jax.runtime.timing import peak_memory
from cifar_jax.settings import Recipe
from cifar_jax.training import evaluation, setup
from cifar_jax.training.runs import Print
from cifar_jax.training.setup import Run
from cifar_jax.training.workdir import show_seeds


def test(run: Run, state: steps.TrainState, split: str) -> tuple[dict, np.ndarray]:
    """Evaluates every image of a split once; see `evaluation.evaluate_split`."""
    with run.clock("test"):
        return evaluation.evaluate_split(
            run.evaluate,
            run.predict,
            steps.inference_variables(state),
            run.dataset.splits[split],
            run.dataset.class_names,
            run.config.recipe.eval_batch_size,
        )


def held_out(run: Run, state: steps.TrainState) -> Predictions | None:
    """Returns what the tested weights say of the validation images; None where there are none."""
    if len(run.validation) == 0:
        return None
    train, tested = run.dataset.splits["train"], len(run.dataset.splits["test"].labels)
    size = min(run.config.recipe.eval_batch_size, tested)
    with run.clock("test"):
        probabilities = evaluation.probabilities_of(
            run.predict,
            steps.inference_variables(state),
            train.images[run.validation],
            -(-tested // size),
            size,
        )
    labels = np.asarray(train.labels, np.int32)[run.validation]
    return Predictions(probabilities, labels, np.asarray(run.validation, np.int32))


def summarize(run: Run, trained: dict, found: dict) -> dict:
    """Returns the contents of `summary.json`."""
    recipe, seconds = run.config.recipe, run.clock.seconds()
    trained_images = trained["epochs"] * run.config.images_per_epoch
    training = seconds.get("training", 0.0)
    dataset = dict(run.config.dataset) | {"source": run.dataset.source}
    return {
        **run.config.to_dict(),
        "dataset": dataset,
        "training_images": len(run.training),
        "validation_images": len(run.validation),
        "feed": run.place,
        "lowering": run.options.lowering,
        **({"plain_layers": run.forms} if run.forms else {}),
        "devices_sharing_a_batch": run.devices,
        "cpu_threads": hardware.computing_threads(),
        "precision": recipe.precision,
        "parameters": run.parameters,
        **trained,
        **found,
        "images_per_second": trained_images / training if training else None,
        "command": command(run.config.to_dict()),
        "started": run.clock.started,
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 4),
        "seconds_to_first_step": run.clock.first_step,
        "peak_memory_bytes": peak_memory(),
        **environment(),
    }


def machine_lines(run: Run) -> list[str]:
    """Returns what every command that trains says first: device, data set, precision."""
    here = environment()
    device, cpu = here["device"], here["cpu"]
    where = f"{device['count']} x {device['kind']} ({device['platform']})"
    if device["platform"] == "cpu":
        where = f"cpu, {console.counted(cpu['usable'], 'core')} ({cpu['model']})"
        if hardware.computing_threads() < cpu["usable"]:
            where += f", {hardware.computing_threads()} thread: faster for steps this small"
    if run.devices > 1:
        where += f", {run.devices} devices share each batch"
    return [
        f"Device     {where}, jax {here['versions']['jax']}",
        f"Data set   {run.dataset.source}",
        f"Precision  {run.config.recipe.precision}, convolutions {run.options.lowering}",
    ]


def head_lines(run: Run, workdir: Path) -> list[str]:
    """Returns `machine_lines` with what is trained on, how, and where it is kept."""
    tested = len(run.dataset.splits["test"].labels)
    split = f"{len(run.training):,} training, {len(run.validation):,} validation, {tested:,} test"
    seeds = f"of each of {show_seeds(run.config.seeds)}" if run.config.seeds else run.config.seed
    device, data, precision = machine_lines(run)
    return [
        device,
        data,
        f"Split      {split} images, seed {seeds}",
        precision,
        f"Recipe     {run.config.recipe_name}: {describe(run.config.recipe)}",
        *run.notices,
        f"Workdir    {workdir}",
    ]


def opening_lines(run: Run, workdir: Path) -> list[str]:
    """Returns what a run says before it trains: device, data, precision, model, directory."""
    shape = setup.input_shape(run.config.recipe, run.config.dataset["image_shape"])
    table = format_table(summarise(run.model, shape))
    return [*head_lines(run, workdir), "", table, "", *vgg_lines(run)]


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
    parts += [f"batch {recipe.batch_size}", console.counted(recipe.epochs, "epoch")]
    parts += [f"norm {recipe.normalize}"]
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
    result = console.results_lines(summary, split="Test")
    return f"{result}\n{console.timing_line(summary['seconds'], summary['images_per_second'])}"


def finish(run: Run, workdir: Path, state: steps.TrainState, trained: dict, say: Print) -> dict:
    """Tests the chosen weights, says what it found, draws, writes `summary.json` last, and returns
    its contents. A picture that fails costs a warning. Of a run that was stopped nothing is drawn
    and no summary is written: the run goes on in its directory."""
    which = "best" if run.config.recipe.select_best else "last"
    say(f"Testing the weights of the {which} epoch ({trained['tested_epoch']})")
    found, probabilities = test(run, state, "test")
    with metrics_log.MetricsLog(workdir / "metrics.jsonl") as log:
        row = log.append("test", **found)
    run.log(row | {"step": trained["steps"]})
    labels, names = run.dataset.splits["test"].labels, run.dataset.class_names
    said, validation = predictions.of_split(probabilities, labels), held_out(run, state)
    predictions.write(workdir, said, validation)
    if run.options.csv:
        predictions.write_csv(workdir, said, names)
    say("")
    say(console.first_images_lines(labels, probabilities.argmax(axis=-1), names))
    say(console.results_lines(found, split="Test"))
    stopped = "stopped" in trained
    if run.options.plots and not stopped:
        draw(run, workdir, state.key.addressable_data(0), found, probabilities, say)
    summary = metrics_log.to_json(summarize(run, trained, found))
    if not stopped:
        write_json(workdir / "summary.json", summary)
        if run.options.report:
            write_report(run, workdir, say)
    say(console.timing_line(summary["seconds"], summary["images_per_second"]))
    say(f"Stopped; it goes on in {workdir}" if stopped else f"Written to {workdir}")
    return summary


def write_report(run: Run, workdir: Path, say: Print) -> None:
    """Writes `report.html` of a run, or of many, whose `summary.json` is there."""
    tested = run.dataset.splits["test"]
    attempt({workdir / page.NAME: lambda path: page.write([workdir], path, tested)}, say)


def first_batch(run: Run, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most `plots.GRID_IMAGES` images of the first training batch as the network got
    them (normalised, augmented, resized), float32, and their labels.

    Args:
      key: the `TrainState.key` of any of the run's steps.
    """
    recipe, train = run.config.recipe, run.dataset.splits["train"]
    order = input_pipeline.epoch_order(run.keys["order"], 1, run.training, recipe.batch_size)[0]
    shown = order[order >= 0][: plots.GRID_IMAGES]
    preprocess = jax.jit(setup.preprocess_of(recipe))
    of_run = (key, np.int32(0), shown)
    draws = steps.step_keys(key, 0)[1]
    images = preprocess(train.images[shown], draws, of_run=of_run)
    if mix := setup.mix_of(recipe):
        images = jax.jit(mix)(images, draws, 0, np.ones(len(shown), np.float32)).images
    return np.asarray(images, np.float32), train.labels[shown]


def training_note(run: Run) -> str:
    """Returns what there is to say of training curves that look worse than validation's."""
    causes = ["augmentation"] if run.config.recipe.augment else []
    shape = setup.input_shape(run.config.recipe, run.config.dataset["image_shape"])
    if any(layer.kind == "Dropout" for layer in summarise(run.model, shape)):
        causes.insert(0, "dropout")
    if not causes:
        return ""
    return (
        f"Training is measured with {' and '.join(causes)}, validation without: it may look worse."
    )


def draw(
    run: Run, workdir: Path, key: jax.Array, found: dict, probabilities: np.ndarray, say: Print
) -> None:
    """Draws the run's pictures into `workdir/plots`, and says which could not be drawn.

    Args:
      key: as `first_batch` takes it.
      found, probabilities: from `test`.
    """
    recipe, names = run.config.recipe, run.dataset.class_names
    split = run.dataset.splits["test"]
    true, predicted = split.labels, probabilities.argmax(axis=-1)
    drawn = np.random.default_rng(run.config.seed).permutation(len(true))[: plots.GRID_IMAGES]

    def training_batch(path: Path) -> None:
        images, labels = first_batch(run, key)
        size = min(recipe.batch_size, len(run.training))
        which = "The" if len(labels) == size else f"{len(labels)} images of the"
        heading = f"{which} first training batch, as the network saw it"
        shown = augment.displayable(images, recipe.normalize)
        plots.training_grid(shown, labels, names, path, heading=heading)

    def channels(path: Path) -> None:
        order = input_pipeline.epoch_order(run.keys["order"], 1, run.training, recipe.batch_size)
        image = run.dataset.splits["train"].images[order[0, 0]]
        plots.channels(np.asarray(augment.normalize(image, recipe.normalize)), path)

    def curves(path: Path) -> None:
        config, tested = run.config, f"{100 * found['test_accuracy']:.2f} % of the test right"
        heading = f"{config.recipe_name} on {config.dataset['name']}, seed {config.seed}: {tested}"
        rows = metrics_log.read_metrics(workdir / "metrics.jsonl")
        plots.curves(rows, path, heading=heading, note=training_note(run))

    pictures = {
        "training_batch": training_batch,
        "channels": channels,
        "curves": curves,
        "confusion_matrix": lambda path: confusion.confusion_matrix(
            found["confusion"], names, path
        ),
        "predictions": lambda path: plots.predictions(
            split.images[drawn],
            true[drawn],
            predicted[drawn],
            names,
            path,
            sure=probabilities.max(axis=-1)[drawn],
            heading=f"Test images drawn at random, seed {run.config.seed}",
        ),
        "mistakes": lambda path: plots.mistakes(
            split.images, true, predicted, probabilities, names, path
        ),
    }
    with run.clock("pictures"):
        attempt(
            {workdir / "plots" / f"{name}.png": picture for name, picture in pictures.items()}, say
        )
