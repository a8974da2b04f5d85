"""Trained weights taken out of a run directory, for `evaluate`, `predict` and research code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import input_pipeline, steps
from cifar_jax.checkpoints import manifests, save_restore
from cifar_jax.datasets import Dataset, Split
from cifar_jax.models import model_of, own
from cifar_jax.parallel import hardware
from cifar_jax.parallel import programs as parallel_programs
from cifar_jax.parallel.placement import Examples
from cifar_jax.reporting import console
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import setup
from cifar_jax.training.workdir import Config, read_config


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
      config: of its run.
      model: the linen module; its `apply(variables, preprocess(images))` gives logits.
      variables: what to evaluate: parameters (averaged where the recipe says so) and statistics.
      preprocess: images uint8 [N, H, W, 3] -> normalised floats.
      step: optimizer steps the weights have seen.
      directory: the checkpoint's run directory.
      notices: one line for each damaged checkpoint passed over, and for code that was trusted.
    """

    config: Config
    model: nn.Module
    variables: dict[str, Any]
    preprocess: Any
    step: int
    directory: Path
    notices: list[str]

    @property
    def class_names(self) -> list[str]:
        return self.config.dataset["class_names"]

    def logits(self, images) -> jax.Array:
        """Returns float32 logits [N, classes] of uint8 images [N, H, W, 3]."""
        return steps.predict_step(
            self.variables, jnp.asarray(images), model=self.model, preprocess=self.preprocess
        )


def load(
    path: str | Path,
    which: str | int | None = None,
    *,
    lowering: str = "auto",
    trust_code: bool = False,
) -> Trained:
    """Loads the weights of a run.

    Args:
      path: a run directory, its `checkpoints`, or one checkpoint in it.
      which: `best`, `latest` or a step; by default what the recipe would test.
      lowering: how convolutions are computed.
      trust_code: whether code that the directory brings may be run (`own.resolve`).

    Raises:
      UserError: no run directory, code that is not trusted, no such checkpoint, or none that is
        undamaged.
    """
    folder, asked = manifests.locate(path, which or "latest")
    run = folder.parent
    config = read_config(run)
    recipe = config.recipe
    if which is None and asked == "latest" and recipe.select_best:
        asked = "best" if manifests.best_step(folder) is not None else "latest"
    said = None
    if config.code is not None:
        name, said = own.resolve(recipe.model, config.code, run, trust_code)
        recipe = recipe.replace(model=name)
    model = model_of(recipe, len(config.dataset["class_names"]), lowering)
    abstract = abstract_payload(config, model)
    found = save_restore.restore(folder, abstract, which=asked)
    state = jax.device_put(found.state["state"])
    return Trained(
        config=config,
        model=model,
        variables=steps.inference_variables(state),
        preprocess=setup.preprocess_of(recipe),
        step=found.step,
        directory=run,
        notices=[*([said] if said else []), *found.skipped],
    )


def abstract_payload(config: Config, model: nn.Module) -> dict:
    """Returns what a run's checkpoints hold as shapes: {"state": TrainState, "record"}."""
    steps_per_epoch, image_shape = config.steps_per_epoch, config.dataset["image_shape"]
    create = setup.state_maker(config.recipe, model, steps_per_epoch, image_shape)
    shapes = jax.eval_shape(lambda: create(jax.random.key(0)))
    return setup.abstract_payload(shapes, steps_per_epoch)


def evaluate_split(
    evaluate: Callable,
    predict: Callable,
    variables: dict,
    split: Split,
    class_names: Sequence[str],
    batch_size: int,
) -> tuple[dict, np.ndarray]:
    """Evaluates every image of a split once, whatever the batch size.

    Args:
      evaluate, predict: from `programs.compile_evaluation` and `compile_prediction`.
      batch_size: images in a batch; the last is padded and masked.

    Returns:
      `console.results` with `confusion` int [C, C] added, and probabilities float32 [N, C].
    """
    data, indices = _in_batches(split, batch_size)
    sums = jax.device_get(evaluate(variables, Examples(**data), indices))
    logits = predict(variables, data["image"][np.maximum(indices, 0)])
    return split_results(sums, logits, class_names, len(split.labels))


def accuracy_on(evaluate: Callable, variables: dict, split: Split, batch_size: int) -> float:
    """Returns the accuracy on a split, in [0, 1]; arguments as in `evaluate_split`."""
    data, indices = _in_batches(split, batch_size)
    sums = jax.device_get(evaluate(variables, Examples(**data), indices))
    return float(sums["correct"]) / len(split.labels)


def _in_batches(split: Split, batch_size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns a split's arrays, on the host (outside jit a gather is half a dozen programs), and
    the order that has every image once."""
    size = len(split.labels)
    indices = input_pipeline.batches(np.arange(size, dtype=np.int32), min(batch_size, size))
    return input_pipeline.on_host(split.images, split.labels), indices


def probabilities_of(
    predict: Callable, variables: dict, images: np.ndarray, batches: int, batch_size: int
) -> np.ndarray:
    """Returns probabilities float32 [N, C] of images uint8 [N, H, W, 3], `batches` batches of
    `batch_size` in a call, the last padded: the shape of an earlier call needs no new program."""
    size, found = len(images), []
    for start in range(0, size, batches * batch_size):
        indices = np.minimum(start + np.arange(batches * batch_size), size - 1)
        logits = predict(variables, images[indices].reshape(batches, batch_size, *images.shape[1:]))
        found.append(softmax(logits))
    return np.concatenate(found)[:size]


def softmax(logits: jax.Array) -> np.ndarray:
    """Returns float32 probabilities [batches * B, C] of logits [batches, B, C]."""
    return np.asarray(jax.jit(jax.nn.softmax)(logits)).reshape(-1, logits.shape[-1])


def split_results(
    sums: dict, logits: jax.Array, class_names: Sequence[str], size: int
) -> tuple[dict, np.ndarray]:
    """Returns what `evaluate_split` does, of the sums over a split of `size` images and their
    logits [batches, B, C]."""
    found = console.results(sums, sums["confusion"], class_names)
    found["confusion"] = sums["confusion"]
    return found, softmax(logits)[:size]


def programs(
    trained: Trained, devices: str = "1", batch_size: int = 1, tta: str | None = None
) -> tuple[Callable, Callable]:
    """Returns the compiled (evaluate, predict) of a trained model; `devices` as in
    `hardware.choose_devices`, for batches of that size, and `tta` where not the recipe's.

    Raises:
      UserError: an unknown `tta`.
    """
    recipe = trained.config.recipe
    recipe = recipe if tta is None else recipe.replace(tta=tta)
    weights = steps.parameter_count(trained.variables["params"])
    mesh = hardware.data_mesh(hardware.choose_devices(devices, batch_size, weights))
    evaluate, predict = setup.inference_steps(recipe, trained.model)
    options = {"in_pieces": setup.in_pieces(trained.model, batch_size, mesh)}
    return parallel_programs.compile_evaluation(
        evaluate, mesh, **options
    ), parallel_programs.compile_prediction(predict, mesh, **options)


def check_fits(trained: Trained, dataset: Dataset) -> None:
    """Raises `UserError` where a data set's classes or image size are not those trained on. Classes
    without names, as of arrays, are those trained on in their order."""
    names = dataset.class_names
    unnamed = list(names) == [str(label) for label in range(len(trained.class_names))]
    if list(names) != list(trained.class_names) and not unnamed:
        raise UserError(
            f"{trained.directory} was trained on the classes {', '.join(trained.class_names[:4])} "
            f"... ({len(trained.class_names)}); the data set has {', '.join(names[:4])} ... "
            f"({len(names)})"
        )
    side = trained.config.dataset["image_shape"][0]
    for split in dataset.splits.values():
        if split.images.shape[1] != side:
            raise UserError(
                f"{trained.directory} was trained on images of {side} pixels, these have "
                f"{split.images.shape[1]}: give --image-size {side}"
            )
