"""Layers the models are written in: PyTorch's initialisation, one set of parameters whatever
the lowering of the convolution."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax.models import blocked, lowering
from cifar_jax.models.blocked import Blocked
from cifar_jax.models.dropout import dropout_mask


def torch_uniform(fan_in: int):
    """Returns an initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    It is what `torch.nn.Linear` and `torch.nn.Conv2d` draw weights and biases from by default
    (`reset_parameters`: Kaiming uniform with a = sqrt(5), and the same bound for the bias).
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _channels(x: jax.Array | Blocked) -> int:
    return x.channels if isinstance(x, Blocked) else x.shape[-1]


class ConvRelu(nn.Module):
    """Convolution, bias, relu and, with `pool`, a 2x2 max pool of stride 2.

    Input [N, H, W, C] float or `Blocked`; output [N, H', W', features], or `Blocked` from the
    CPU lowerings (`lowering.py`). Parameters: `kernel` [k, k, C, features] (HWIO) and `bias`
    [features].
    """

    features: int
    kernel_size: int
    padding: int = 0
    pool: bool = False
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array | Blocked) -> jax.Array | Blocked:
        k, channels = self.kernel_size, _channels(x)
        init = torch_uniform(k * k * channels)
        kernel = self.param("kernel", init, (k, k, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        return lowering.convolve(
            x, kernel, bias, padding=self.padding, pool=self.pool, lowering=self.lowering
        )


class Conv(nn.Module):
    """A bare convolution, for what puts a normalisation before the relu.

    Input [N, H, W, C] float or `Blocked`; output [N, H', W', features]. Parameters: `kernel`
    [k, k, C, features] (HWIO), with `use_bias` also `bias` [features].
    """

    features: int
    kernel_size: int
    padding: int = 0
    use_bias: bool = True
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array | Blocked) -> jax.Array:
        k, channels = self.kernel_size, _channels(x)
        init = torch_uniform(k * k * channels)
        kernel = self.param("kernel", init, (k, k, channels, self.features))
        x = lowering.convolve(x, kernel, padding=self.padding, lowering=self.lowering)
        x = lowering.to_images(x)
        if not self.use_bias:
            return x
        bias = self.param("bias", init, (self.features,))
        return x + bias.astype(x.dtype).reshape(1, 1, 1, -1)


class Flatten(nn.Module):
    """[N, H, W, C] or `Blocked` -> [N, H * W * C]."""

    @nn.compact
    def __call__(self, x: jax.Array | Blocked) -> jax.Array:
        return blocked.flatten(x) if isinstance(x, Blocked) else x.reshape(x.shape[0], -1)


class Dense(nn.Module):
    """x @ kernel + bias: [N, D] -> [N, features]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype).reshape(1, -1)


class Dropout(nn.Module):
    """Zeroes each input with probability `rate` in training, and scales the rest by 1/(1-rate).

    Input and output [N, D]. Draws from the rng stream `dropout`, a different mask for every
    layer. Where the images are a part of a larger batch, `{"position": {"first_example": i}}`
    among the variables says which: each example then gets the mask it has in the whole batch.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        first = self.scope.root.get_variable("position", "first_example", 0)
        keep = dropout_mask(self.make_rng("dropout"), x.shape, self.rate, first)
        scale = jnp.asarray(1 / (1 - self.rate), x.dtype)
        return x * jnp.where(keep, scale, jnp.zeros((), x.dtype))
