"""Layers the models are written in: PyTorch's initialisation, one set of parameters whatever
the lowering of the convolution.

`kernel_init` and `bias_init` replace PyTorch's default initialisation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.ops import convolution, layout, pieces, windows
from cifar_jax.ops.layout import Blocked
from cifar_jax.ops.pieces import Pieces
from cifar_jax.runtime import keys

# What a model may state as `torch_layers`: the order of its layers is that of the numbers their
# names end with, convolutions first, and the first linear one reads the last feature map flattened.
NUMBERED = "numbered"


class Flattened(str):
    """In `torch_layers`, the name of a linear layer that reads a flattened feature map."""


def torch_uniform(fan_in: int):
    """Returns an initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    It is what `torch.nn.Linear` and `torch.nn.Conv2d` draw weights and biases from by default
    (`reset_parameters`: Kaiming uniform with a = sqrt(5), and the same bound for the bias).
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def kaiming_normal(key, shape, dtype=jnp.float32):
    """Draws a kernel [k, k, C, F] from N(0, 2 / (k * k * F)).

    It is `torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu")`, after He et al.,
    arXiv:1502.01852.
    """
    fan_out = shape[0] * shape[1] * shape[3]
    return math.sqrt(2 / fan_out) * jax.random.normal(key, shape, dtype)


def block(remat: bool, function: Callable, module: nn.Module, x, **settings):
    """Returns function(module, x, **settings), a part of `module`'s own `__call__`.

    With `remat` only x is kept for the backward pass, which computes the inside again
    (`jax.checkpoint`): less memory, more time, equal results.
    """
    call = functools.partial(function, **settings)
    return nn.remat(call)(module, x) if remat else call(module, x)


def _channels(x: jax.Array | Blocked | Pieces) -> int:
    return x.channels if isinstance(x, Blocked | Pieces) else x.shape[-1]


class ConvRelu(nn.Module):
    """Convolution, bias, relu and, with `pool`, a 2x2 max pool of stride 2.

    Input [N, H, W, C] float or `Blocked`; output [N, H', W', features], or `Blocked` from the
    CPU lowerings (`ops/convolution.py`). Parameters: `kernel` [k, k, C, features] (HWIO) and `bias`
    [features].
    """

    features: int
    kernel_size: int
    padding: int = 0
    pool: bool = False
    lowering: str = "auto"
    kernel_init: Callable | None = None
    bias_init: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array | Blocked) -> jax.Array | Blocked:
        k, channels = self.kernel_size, _channels(x)
        init = torch_uniform(k * k * channels)
        shape = (k, k, channels, self.features)
        kernel = self.param("kernel", self.kernel_init or init, shape)
        bias = self.param("bias", self.bias_init or init, (self.features,))
        return convolution.convolve(
            x, kernel, bias, padding=self.padding, pool=self.pool, lowering=self.lowering
        )


class Conv(nn.Module):
    """A bare convolution, for what puts a normalisation before the relu.

    Input [N, H, W, C] float, `Blocked` or `Pieces`; output `Pieces` of `Pieces`, else
    [N, H', W', features], with a `stride` of 2 of every second row and column, and with `pool`
    through a 2x2 max pool. Parameters: `kernel` [k, k, C, features] (HWIO), with `use_bias` also
    `bias` [features].
    """

    features: int
    kernel_size: int
    padding: int = 0
    stride: int = 1
    pool: bool = False
    use_bias: bool = True
    lowering: str = "auto"
    kernel_init: Callable | None = None
    bias_init: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array | Blocked | Pieces) -> jax.Array | Pieces:
        k, channels = self.kernel_size, _channels(x)
        init = torch_uniform(k * k * channels)
        shape = (k, k, channels, self.features)
        kernel = self.param("kernel", self.kernel_init or init, shape)
        x = self._convolve(x, kernel)
        if not self.use_bias:
            return x
        bias = self.param("bias", self.bias_init or init, (self.features,))
        if isinstance(x, Pieces):
            return dataclasses.replace(x, shift=bias, sums=None)
        return x + bias.astype(x.dtype).reshape(1, 1, 1, -1)

    def _convolve(self, x: jax.Array | Blocked | Pieces, kernel: jax.Array) -> jax.Array | Pieces:
        if self.stride > 1:
            x = convolution.to_images(x)
            if self.kernel_size > 1:
                return convolution.strided(x, kernel, self.stride, self.padding, self.lowering)
            x = x[:, :: self.stride, :: self.stride]
        options = {"padding": self.padding, "lowering": self.lowering}
        if isinstance(x, Pieces):
            return convolution.convolve(x, kernel, pool=self.pool, **options)
        y = convolution.to_images(convolution.convolve(x, kernel, **options))
        return max_pool(y, self.lowering) if self.pool else y


def max_pool(x: jax.Array, lowering: str = "auto") -> jax.Array:
    """2x2 max pool of stride 2 of [N, H, W, C]; an odd last row or column is dropped. On a CPU its
    gradient is by hand (`ops/windows.py`), but for the lowering `lax`.

    Raises:
      UserError: images smaller than the pool.
    """
    if min(x.shape[1:3]) < 2:
        raise convolution.too_small(x.shape[1:3], "a 2x2 pool")
    if lowering != "lax" and jax.default_backend() == "cpu":
        return windows.max_pool(x, windows.Window((2, 2), (2, 2)))
    # Flax's name for it, by keyword: jax2onnx (`export.py`) gets a bare `reduce_window` wrong.
    return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))


class BatchNorm(nn.Module):
    """Batch normalisation over images and pixels, as `torch.nn.BatchNorm2d` with its defaults.

    Input and output [N, H, W, C], or `Pieces`, normalised by the layer that reads them. In training
    the mean and the biased variance of the batch are used, and the running ones move by `momentum`
    towards the mean and the unbiased variance; otherwise the running ones are used. Statistics are
    float32 (or the input's wider type), over the images that count: where the variables hold
    `{"position": {"mask": [N]}}` those of mask 0 are left out, and where no image counts the
    running statistics stay. Parameters: `scale`, unless `use_scale` is False, and `bias` [C];
    `batch_stats`: `mean` and `var` [C].

    Attributes:
      axis_name: under pmap or shard_map, the axis the batch is split over: statistics are then
        those of the global batch. Under jit with shardings they are so by themselves.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    axis_name: str | None = None
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array | Pieces, train: bool) -> jax.Array | Pieces:
        shape = (_channels(x),)
        scale = self.param("scale", nn.initializers.ones, shape) if self.use_scale else None
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, bias.dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, bias.dtype)
        wide = pieces.applied(x) if isinstance(x, Pieces) else x.astype(bias.dtype)
        if train:
            mean, var, count = self._statistics(wide)
            if not self.is_initializing():
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                rate = jnp.where(count > 0, self.momentum, 0.0).astype(var.dtype)
                running_mean.value += rate * (mean - running_mean.value)
                running_var.value += rate * (unbiased - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        factor = lax.rsqrt(var + self.epsilon)
        factor = factor if scale is None else scale * factor
        shift = bias - mean * factor
        if isinstance(wide, Pieces):
            return dataclasses.replace(wide, factor=factor, shift=shift, sums=None)
        return (wide * factor.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)).astype(x.dtype)

    def _statistics(self, x: jax.Array | Pieces) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean and biased variance [C] over the images that count, and how many pixels did."""
        if isinstance(x, Pieces):
            sums, count = (self._sum(part) for part in pieces.statistics(x))
            mean, square = sums / jnp.maximum(count, 1)
            return mean, jnp.maximum(square - mean * mean, 0), count
        mask = self.scope.root.get_variable("position", "mask", None)
        pixels = x.shape[1] * x.shape[2]
        weight = jnp.ones(x.shape[:1], x.dtype) if mask is None else mask.astype(x.dtype)
        count = self._sum(weight.sum()) * pixels
        weight = weight.reshape(-1, 1, 1, 1)
        least = jnp.maximum(count, 1)
        mean = self._sum((x * weight).sum(axis=(0, 1, 2))) / least
        deviation = x - mean.reshape(1, 1, 1, -1)
        var = self._sum((deviation * deviation * weight).sum(axis=(0, 1, 2))) / least
        return mean, var, count

    def _sum(self, x: jax.Array) -> jax.Array:
        return x if self.axis_name is None else lax.psum(x, self.axis_name)


class Flatten(nn.Module):
    """[N, H, W, C] or `Blocked` -> [N, H * W * C]."""

    @nn.compact
    def __call__(self, x: jax.Array | Blocked) -> jax.Array:
        return layout.flatten(x) if isinstance(x, Blocked) else x.reshape(x.shape[0], -1)


class Dense(nn.Module):
    """x @ kernel + bias, the bias with `use_bias`: [N, D] -> [N, features]."""

    features: int
    use_bias: bool = True
    kernel_init: Callable | None = None
    bias_init: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or init, (x.shape[-1], self.features))
        if not self.use_bias:
            return x @ kernel.astype(x.dtype)
        bias = self.param("bias", self.bias_init or init, (self.features,))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype).reshape(1, -1)


class Dropout(nn.Module):
    """Zeroes each input with probability `rate` in training, and scales the rest by 1/(1-rate).

    Input and output [N, D]. Draws from the rng stream `dropout`, a different mask for every
    layer. Where the images are a part of a larger batch, `{"position": {"first_example": i}}`
    among the variables says which: each example then gets the mask it has in the whole batch.
    The key must then be the same in every part: it comes from the stream `BY_EXAMPLE` if there is
    one, so that `dropout` can be another in each.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        first = self.scope.root.get_variable("position", "first_example", 0)
        # Flax folds the module's path and a count into a stream's key, not the stream's name.
        key = self.make_rng(BY_EXAMPLE if self.has_rng(BY_EXAMPLE) else "dropout")
        keep = dropout_mask(key, x.shape, self.rate, first)
        scale = jnp.asarray(1 / (1 - self.rate), x.dtype)
        return x * jnp.where(keep, scale, jnp.zeros((), x.dtype))


# Dropout masks from a counter and a hash.
#
# Whether feature j of example i is kept depends on the key, on i and on j alone: not on the batch
# it is in, on the layout or on the number of devices. A counter i * D + j goes through two rounds
# of a multiply-xorshift finaliser ("lowbias32" of Wellons' hash prospector, the shape of
# MurmurHash3's), each keyed by one word of the random key, at about a tenth of the cost of the
# generators behind `jax.random.bits` on a CPU. Its statistics are tested in
# `tests/models/test_layers_dropout.py`; it is no cryptographic generator.

# The rng stream of such masks, with one key for all parts of a batch (`layers.Dropout`).
BY_EXAMPLE = "dropout_by_example"

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive counters


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit reaches every output bit."""
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return h ^ (h >> jnp.uint32(16))


def random_words(
    key: jax.Array, shape: tuple[int, int], first_example: int | jax.Array = 0
) -> jax.Array:
    """Returns uint32 [N, D], uniform, for examples first_example..first_example + N - 1.

    Args:
      key: typed PRNG key (`threefry2x32` or `rbg`) or its raw uint32 words, 2 or 4.
      shape: (N, D); N * D of the global batch must stay below 2^32.
    """
    words = keys.plain(key).reshape(-1)
    # Two words of threefry's keys; four of `rbg`'s, the second pair often equal to the first.
    k0, k1 = (words[0], words[1]) if words.size == 2 else words[:2] + words[2:] * jnp.uint32(3)
    rows, columns = shape
    first = jnp.asarray(first_example).astype(jnp.uint32) * jnp.uint32(columns)
    counter = lax.iota(jnp.uint32, rows * columns).reshape(rows, columns) + first
    h = _mix(counter * jnp.uint32(_GOLDEN) + k0)
    return _mix(h ^ _mix(k1))


def dropout_mask(
    key: jax.Array, shape: tuple[int, int], rate: float, first_example: int | jax.Array = 0
) -> jax.Array:
    """Returns bool [N, D], True (keep) with probability 1 - rate to within 2^-32."""
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return random_words(key, shape, first_example) >= threshold
