"""The networks of KellerJordan's cifar10-airbench (arXiv:2404.00498), layer for layer.

    whiten    2x2 convolution 3 -> 24 with bias, GELU; its kernel comes from the images
    layers_N  3x3 convolution, 2x2 max pool, norm, GELU, 3x3 convolution, norm, GELU; N = 1, 2, 3;
              in airbench96 a third convolution and norm, and a shortcut over the last two
    head      maximum over what is left (3x3 of 32x32 images), linear without bias, logits scaled

Convolutions in the groups are padded and have no bias; a norm is a batch normalisation without
scale. Images [N, H, W, 3] (float, normalised), of 17 pixels or more -> logits [N, num_classes].
Names are those of the PyTorch original of airbench94.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax.models.layers import BatchNorm, Conv, Dense, block, torch_uniform
from cifar_jax.ops import convolution, pieces
from cifar_jax.ops.pieces import Pieces
from cifar_jax.runtime.errors import check_batched

WHITENING = "whiten"


def dirac(key, shape, dtype=jnp.float32):
    """Draws a kernel [k, k, C, F] as PyTorch does, but for the first C of its F outputs: output i
    is input i (`torch.nn.init.dirac_`)."""
    size, _, channels, features = shape
    drawn = torch_uniform(size * size * channels)(key, shape, dtype)
    same = min(channels, features)
    middle = jnp.zeros((size, size, channels, same), dtype)
    middle = middle.at[size // 2, size // 2].set(jnp.eye(channels, same, dtype=dtype))
    return drawn.at[..., :same].set(middle)


def unit_deviation(key, shape, dtype=jnp.float32):
    """Draws a linear kernel [D, F] as PyTorch does, and divides it by its standard deviation."""
    drawn = torch_uniform(shape[0])(key, shape, dtype)
    return drawn / drawn.std(ddof=1)


def gelu(x: jax.Array | Pieces) -> jax.Array | Pieces:
    if isinstance(x, Pieces):
        return dataclasses.replace(x, gelu=True)
    return nn.gelu(x, approximate=False)


class Group(nn.Module):
    """One of the three groups: [N, H, W, C] -> [N, H // 2, W // 2, features], or as `Pieces`."""

    features: int
    residual: bool = False
    momentum: float = 0.4
    lowering: str = "auto"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array | Pieces, train: bool) -> jax.Array | Pieces:
        def convolved(x, name, pool=False):
            settings = {"padding": 1, "pool": pool, "use_bias": False, "kernel_init": dirac}
            return Conv(self.features, 3, **settings, lowering=self.lowering, name=name)(x)

        def normed(x, name):
            norm = {"momentum": self.momentum, "epsilon": 1e-12, "use_scale": False}
            return BatchNorm(**norm, axis_name=self.axis_name, name=name)(x, train)

        x = gelu(normed(convolved(x, "conv1", pool=True), "norm1"))
        y = gelu(normed(convolved(x, "conv2"), "norm2"))
        if not self.residual:
            return y
        y = normed(convolved(y, "conv3"), "norm3")
        return gelu(pieces.add(x, y) if isinstance(x, Pieces) else x + y)


class Airbench(nn.Module):
    """As `Airbench()` the network of airbench94: 1,971,640 parameters with 10 classes.

    Attributes:
      widths: channels of the three groups.
      residual: whether the groups have a third convolution and a shortcut.
      momentum: of the norms' running statistics, PyTorch's: the share of the new ones (airbench
        states the share of the old, 0.6).
      unit_head: whether the head's first weights are scaled to a standard deviation of 1.
      whitening_bias: whether the whitening's bias is drawn, as PyTorch does, or 0.
      logit_scale: what the logits are multiplied by.
      remat: keep the groups' outputs alone for the backward pass (`layers.block`).
      axis_name: as in `BatchNorm`.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (64, 256, 256)
    residual: bool = False
    momentum: float = 0.4
    unit_head: bool = True
    whitening_bias: bool = True
    logit_scale: float = 1 / 256
    lowering: str = "auto"
    remat: bool = False
    axis_name: str | None = None
    whitening = WHITENING
    in_pieces = True
    torch_layers = (
        WHITENING,
        *(f"layers_{group}.conv{i}" for group in (1, 2, 3) for i in (1, 2)),
        "head",
    )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_batched(x)
        if min(x.shape[1:3]) < 2 ** (len(self.widths) + 1) + 1:
            raise convolution.too_small(x.shape[1:3], "a whitening convolution and three pools")
        zeros, given = None if self.whitening_bias else nn.initializers.zeros, x.dtype
        mask = self.scope.root.get_variable("position", "mask", None)
        x = convolution.laid_out(x, self.lowering, mask)
        x = gelu(Conv(24, 2, lowering=self.lowering, bias_init=zeros, name=WHITENING)(x))

        def group(module, x, number, features):
            names = ("residual", "momentum", "lowering", "axis_name")
            options = {option: getattr(module, option) for option in names}
            return Group(features, **options, name=f"layers_{number}")(x, train)

        for number, features in enumerate(self.widths, start=1):
            x = block(self.remat, group, self, x, number=number, features=features)
        x = pieces.global_max(x).astype(given) if isinstance(x, Pieces) else x.max(axis=(1, 2))
        drawn = unit_deviation if self.unit_head else None
        head = Dense(self.num_classes, use_bias=False, kernel_init=drawn, name="head")
        return head(x) * self.logit_scale


_BEFORE_MUON = {"unit_head": False, "whitening_bias": False, "logit_scale": 1 / 9}
Airbench95 = functools.partial(Airbench, widths=(128, 384, 384), **_BEFORE_MUON)
Airbench96 = functools.partial(
    Airbench, widths=(128, 512, 512), residual=True, momentum=0.1, **_BEFORE_MUON
)
