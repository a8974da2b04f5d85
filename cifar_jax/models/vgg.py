"""VGG (Simonyan and Zisserman, arXiv:1409.1556) as torchvision builds it, layer for layer.

Layers carry torchvision's names and numbers (`features_0` for `features.0`), so that its weight
files fit. Images [N, H, W, 3] (float, normalised) of 32 pixels or more -> logits
[N, num_classes]; with `train=True` dropout draws from the rng stream `dropout`.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.models.fold import SIDE, RepeatedDense, normal_blocks
from cifar_jax.models.layers import (
    NUMBERED,
    BatchNorm,
    Conv,
    ConvRelu,
    Dense,
    Dropout,
    block,
    kaiming_normal,
    max_pool,
)
from cifar_jax.ops import convolution

# Channels of the 3x3 convolutions, "M" for a 2x2 max pool; the paper's configurations A and D.
VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

LINEAR_STDDEV = 0.01
_NORMAL = nn.initializers.normal(LINEAR_STDDEV)
_ZEROS = nn.initializers.zeros


def pool_matrix(size: int, bins: int) -> np.ndarray:
    """Returns float64 [bins, size]: row i averages the inputs of bin i of an adaptive pool.

    PyTorch's rule (`AdaptiveAveragePooling.cpp`): bin i reads from floor(i * size / bins) up to,
    not including, ceil((i + 1) * size / bins). Bins overlap, and repeat where size < bins.
    """
    matrix = np.zeros((bins, size))
    for i in range(bins):
        first, last = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """[N, H, W, C] -> [N, bins, bins, C], for any H and W; `torch.nn.AdaptiveAvgPool2d`."""
    height, width = x.shape[1:3]
    if (height, width) == (bins, bins):
        return x
    down = jnp.asarray(pool_matrix(height, bins), x.dtype)
    across = jnp.asarray(pool_matrix(width, bins), x.dtype)
    return jnp.einsum("ih,jw,nhwc->nijc", down, across, x, precision="highest")


class VGG(nn.Module):
    """VGG without batch normalisation and with the three linear layers of ImageNet's.

    Initialised as torchvision does: convolutions by `kaiming_normal`, linear weights
    N(0, 0.01^2), biases 0. As `VGG()`, VGG16: 134,301,514 parameters with 10 classes.

    Attributes:
      layers: channels and pools.
      hidden: width of the two hidden linear layers.
      remat: keep the blocks' outputs alone for the backward pass (`layers.block`).
      fold: train the first linear layer as the mean of its 49 blocks where the images are so
        small that the feature map is one pixel (`fold.py`); no effect on larger images.
    """

    num_classes: int = 10
    layers: tuple[int | str, ...] = VGG16
    hidden: int = 4096
    dropout_rate: float = 0.5
    fold: bool = False
    lowering: str = "auto"
    remat: bool = False
    torch_layers = NUMBERED

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def layer(module, x, position, features, pool):
            return _convolution(ConvRelu, module, position, features, pool=pool)(x)

        x = convolution.to_images(_features(self, x, layer, modules=2))
        if x.shape[1:3] == (1, 1):
            first = RepeatedDense(self.hidden, LINEAR_STDDEV, self.fold, name="classifier_0")
        else:
            x = adaptive_average_pool(x, SIDE)
            first = _linear(self.hidden, "classifier_0", normal_blocks(LINEAR_STDDEV))
        x = nn.relu(first(x.reshape(x.shape[0], -1)))
        x = Dropout(self.dropout_rate, name="classifier_2")(x, train)
        x = nn.relu(_linear(self.hidden, "classifier_3")(x))
        x = Dropout(self.dropout_rate, name="classifier_5")(x, train)
        return _linear(self.num_classes, "classifier_6")(x)


class VGGBatchNorm(nn.Module):
    """VGG with batch normalisation after each convolution, as torchvision's `vggN_bn`, and the
    head usual for CIFAR: the mean over what the last pool leaves, and one linear layer.

    Initialised as `VGG`; scales 1, shifts 0.

    Attributes:
      layers: channels and pools.
      remat: as in `VGG`.
      axis_name: as in `BatchNorm`.
    """

    num_classes: int = 10
    layers: tuple[int | str, ...] = VGG16
    lowering: str = "auto"
    remat: bool = False
    torch_layers = NUMBERED
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def layer(module, x, position, features, pool):
            x = _convolution(Conv, module, position, features)(x)
            norm = BatchNorm(axis_name=module.axis_name, name=f"features_{position + 1}")
            x = nn.relu(norm(x, train))
            return max_pool(x, module.lowering) if pool else x

        x = _features(self, x, layer, modules=3)
        return _linear(self.num_classes, "classifier")(x.mean(axis=(1, 2)))


def numbered(layers: tuple[int | str, ...], modules: int) -> list[tuple[int, int, bool]]:
    """Returns (torchvision's number, channels, whether a pool follows) of each convolution.

    Args:
      modules: how many modules a convolution counts for, with its relu and normalisation.
    """
    result, position = [], 0
    for layer, following in zip(layers, (*layers[1:], None), strict=True):
        if layer == "M":
            position += 1
        else:
            result.append((position, layer, following == "M"))
            position += modules
    return result


def blocks(layers: tuple[int | str, ...], modules: int) -> list[list[tuple[int, int, bool]]]:
    """Returns `numbered`, cut after each pool: what `remat` computes again at a time."""
    result = [[]]
    for row in numbered(layers, modules):
        result[-1].append(row)
        if row[2]:
            result.append([])
    return [rows for rows in result if rows]


def _features(module: nn.Module, x: jax.Array, layer: Callable, modules: int):
    """Runs `layer(module, x, position, features, pool)` for every row of `blocks`."""

    def convolutions(module, x, rows):
        for row in rows:
            x = layer(module, x, *row)
        return x

    for rows in blocks(module.layers, modules):
        x = block(module.remat, convolutions, module, x, rows=rows)
    return x


def _convolution(kind: type[nn.Module], module: nn.Module, position: int, features: int, **more):
    return kind(
        features,
        3,
        padding=1,
        lowering=module.lowering,
        kernel_init=kaiming_normal,
        bias_init=_ZEROS,
        name=f"features_{position}",
        **more,
    )


def _linear(features: int, name: str, init=_NORMAL) -> Dense:
    return Dense(features, kernel_init=init, bias_init=_ZEROS, name=name)
