"""A run's constant parts, built from its config: model, optimizer, splits, programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cifar_jax import augment, input_pipeline, optimizers, steps
from cifar_jax.datasets import Dataset, own_images
from cifar_jax.models import init, mode, model_of, own, plain
from cifar_jax.ops import convolution
from cifar_jax.parallel import hardware, placement, programs
from cifar_jax.parallel.placement import Placement
from cifar_jax.runtime.errors import UserError, lookup, one_line
from cifar_jax.runtime.timing import Clock
from cifar_jax.settings import Recipe
from cifar_jax.training import checks
from cifar_jax.training.workdir import Config


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run: nothing here changes which images a step sees or what it computes of them.

    Attributes:
      feed: `resident` or `stream`.
      lowering: how convolutions are computed; results differ in rounding only.
      devices: local devices that share a batch (`hardware.choose_devices`); likewise.
      save_minutes: minutes between two saves within an epoch.
      plots: whether to draw the pictures at the end.
      log: where the rows of a run go too (`reporting/loggers.py`).
      report: whether to write `report.html` at the end.
      csv: whether to write `predictions.csv` too.
    """

    feed: str = "resident"
    lowering: str = "auto"
    devices: str = "1"
    save_minutes: float = 5.0
    plots: bool = True
    log: tuple[str, ...] = ()
    report: bool = True
    csv: bool = False


@dataclasses.dataclass
class Run:
    """A run's constant parts: what `train`'s phases share.

    `shapes` is the state's, abstract, and `draw(key, **options)` makes a first one; `place` says
    where the training images lie, `forms` how a network in plain Flax is computed
    (`models.plain.forms`), and `notices` what there is to say of both.
    """

    config: Config
    dataset: Dataset
    options: Options
    clock: Clock
    model: Any
    training: np.ndarray
    validation: np.ndarray
    keys: dict[str, jax.Array]
    shapes: steps.TrainState
    mesh: Mesh | None
    place: Placement
    notices: list[str]
    draw: Callable[..., steps.TrainState]
    train_many: Callable
    evaluate: Callable
    predict: Callable
    forms: dict[str, dict[str, int]]
    initial: dict | None = None
    log: Callable[[dict], None] = lambda row: None

    @property
    def parameters(self) -> int:
        return steps.parameter_count(self.shapes.params)

    def create(self, initial: dict | None = None) -> steps.TrainState:
        """Returns the state before the first step; `initial` as `steps.create_state` takes it."""
        images = self.config.recipe.whitening_images
        if images and (initial is None or self.model.whitening not in initial.get("params", {})):
            params = {self.model.whitening: {"kernel": self._whitening_kernel(images)}}
            initial = {**(initial or {})}
            initial["params"] = {**initial.get("params", {}), **params}
        return self.draw(self.keys["state"], initial=initial)

    def _whitening_kernel(self, images: int) -> np.ndarray:
        """Returns the kernel that the first training images give (`augment.whitening_kernel`)."""
        recipe, chosen = self.config.recipe, self.training[:images]
        x = jnp.asarray(self.dataset.splits["train"].images[chosen])
        x = augment.normalize(x, recipe.normalize)
        x = augment.resize(x, recipe.resize) if recipe.resize else x
        size = self.shapes.params[self.model.whitening]["kernel"].shape[0]
        return augment.whitening_kernel(x, size)

    def with_config(self, config: Config) -> Run:
        """Returns the run of a config that differs in its seed, and perhaps in numbers that
        change no program, with the same compiled programs."""
        keys, training, validation = drawn(config)
        return dataclasses.replace(
            self, config=config, keys=keys, training=training, validation=validation
        )

    def start_from(self, variables: dict, record: dict) -> None:
        """Starts from these variables in place of drawn ones (`init_from.Initial`)."""
        self.config = dataclasses.replace(self.config, init_from=record)
        self.initial = variables

    @property
    def devices(self) -> int:
        """How many devices share a training batch."""
        return programs.sharing_a_batch(self.mesh)

    @property
    def steps_per_epoch(self) -> int:
        return self.config.steps_per_epoch


def make_run(
    config: Config, dataset: Dataset, options: Options, clock: Clock, model: nn.Module | None = None
) -> Run:
    """Builds model, optimizer, splits and programs; nothing is computed or compiled yet.

    Args:
      model: in place of the one that the recipe names.

    Raises:
      UserError: an unknown name, a batch larger than the training split, a prefix of `freeze` or
        `rate_scale` that is of no layer, or nothing left to train.
    """
    recipe = config.recipe
    lookup(augment.NORMALIZATIONS, recipe.normalize, "normalization")
    augment.check(recipe.augment)
    if options.feed == "stream" and own_images.is_own(dataset.name):
        raise UserError(f"--feed stream reads prepared sets; {dataset.name} is read whole")
    keys, training, validation = drawn(config)
    input_pipeline.check_batch_size(recipe.batch_size, len(training))
    if model is None:
        model = model_of(recipe, len(dataset.class_names), options.lowering)
    model = plain.fast(model, options.lowering)
    image_shape = dataset.splits["train"].images.shape[1:]
    if own.is_own(recipe.model):
        shape = input_shape(recipe, image_shape)
        checks.check_own(recipe.model, model, shape, len(dataset.class_names))
    create = state_maker(recipe, model, config.steps_per_epoch, image_shape)
    shapes = jax.eval_shape(create, keys["state"])
    groups = {"--decay-scale": recipe.decay_scales, "--rate-epochs": recipe.rates_epochs}
    groups["--stop-epochs"] = recipe.stops_epochs
    optimizers.check_groups(shapes.params, recipe.freeze, recipe.rate_scales, groups)
    check_whitening(recipe, model, len(training))
    check_low_resolution(recipe, model, shapes, image_shape)
    step = step_of(recipe, model, config.steps_per_epoch)
    weights = steps.parameter_count(shapes.params)
    mesh, eval_mesh = (
        hardware.data_mesh(hardware.choose_devices(options.devices, batch_size, weights))
        for batch_size in (recipe.batch_size, recipe.eval_batch_size)
    )
    eval_mesh = mesh or eval_mesh  # weights that are on a mesh stay there
    train_in_pieces = in_pieces(model, recipe.batch_size, mesh)
    eval_in_pieces = in_pieces(model, recipe.eval_batch_size, eval_mesh)
    place, said = Placement(options.feed), None
    if place is Placement.RESIDENT:
        size = dataset.splits["train"].images.nbytes
        devices = programs.sharing_a_batch(mesh)
        place, said = placement.place_for(size, devices, placement.device_memory())
    evaluate, predict = inference_steps(recipe, model)
    batch = (recipe.batch_size, *input_shape(recipe, image_shape))
    forms = plain.forms(model, batch, **mode(model, train=True))
    notices = [*([plain.forms_line(forms)] if forms else []), *([said] if said else [])]
    return Run(
        config=config,
        dataset=dataset,
        options=options,
        clock=clock,
        model=model,
        training=training,
        validation=validation,
        keys=keys,
        shapes=shapes,
        mesh=mesh,
        place=place,
        notices=notices,
        forms=forms,
        draw=programs.compile_for_one_call(create, weights),
        train_many=programs.compile_training(
            step, mesh=mesh, remat=recipe.remat, in_pieces=train_in_pieces
        ),
        evaluate=programs.compile_evaluation(evaluate, eval_mesh, in_pieces=eval_in_pieces),
        predict=programs.compile_prediction(predict, eval_mesh, in_pieces=eval_in_pieces),
    )


def in_pieces(model: nn.Module, batch_size: int, mesh: Mesh | None) -> bool:
    """Whether a model computes its part of such a batch as `ops.pieces.Pieces`."""
    images = batch_size // programs.sharing_a_batch(mesh)
    declared = getattr(model, "in_pieces", False)
    return declared and convolution.takes_pieces(model.lowering, images)


def check_whitening(recipe: Recipe, model: nn.Module, training_images: int) -> None:
    """Raises `UserError` where the kernel of `whitening_images` cannot be had."""
    asked = recipe.whitening_images
    if asked and not hasattr(model, "whitening"):
        raise UserError(f"--whitening-images {asked}: {recipe.model} has no whitening layer")
    if asked > training_images:
        raise UserError(
            f"--whitening-images {asked} is more than the {training_images} training images; "
            f"give --whitening-images {training_images}"
        )


def check_low_resolution(
    recipe: Recipe, model: nn.Module, shapes: steps.TrainState, image_shape: Sequence[int]
) -> None:
    """Raises `UserError` where the model cannot take images of the side of `low_resolution`."""
    side, _ = recipe.low_resolution_first
    if not side:
        return
    whole = input_shape(recipe, image_shape)
    if side >= min(whole[:2]):
        raise UserError(
            f"--low-resolution {recipe.low_resolution} is not below the images' "
            f"{whole[0]}x{whole[1]} pixels"
        )
    images = jax.ShapeDtypeStruct((2, side, side, whole[2]), jnp.float32)
    variables = steps.inference_variables(shapes)
    try:
        jax.eval_shape(
            functools.partial(model.apply, **mode(model, train=False)), variables, images
        )
    except Exception as error:  # a layer of fixed size, in any network
        raise UserError(
            f"--low-resolution {recipe.low_resolution}: {recipe.model} takes no images of {side} "
            f"pixels; it needs a network that ends in a global pool ({one_line(error)[:200]})"
        ) from None


def drawn(config: Config) -> tuple[dict[str, jax.Array], np.ndarray, np.ndarray]:
    """What a run's seed decides before its first step: keys, training and validation images."""
    keys = input_pipeline.run_keys(config.seed)
    size = config.dataset["sizes"]["train"]
    return keys, *input_pipeline.split_indices(
        keys["split"], size, config.recipe.validation_fraction
    )


# What a recipe says, as the parts that the steps take: one place for training and for every later
# use of the weights.

Shape = tuple[int, int, int]


def input_shape(recipe: Recipe, image_shape: Sequence[int]) -> Shape:
    """Returns (H, W, C) of what the model reads, for images of `image_shape`."""
    height, width, channels = image_shape
    side = recipe.resize
    return (side, side, channels) if side else (height, width, channels)


def preprocess_of(
    recipe: Recipe, steps_per_epoch: int = 1, side: int = 0
) -> Callable[..., jax.Array]:
    """Returns the recipe's `preprocess` (`steps.make_preprocess`), to images of `side` pixels in
    place of its own if that is not 0; without a key it does not augment."""
    return steps.make_preprocess(
        recipe.normalize,
        tuple(name for name in recipe.augment if name not in augment.MIXES),
        recipe.precision,
        side or recipe.resize,
        steps_per_epoch,
        translate_pixels=recipe.translate_pixels,
        cutout_size=recipe.cutout_size,
    )


def mix_of(recipe: Recipe) -> Callable | None:
    """Returns the recipe's `mix` (`augment.mixer`)."""
    alphas = {"mixup_alpha": recipe.mixup_alpha, "cutmix_alpha": recipe.cutmix_alpha}
    return augment.mixer(recipe.augment, **alphas)


def state_maker(
    recipe: Recipe, model: nn.Module, steps_per_epoch: int, image_shape: Sequence[int]
) -> Callable[..., steps.TrainState]:
    """Returns `create(key, **options)`: `steps.create_state` of this recipe."""
    return functools.partial(
        steps.create_state,
        model,
        optimizers.make_optimizer(recipe, steps_per_epoch),
        image_shape=input_shape(recipe, image_shape),
        ema=recipe.ema_decay > 0 or recipe.lookahead > 0,
        freeze=recipe.freeze,
    )


# Numbers of a recipe that a step takes as arrays: runs that differ in nothing else share programs.
TRACED = (*optimizers.TRACED, "label_smoothing", "ema_decay")


def step_of(
    recipe: Recipe,
    model: nn.Module,
    steps_per_epoch: int,
    hparams: Mapping[str, jax.Array] | None = None,
) -> Callable:
    """Returns `step(state, batch) -> (state, sums)`: `steps.train_step` of this recipe, with
    `hparams` in place of its own `TRACED` ones (see `optimizers.make_optimizer`)."""
    given = dict(hparams or {})
    step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizers.make_optimizer(recipe, steps_per_epoch, given),
        mix=mix_of(recipe),
        loss_reduction=recipe.loss_reduction,
        label_smoothing=given.get("label_smoothing", recipe.label_smoothing),
        ema_decay=given.get("ema_decay", recipe.ema_decay),
        lookahead=(recipe.lookahead, recipe.epochs * steps_per_epoch),
        freeze=recipe.freeze,
    )

    side, share = recipe.low_resolution_first
    low, full = (preprocess_of(recipe, steps_per_epoch, pixels) for pixels in (side, 0))
    low_steps = round(share * recipe.epochs * steps_per_epoch)

    def in_microbatches(state, batch, **options):
        count = recipe.accumulate
        if count == 1:
            count = programs.microbatches(batch["label"].shape[0], state)
        at_full = functools.partial(step, preprocess=full, accumulate=count, **options)
        if not low_steps:
            return at_full(state, batch)
        at_low = functools.partial(step, preprocess=low, accumulate=count, **options)
        return steps.one_then_other(at_low, at_full, low_steps, state, batch)

    return in_microbatches


def swept_step_of(recipe: Recipe, model: nn.Module, steps_per_epoch: int) -> Callable:
    """Returns `step(state, batch, axis_name=None, **hparams)`: `step_of` with the `hparams` it is
    called with."""

    def step(state, batch, axis_name=None, **hparams):
        swept = step_of(recipe, model, steps_per_epoch, hparams)
        return swept(state, batch, axis_name=axis_name)

    return step


def cpu_threads(recipe: Recipe, devices: str) -> int | None:
    """Returns `hardware.cpu_threads` of a recipe, its network sized for CIFAR-10. Starts no
    backend: the answer is for `hardware.select_platform`. A network of the user's own that does
    not take such images gets all of them."""

    def weights() -> int:
        model = model_of(recipe, 10, "lax")
        images = jax.ShapeDtypeStruct((1, *input_shape(recipe, (32, 32, 3))), jnp.float32)
        shapes = jax.eval_shape(functools.partial(init, model), jax.random.key(0), images)
        return steps.parameter_count(shapes["params"])

    if own.is_own(recipe.model):
        with contextlib.suppress(Exception):  # `checks.check_own` says it, on the images there are
            return hardware.cpu_threads(devices, recipe.batch_size, weights)
        return None
    return hardware.cpu_threads(devices, recipe.batch_size, weights)


def inference_steps(recipe: Recipe, model: nn.Module) -> tuple[Callable, Callable]:
    """Returns `steps.eval_step` and `steps.predict_step` of this recipe."""
    parts = {"model": model, "preprocess": preprocess_of(recipe), "tta": recipe.tta}
    return tuple(functools.partial(step, **parts) for step in (steps.eval_step, steps.predict_step))


def payload(state, step_metrics: dict) -> dict:
    """Returns what a run's checkpoints hold: `record` is the sums of the epoch under way."""
    return {"state": state, "record": step_metrics}


def abstract_payload(shapes: steps.TrainState, steps_per_epoch: int) -> dict:
    """Returns `payload` as shapes, to restore into; `shapes` is the state's."""
    return payload(shapes, jax.eval_shape(lambda: programs.empty_metrics(steps_per_epoch)))
