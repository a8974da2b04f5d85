"""The small CNNs of the published write-ups, layer for layer.

Every model maps images [N, H, W, C] (float, normalised) to logits [N, num_classes]; with
`train=True` dropout draws from the rng stream `dropout`. Layer names are the PyTorch ones. With
`remat` the backward pass computes each convolution again instead of keeping what is inside.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from cifar_jax.models.layers import NUMBERED, ConvRelu, Dense, Dropout, Flatten


def _conv_relu(remat: bool) -> type[nn.Module]:
    return nn.remat(ConvRelu) if remat else ConvRelu


class TutorialCNN(nn.Module):
    """The PyTorch tutorial's network: 62,006 parameters with 10 classes."""

    num_classes: int = 10
    lowering: str = "auto"
    remat: bool = False
    torch_layers = NUMBERED

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        convolution = _conv_relu(self.remat)
        x = convolution(6, 5, pool=True, lowering=self.lowering, name="conv1")(x)
        x = convolution(16, 5, pool=True, lowering=self.lowering, name="conv2")(x)
        x = Flatten(name="flatten")(x)
        x = nn.relu(Dense(120, name="fc1")(x))
        x = nn.relu(Dense(84, name="fc2")(x))
        return Dense(self.num_classes, name="fc3")(x)


class DeepCNN(nn.Module):
    """Four 5x5 convolutions, one pool, four linear layers (gjustin40, 2020)."""

    num_classes: int = 10
    lowering: str = "auto"
    remat: bool = False
    torch_layers = NUMBERED

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        convolution = _conv_relu(self.remat)
        x = convolution(10, 5, lowering=self.lowering, name="conv1")(x)
        x = convolution(20, 5, lowering=self.lowering, name="conv2")(x)
        x = convolution(20, 5, lowering=self.lowering, name="conv3")(x)
        x = convolution(10, 5, pool=True, lowering=self.lowering, name="conv4")(x)
        x = Flatten(name="flatten")(x)
        x = nn.relu(Dense(800, name="fc1")(x))
        x = nn.relu(Dense(400, name="fc2")(x))
        x = nn.relu(Dense(100, name="fc3")(x))
        return Dense(self.num_classes, name="fc4")(x)


class DropoutCNN(nn.Module):
    """Three padded 3x3 convolutions with pools, dropout around the hidden layer (Udacity)."""

    num_classes: int = 10
    dropout_rate: float = 0.25
    lowering: str = "auto"
    remat: bool = False
    torch_layers = NUMBERED

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        convolution = _conv_relu(self.remat)
        x = convolution(16, 3, padding=1, pool=True, lowering=self.lowering, name="conv1")(x)
        x = convolution(32, 3, padding=1, pool=True, lowering=self.lowering, name="conv2")(x)
        x = convolution(64, 3, padding=1, pool=True, lowering=self.lowering, name="conv3")(x)
        x = Flatten(name="flatten")(x)
        x = Dropout(self.dropout_rate, name="dropout1")(x, train)
        x = nn.relu(Dense(500, name="fc1")(x))
        x = Dropout(self.dropout_rate, name="dropout2")(x, train)
        return Dense(self.num_classes, name="fc2")(x)
