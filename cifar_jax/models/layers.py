"""Layers the models are written in: PyTorch's initialisation, one set of parameters whatever
the lowering of the convolution."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def torch_uniform(fan_in: int):
    """Returns an initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    It is what `torch.nn.Linear` and `torch.nn.Conv2d` draw weights and biases from by default
    (`reset_parameters`: Kaiming uniform with a = sqrt(5), and the same bound for the bias).
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ConvRelu(nn.Module):
    """Convolution, bias, relu and, with `pool`, a 2x2 max pool of stride 2.

    Input [N, H, W, C] float; output [N, H', W', features]. Parameters: `kernel`
    [k, k, C, features] (HWIO) and `bias` [features].
    """

    features: int
    kernel_size: int
    padding: int = 0
    pool: bool = False
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k, channels = self.kernel_size, x.shape[-1]
        init = torch_uniform(k * k * channels)
        kernel = self.param("kernel", init, (k, k, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        x = lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (1, 1),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = nn.relu(x + bias.astype(x.dtype).reshape(1, 1, 1, -1))
        return nn.max_pool(x, (2, 2), (2, 2)) if self.pool else x


class Flatten(nn.Module):
    """[N, H, W, C] -> [N, H * W * C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)


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
    """Zeroes each input with probability `rate` in training and scales the rest by 1/(1-rate)."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not train)(x)
