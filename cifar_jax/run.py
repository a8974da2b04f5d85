"""A run's constant parts, built from its config: model, optimizer, splits, programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cifar_jax import augment, from_recipe, input_pipeline, optimizers, steps
from cifar_jax.datasets import Dataset
from cifar_jax.models import model_of
from cifar_jax.parallel import hardware, placement, programs
from cifar_jax.parallel.placement import Placement
from cifar_jax.runtime.errors import lookup
from cifar_jax.runtime.timing import Clock
from cifar_jax.workdir import Config


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run: nothing here changes which images a step sees or what it computes of them.

    Attributes:
      feed: `resident` or `stream`.
      lowering: how convolutions are computed; results differ in rounding only.
      devices: local devices that share a batch (`hardware.choose_devices`); likewise.
      save_minutes: minutes between two saves within an epoch.
      plots: whether to draw the pictures at the end.
      tensorboard: whether to write TensorBoard events too.
    """

    feed: str = "resident"
    lowering: str = "auto"
    devices: str = "1"
    save_minutes: float = 5.0
    plots: bool = True
    tensorboard: bool = False


@dataclasses.dataclass
class Run:
    """A run's constant parts: what `train`'s phases share.

    `shapes` is the state's, abstract, and `draw(key, **options)` makes a first one; `place` says
    where the training images lie, and `notices` what there is to say of that.
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
    initial: dict | None = None

    @property
    def parameters(self) -> int:
        return steps.parameter_count(self.shapes.params)

    def create(self, **options) -> steps.TrainState:
        """Returns the state before the first step; options as `steps.create_state` takes."""
        return self.draw(self.keys["state"], **options)

    def with_config(self, config: Config) -> Run:
        """Returns the run of a config that differs in its seed, and perhaps in numbers that
        change no program, with the same compiled programs."""
        keys, training, validation = drawn(config)
        return dataclasses.replace(
            self, config=config, keys=keys, training=training, validation=validation
        )

    def start_from(self, variables: dict, record: dict) -> None:
        """Starts from these variables in place of drawn ones (`initial.Initial`)."""
        self.config = dataclasses.replace(self.config, init_from=record)
        self.initial = variables

    @property
    def devices(self) -> int:
        """How many devices share a training batch."""
        return programs.sharing_a_batch(self.mesh)

    @property
    def steps_per_epoch(self) -> int:
        return self.config.steps_per_epoch


def make_run(config: Config, dataset: Dataset, options: Options, clock: Clock) -> Run:
    """Builds model, optimizer, splits and programs; nothing is computed or compiled yet.

    Raises:
      UserError: an unknown name, a batch larger than the training split, a prefix of `freeze` or
        `rate_scale` that is of no layer, or nothing left to train.
    """
    recipe = config.recipe
    lookup(augment.NORMALIZATIONS, recipe.normalize, "normalization")
    for name in recipe.augment:
        lookup(augment.AUGMENTATIONS, name, "augmentation")
    keys, training, validation = drawn(config)
    input_pipeline.check_batch_size(recipe.batch_size, len(training))
    model = model_of(recipe, len(dataset.class_names), options.lowering)
    image_shape = dataset.splits["train"].images.shape[1:]
    create = from_recipe.state_maker(recipe, model, config.steps_per_epoch, image_shape)
    shapes = jax.eval_shape(create, keys["state"])
    optimizers.check_groups(shapes.params, recipe.freeze, recipe.rate_scales)
    step = from_recipe.step_of(recipe, model, config.steps_per_epoch)
    weights = steps.parameter_count(shapes.params)
    mesh, eval_mesh = (
        hardware.data_mesh(hardware.choose_devices(options.devices, batch_size, weights))
        for batch_size in (recipe.batch_size, recipe.eval_batch_size)
    )
    eval_mesh = mesh or eval_mesh  # weights that are on a mesh stay there
    place, said = Placement(options.feed), None
    if place is Placement.RESIDENT:
        size = dataset.splits["train"].images.nbytes
        devices = programs.sharing_a_batch(mesh)
        place, said = placement.place_for(size, devices, placement.device_memory())
    evaluate, predict = from_recipe.inference_steps(recipe, model)
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
        notices=[said] if said else [],
        draw=programs.compile_for_one_call(create, weights),
        train_many=programs.compile_training(step, mesh=mesh, remat=recipe.remat),
        evaluate=programs.compile_evaluation(evaluate, eval_mesh),
        predict=programs.compile_prediction(predict, eval_mesh),
    )


def drawn(config: Config) -> tuple[dict[str, jax.Array], np.ndarray, np.ndarray]:
    """What a run's seed decides before its first step: keys, training and validation images."""
    keys = input_pipeline.run_keys(config.seed)
    size = config.dataset["sizes"]["train"]
    return keys, *input_pipeline.split_indices(
        keys["split"], size, config.recipe.validation_fraction
    )
