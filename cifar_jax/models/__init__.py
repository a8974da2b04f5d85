"""Models by name. A new model is one file here and one entry in `MODELS`.

A model is a Flax linen module from images [N, H, W, C] to logits [N, num_classes], called with
`train` if its `__call__` takes that. Of `num_classes`, `lowering`, `remat` and `fold` its
constructor gets what it takes. It may name in `whitening` a convolution whose kernel the images
give (`augment.whitening_kernel`), hold collections of variables beside `params`
(`steps.train_step`), say in `torch_layers` how it reads PyTorch's weights
(`weights/state_dict.py`), and by `in_pieces = True` that it computes large batches so
(`convolution.laid_out`). A user's own is named `mynet.py:Net` (`own.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn

from cifar_jax.models import own, plain
from cifar_jax.models.airbench import Airbench, Airbench95, Airbench96
from cifar_jax.models.cnn import DeepCNN, DropoutCNN, TutorialCNN
from cifar_jax.models.own import takes
from cifar_jax.models.resnet import ResNet18, ResNet20
from cifar_jax.models.vgg import VGG, VGG11, VGG16, VGGBatchNorm
from cifar_jax.runtime.errors import UserError, lookup

MODELS: dict[str, Callable[..., nn.Module]] = {
    "tutorial_cnn": TutorialCNN,
    "deep_cnn": DeepCNN,
    "dropout_cnn": DropoutCNN,
    "vgg16": VGG,
    "vgg11_bn": functools.partial(VGGBatchNorm, layers=VGG11),
    "vgg16_bn": functools.partial(VGGBatchNorm, layers=VGG16),
    "airbench": Airbench,
    "airbench95": Airbench95,
    "airbench96": Airbench96,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
}


def find(name: str) -> Callable[..., nn.Module]:
    """Returns what makes the model called `name`. Raises `UserError` for an unknown name."""
    return own.load(name) if own.is_own(name) else lookup(MODELS, name, "model")


def make_model(name: str, num_classes: int = 10, **options) -> nn.Module:
    """Returns the model called `name`. Raises `UserError` for an unknown name, and where a user's
    own cannot be made."""
    make = find(name)
    if takes(make, "num_classes"):
        options = {"num_classes": num_classes, **options}
    return own.make(name, options) if own.is_own(name) else make(**options)


def model_of(recipe, num_classes: int, lowering: str = "auto") -> nn.Module:
    """Returns the model that a `Recipe` trains; one in plain Flax as `plain.fast`. Raises
    `UserError` for an unknown name, or `remat` or an option that the model does not take."""
    make, given = find(recipe.model), own.parse_options(recipe.model_option)
    if recipe.remat and not takes(make, "remat"):
        raise UserError(f"--remat: {recipe.model} has no blocks to compute again")
    own.check_options(make, recipe.model, given)
    options = {"lowering": lowering, "remat": recipe.remat, "fold": recipe.fold}
    options = {option: value for option, value in options.items() if takes(make, option)}
    return plain.fast(make_model(recipe.model, num_classes, **options, **given), lowering)


def mode(model: nn.Module, train: bool) -> dict[str, bool]:
    """Returns `train` as an argument of the model's `__call__`, {} if that takes none."""
    return {"train": train} if takes(model.__call__, "train") else {}


def init(model: nn.Module, keys, images) -> dict:
    """Returns the model's first variables, {collection: tree}."""
    return dict(model.init(keys, images, **mode(model, train=False)))
