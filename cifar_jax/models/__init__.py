"""Models by name. A new model is one file here and one entry in `MODELS`."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from cifar_jax.errors import lookup
from cifar_jax.models.cnn import DeepCNN, DropoutCNN, TutorialCNN

MODELS: dict[str, Callable[..., nn.Module]] = {
    "tutorial_cnn": TutorialCNN,
    "deep_cnn": DeepCNN,
    "dropout_cnn": DropoutCNN,
}


def make_model(name: str, num_classes: int = 10, **options) -> nn.Module:
    """Returns the model called `name`. Raises `UserError` for an unknown name."""
    return lookup(MODELS, name, "model")(num_classes=num_classes, **options)
