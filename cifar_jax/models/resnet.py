"""Residual networks for CIFAR (He et al., arXiv:1512.03385), layer for layer.

`ResNet18` is the paper's ImageNet network with a 3x3 stem of stride 1 and no pool, as widely used
for CIFAR, with that PyTorch module's names (`layer1.0.conv1`, `layer2.0.shortcut.0`, `linear`).
`ResNet20` is the paper's own CIFAR network (section 4.2) with shortcuts of option A, which have no
parameters. Images [N, H, W, 3] (float, normalised) -> logits [N, num_classes].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax.models.layers import BatchNorm, Conv, Dense, block, kaiming_normal


class Convolution(NamedTuple):
    """How a network makes its convolutions: called in a module's `__call__`, a layer of it."""

    lowering: str
    kernel_init: Callable | None

    def __call__(self, features: int, kernel_size: int, stride: int, name: str) -> Conv:
        return Conv(
            features,
            kernel_size,
            padding=kernel_size // 2,
            stride=stride,
            use_bias=False,
            lowering=self.lowering,
            kernel_init=self.kernel_init,
            name=name,
        )


def subsample(x: jax.Array, features: int) -> jax.Array:
    """The shortcut of option A: every second pixel of [N, H, W, C], with zeros for the channels
    that are missing to `features`, as many before as after."""
    missing = features - x.shape[-1]
    before = missing // 2
    return jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (before, missing - before)))


class BasicBlock(nn.Module):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x)), both convolutions 3x3.

    Attributes:
      stride: of the first convolution.
      projected: whether a shortcut that changes the shape is a 1x1 convolution with a norm (option
        B), not `subsample`.
      convolution, axis_name: as in `ResNet`.
    """

    features: int
    stride: int
    projected: bool
    convolution: Convolution
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.convolution(self.features, 3, self.stride, "conv1")(x)
        y = nn.relu(BatchNorm(axis_name=self.axis_name, name="bn1")(y, train))
        y = self.convolution(self.features, 3, 1, "conv2")(y)
        y = BatchNorm(axis_name=self.axis_name, name="bn2")(y, train)
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.projected:
                x = self.convolution(self.features, 1, self.stride, "shortcut_0")(x)
                x = BatchNorm(axis_name=self.axis_name, name="shortcut_1")(x, train)
            else:
                x = subsample(x, self.features)
        return nn.relu(y + x)


class ResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks, the mean over pixels and one linear layer.

    As `ResNet()`, ResNet18: 11,173,962 parameters with 10 classes.

    Attributes:
      widths: channels of the stages; every stage but the first begins with a stride of 2.
      blocks: basic blocks of a stage.
      projected: as in `BasicBlock`.
      kernel_init: of the convolutions; PyTorch's default where it is None.
      remat: keep the blocks' outputs alone for the backward pass (`layers.block`).
      axis_name: as in `BatchNorm`.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: int = 2
    projected: bool = True
    kernel_init: Callable | None = None
    lowering: str = "auto"
    remat: bool = False
    axis_name: str | None = None

    @property
    def torch_layers(self) -> tuple[str, ...]:
        names = ["conv1"]
        for stage in range(len(self.widths)):
            for i in range(self.blocks):
                names += [f"layer{stage + 1}_{i}.conv{j}" for j in (1, 2)]
                if self.projected and stage and not i:
                    names.append(f"layer{stage + 1}_{i}.shortcut_0")
        return (*names, "linear")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = Convolution(self.lowering, self.kernel_init)(self.widths[0], 3, 1, "conv1")(x)
        x = nn.relu(BatchNorm(axis_name=self.axis_name, name="bn1")(x, train))
        for stage, features in enumerate(self.widths):
            for i in range(self.blocks):
                stride = 2 if stage and not i else 1
                where = {"name": f"layer{stage + 1}_{i}", "features": features, "stride": stride}
                x = block(self.remat, _basic_block, self, x, train=train, **where)
        return Dense(self.num_classes, name="linear")(x.mean(axis=(1, 2)))


def _basic_block(module: ResNet, x: jax.Array, train: bool, **shape) -> jax.Array:
    convolution = Convolution(module.lowering, module.kernel_init)
    more = {"projected": module.projected, "axis_name": module.axis_name}
    return BasicBlock(convolution=convolution, **more, **shape)(x, train)


ResNet18 = ResNet
# 269,722 parameters with 10 classes, drawn as in the paper (arXiv:1502.01852).
ResNet20 = functools.partial(
    ResNet, widths=(16, 32, 64), blocks=3, projected=False, kernel_init=kaiming_normal
)
