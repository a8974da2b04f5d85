"""Recipes: everything that makes a run what it is, apart from its seed and its data.

`RECIPES` holds the published runs this project reproduces, and the settings its other networks
start from. Figures ("published") are what the PyTorch write-ups printed from their own single run.
"""

from __future__ import annotations

import dataclasses
import math

from cifar_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One run's settings. Fields are plain values, so a recipe is also its JSON.

    Attributes:
      model: a name in `cifar_jax.models.MODELS`.
      dataset: a name `cifar_jax.datasets.load_dataset` understands.
      normalize: a name in `cifar_jax.augment.NORMALIZATIONS`: `half` maps x/255 to [-1, 1],
        `unit` leaves it in [0, 1], `cifar10` and `imagenet` use the channel statistics.
      augment: names in `cifar_jax.augment.AUGMENTATIONS`, applied in order to training images.
      validation_fraction: share of the training split held out at random, in [0, 1).
      epochs: passes over the training images.
      batch_size: images in a step; the last step of an epoch may hold fewer (its loss is the
        mean over those it holds).
      eval_batch_size: images in an evaluation batch; results do not depend on it.
      optimizer: `sgd`, `adam` or `adamw`.
      learning_rate: the peak rate of the schedule.
      momentum: SGD's momentum (0 is plain SGD); ignored by Adam.
      nesterov: Nesterov's form of the momentum.
      weight_decay: as PyTorch means it: added to the gradient by `sgd` and `adam`, decoupled
        in `adamw`.
      schedule: `constant`, `cosine`, `onecycle` or `step`.
      warmup_epochs: linear warm-up from 0, in epochs.
      step_epochs, step_factor: `step` multiplies the rate by the factor every so many epochs.
      clip_norm: clips the gradient to this global norm; 0 is off.
      label_smoothing: in [0, 1).
      ema_decay: decay of an exponential moving average of the weights, evaluated in their
        place; 0 is off.
      select_best: test the weights of the lowest validation loss (otherwise the last ones).
      log_every: steps between two printed mean losses; 0 prints one line an epoch.
      fold: train vgg16's first linear layer as the mean of its 49 blocks where that is exact
        (`models/fold.py`); other models do without.
      precision: `float32`, or `bfloat16` activations over float32 weights.
      resize: side in pixels to which images are resized on the device, in training and in every
        use of the weights; 0 is off.
      freeze: layers that are not trained, by how their names begin (`layer_groups`).
      rate_scale: `prefix=factor` each: layers whose learning rate is the schedule's times the
        factor.
      accumulate: parts a batch is cut into, one after another, for small memories: the same
        step, except that batch normalisation sees a part at a time.
      remat: compute activations again in the backward pass in place of keeping them: the same
        step in less memory and more time.
    """

    model: str = "tutorial_cnn"
    dataset: str = "cifar10"
    normalize: str = "half"
    augment: tuple[str, ...] = ()
    validation_fraction: float = 0.0
    epochs: int = 2
    batch_size: int = 4
    eval_batch_size: int = 500
    optimizer: str = "sgd"
    learning_rate: float = 0.001
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    step_epochs: float = 10.0
    step_factor: float = 0.1
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    select_best: bool = False
    log_every: int = 0
    fold: bool = True
    precision: str = "float32"
    resize: int = 0
    freeze: tuple[str, ...] = ()
    rate_scale: tuple[str, ...] = ()
    accumulate: int = 1
    remat: bool = False

    def __post_init__(self):
        check(self)

    def replace(self, **changes) -> Recipe:
        """Returns a copy with `changes`. Raises `UserError` on unknown fields or bad values."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise UserError(f"unknown recipe field {name!r}; {nearest(name, names)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Returns the fields as JSON-ready values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict) -> Recipe:
        """Returns the recipe that `to_dict` wrote. Raises `UserError` on unknown fields."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls().replace(**values | lists)

    @property
    def rate_scales(self) -> dict[str, float]:
        """`rate_scale` as {prefix: factor}. Raises `UserError` where an entry is none."""
        return dict(_rate_scale(entry) for entry in self.rate_scale)


def _rate_scale(entry: str) -> tuple[str, float]:
    prefix, _, factor = entry.partition("=")
    try:
        value = float(factor)
    except ValueError:
        value = math.nan
    if not prefix or math.isnan(value):
        raise UserError(f"--rate-scale takes prefix=factor, as features=0.1; got {entry!r}")
    if not 0 < value <= 1000:
        raise UserError(
            f"--rate-scale {entry}: the factor must be above 0 and at most 1000; "
            f"for layers that are not to be trained there is --freeze {prefix}"
        )
    return prefix, value


# What each number may be: field -> (lowest, highest, whether the lowest itself is allowed).
_BOUNDS = {
    "validation_fraction": (0, 0.95, True),
    "epochs": (1, 100_000, True),
    "batch_size": (1, 1_000_000, True),
    "eval_batch_size": (1, 1_000_000, True),
    "learning_rate": (0, 1000, True),
    "momentum": (0, 0.99999, True),
    "weight_decay": (0, 10, True),
    "warmup_epochs": (0, 100_000, True),
    "step_epochs": (0, 100_000, False),
    "step_factor": (0, 1, False),
    "clip_norm": (0, 1e6, True),
    "label_smoothing": (0, 0.999, True),
    "ema_decay": (0, 0.999999, True),
    "log_every": (0, 1_000_000_000, True),
    "resize": (0, 4096, True),
    "accumulate": (1, 1_000_000, True),
}

_WHOLE = ("epochs", "batch_size", "eval_batch_size", "log_every", "resize", "accumulate")

OPTIMIZER_NAMES = ("adam", "adamw", "sgd")
SCHEDULE_NAMES = ("constant", "cosine", "onecycle", "step")
TO_THE_END = ("cosine", "onecycle")  # schedules whose rates depend on the number of epochs
PRECISIONS = ("float32", "bfloat16")


def check(recipe: Recipe) -> None:
    """Raises `UserError` naming the first field whose value cannot be meant."""
    for name, (low, high, closed) in _BOUNDS.items():
        value = getattr(recipe, name)
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise UserError(f"{option} must be a number, got {value!r}")
        if name in _WHOLE and not isinstance(value, int):
            raise UserError(f"{option} must be a whole number, got {value!r}")
        if value < low or value > high or (value == low and not closed):
            least = "at least" if closed else "above"
            raise UserError(f"{option} must be {least} {low} and at most {high:g}, got {value}")
    for name, valid in (
        ("optimizer", OPTIMIZER_NAMES),
        ("schedule", SCHEDULE_NAMES),
        ("precision", PRECISIONS),
    ):
        if getattr(recipe, name) not in valid:
            value = getattr(recipe, name)
            raise UserError(f"unknown {name} {value!r}; {nearest(value, valid)}")
    if recipe.nesterov and (recipe.optimizer != "sgd" or recipe.momentum == 0):
        raise UserError("--nesterov needs --optimizer sgd and a --momentum above 0")
    if recipe.select_best and recipe.validation_fraction == 0:
        raise UserError("--select-best needs validation images: set --validation-fraction")
    if len(recipe.rate_scales) < len(recipe.rate_scale):
        raise UserError(f"--rate-scale {','.join(recipe.rate_scale)} names a prefix twice")
    if recipe.accumulate > recipe.batch_size:
        raise UserError(
            f"--accumulate {recipe.accumulate} cuts finer than --batch-size {recipe.batch_size}"
        )
    if recipe.warmup_epochs > recipe.epochs:
        raise UserError(
            f"--warmup-epochs {recipe.warmup_epochs:g} is longer than --epochs {recipe.epochs}"
        )


# No published run: settings in common use for networks with batch normalisation from scratch.
_FROM_SCRATCH = Recipe(
    normalize="cifar10",
    augment=("flip", "translate"),
    validation_fraction=0.1,
    epochs=30,
    batch_size=128,
    learning_rate=0.05,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    schedule="cosine",
    warmup_epochs=1.0,
)

RECIPES: dict[str, Recipe] = {
    # python -m cifar_jax.train --recipe tutorial
    # The PyTorch tutorial (yudonggeun.github.io, 2019, and a second author's run of it).
    # Published test accuracy: 55 % and 54 %; mean loss over each 2,000 batches
    # 2.192, 1.824, 1.647, 1.546, 1.505, 1.461 | 1.396, 1.362, 1.340, 1.325, 1.298, 1.272.
    "tutorial": Recipe(
        model="tutorial_cnn",
        epochs=2,
        batch_size=4,
        learning_rate=0.001,
        momentum=0.9,
        log_every=2000,
    ),
    # python -m cifar_jax.train --recipe deep
    # gjustin40, 2020-12-18: plain SGD; the text says 0.01, its printout of the optimizer 0.05.
    # Published test accuracy: 46.37 %. Its published losses start at a mean of 1.473 in epoch
    # 1, so that run probably went on from trained weights.
    "deep": Recipe(
        model="deep_cnn",
        normalize="unit",
        epochs=10,
        batch_size=16,
        learning_rate=0.01,
    ),
    # python -m cifar_jax.train --recipe adam
    # HyunMin Kim, 2023-05-07: the tutorial network, 40,000/10,000 split, seed 42.
    # Published: validation accuracy 42.42 % after epoch 1, 58.56 % after epoch 10; test 58 %.
    "adam": Recipe(
        model="tutorial_cnn",
        validation_fraction=0.2,
        epochs=10,
        batch_size=128,
        optimizer="adam",
        learning_rate=0.001,
        log_every=100,
    ),
    # python -m cifar_jax.train --model dropout_cnn
    # Udacity lesson notes, 2020-05-08: the weights of the lowest validation loss are tested.
    # Published: lowest validation loss 0.759594 at epoch 23; test loss 0.753790, test accuracy
    # 74 % (7451/10000).
    "dropout": Recipe(
        model="dropout_cnn",
        validation_fraction=0.2,
        epochs=30,
        batch_size=20,
        learning_rate=0.01,
        select_best=True,
    ),
    # python -m cifar_jax.train --model vgg16
    # HyunMin Kim, as `adam`, from ImageNet's weights, all layers trained, images not resized.
    # Published: validation accuracy by epoch 34.89, 59.82, 67.57, 75.64, 77.98, 78.29, 80.36,
    # 77.58, 78.98, 80.79 %; test 80.15 % (plane 84.7, car 83.4, bird 68.9, cat 66.3, deer 88.8,
    # dog 68.7, frog 85.0, horse 83.6, ship 89.1, truck 83.0).
    "vgg16_finetune": Recipe(
        model="vgg16",
        validation_fraction=0.2,
        epochs=10,
        batch_size=128,
        optimizer="adam",
        learning_rate=0.001,
        log_every=100,
    ),
    # python -m cifar_jax.train --model vgg16_bn
    # python -m cifar_jax.train --model vgg11_bn
    "vgg16_bn": _FROM_SCRATCH.replace(model="vgg16_bn"),
    "vgg11_bn": _FROM_SCRATCH.replace(model="vgg11_bn"),
}

# The recipe that `--model X` means when no recipe is named.
MODEL_RECIPES = {
    "tutorial_cnn": "tutorial",
    "deep_cnn": "deep",
    "dropout_cnn": "dropout",
    "vgg16": "vgg16_finetune",
    "vgg11_bn": "vgg11_bn",
    "vgg16_bn": "vgg16_bn",
}
