"""Models by name. A new model is one file here and one entry in `MODELS`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn

from cifar_jax.models.cnn import DeepCNN, DropoutCNN, TutorialCNN
from cifar_jax.models.vgg import VGG, VGG11, VGG16, VGGBatchNorm
from cifar_jax.runtime.errors import UserError, lookup

MODELS: dict[str, Callable[..., nn.Module]] = {
    "tutorial_cnn": TutorialCNN,
    "deep_cnn": DeepCNN,
    "dropout_cnn": DropoutCNN,
    "vgg16": VGG,
    "vgg11_bn": functools.partial(VGGBatchNorm, layers=VGG11),
    "vgg16_bn": functools.partial(VGGBatchNorm, layers=VGG16),
}


def make_model(name: str, num_classes: int = 10, **options) -> nn.Module:
    """Returns the model called `name`. Raises `UserError` for an unknown name."""
    return lookup(MODELS, name, "model")(num_classes=num_classes, **options)


def model_of(recipe, num_classes: int, lowering: str = "auto") -> nn.Module:
    """Returns the model that a `Recipe` trains. Raises `UserError` for an unknown name,
    or `remat` where the model has no blocks."""
    model = make_model(recipe.model, num_classes, lowering=lowering)
    if recipe.remat and not hasattr(model, "remat"):
        raise UserError(f"--remat: {recipe.model} has no blocks to compute again")
    known = [name for name in ("fold", "remat") if hasattr(model, name)]
    return model.clone(**{name: getattr(recipe, name) for name in known})
