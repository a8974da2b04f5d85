"""The fold: one linear layer of 49 blocks trained as one block, exactly.

At 32x32 VGG16's feature map is one pixel, which the adaptive pool repeats 7 x 7 times. The first
linear layer then computes, with W_b the rows of its kernel that read position b,

    y = sum_b x W_b = x (sum_b W_b),      and every block has the gradient  g = x^T dy.

Only the mean block M = (1/49) sum_b W_b acts, and all blocks move by the same amount, so that
W_b(t) = W_b(0) + M(t) - M(0). It is enough to train M, `mean_kernel` [C, F] in place of `kernel`
[49 * C, F], with y = x (49 M) and g as M's gradient: not 49 g, the derivative of the loss by M,
but what each block gets (`sum_of_blocks`). (In terms of the sum 49 M: its update is a block's
update times 49.) What an optimizer does to M is then what it does to each of the blocks:

- SGD, momentum, Nesterov, Adam: exact, epsilon included, since they see a block's own gradient;
- moving averages of weights, rates by layer, frozen layers, accumulated gradients: likewise;
- clipping by the global norm: g counts 49 times in the squared norm (`clip_by_global_norm`);
- decoupled weight decay (`adamw`), and coupled decay with SGD: M decays as a block does, and the
  differences W_b - M, which have no gradient, shrink by a common factor (`spread`);
- coupled decay with Adam: W_b enters each block's own second moment, the blocks' updates differ,
  and nothing short of all 49 is exact. Refused (`refuse`).

`unfold` gives the 49 blocks back from M and the kernel before the first step, which the model
draws again from the run's key (`initial_kernel`): it is no part of a checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from cifar_jax.ops import averaging
from cifar_jax.runtime.errors import UserError

SIDE = 7
BLOCKS = SIDE * SIDE
MEAN_KERNEL = "mean_kernel"
LAYER = "classifier_0"


def normal_blocks(stddev: float):
    """Returns an initialiser of kernels [49 * C, F], every number from N(0, stddev^2).

    The mean block and the differences from it are independent for normal numbers, so they are
    drawn apart, and a folded layer draws its mean alone.
    """

    def init(key, shape, dtype=jnp.float32):
        block = (shape[0] // BLOCKS, shape[1])
        draw = functools.partial(jax.random.normal, shape=block, dtype=dtype)
        blocks = stddev * lax.map(draw, jax.random.split(jax.random.fold_in(key, 1), BLOCKS))
        mean = mean_of_normal_blocks(stddev)(key, block, dtype)
        return (blocks + (mean - blocks.mean(axis=0))[None]).reshape(shape)

    return init


def mean_of_normal_blocks(stddev: float):
    """Returns an initialiser [C, F]: the mean of the 49 blocks that `normal_blocks` draws."""

    def init(key, shape, dtype=jnp.float32):
        return stddev / SIDE * jax.random.normal(jax.random.fold_in(key, 0), shape, dtype)

    return init


def sum_of_blocks(mean: jax.Array) -> jax.Array:
    """Returns 49 * mean, whose gradient is passed on as it is: a block's own."""
    return mean + lax.stop_gradient((BLOCKS - 1) * mean)


class RepeatedDense(nn.Module):
    """A linear layer that reads its input 49 times over: [N, C] -> [N, features].

    Parameters: `bias` [features] and `kernel` [49 * C, features] or, with `fold`, `mean_kernel`
    [C, features]. The input is not repeated: the blocks are added up first.
    """

    features: int
    stddev: float
    fold: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, init = x.shape[-1], nn.initializers.zeros
        if self.fold:
            shape = (channels, self.features)
            mean = self.param(MEAN_KERNEL, mean_of_normal_blocks(self.stddev), shape)
            kernel = sum_of_blocks(mean)
        else:
            shape = (BLOCKS * channels, self.features)
            kernel = self.param("kernel", normal_blocks(self.stddev), shape)
            kernel = kernel.reshape(BLOCKS, channels, self.features).sum(axis=0)
        bias = self.param("bias", init, (self.features,))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype).reshape(1, -1)


def is_folded(params: Mapping[str, Any]) -> bool:
    """Whether these parameters hold a `mean_kernel`."""
    return LAYER in params and MEAN_KERNEL in params[LAYER]


def mean_block(kernel: jax.Array) -> jax.Array:
    """Returns the mean [C, F] of the 49 blocks of a kernel [49 * C, F]."""
    return kernel.reshape(BLOCKS, -1, kernel.shape[1]).mean(axis=0)


def fold(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters with the 49 blocks replaced by their mean; folded ones as they are."""
    if is_folded(params):
        return dict(params)
    layer = dict(params[LAYER])
    return {**params, LAYER: {MEAN_KERNEL: mean_block(layer.pop("kernel")), **layer}}


def unfold(params: Mapping[str, Any], initial: jax.Array, spread: float = 1.0) -> dict[str, Any]:
    """Returns parameters with all 49 blocks; unfolded ones as they are.

    Args:
      params: trained parameters, with a `mean_kernel` [C, F].
      initial: the kernel [49 * C, F] before the first step.
      spread: what weight decay left of the blocks' differences (`spread`).

    Raises:
      UserError: `initial` is no kernel of this layer.
    """
    if not is_folded(params):
        return dict(params)
    layer = dict(params[LAYER])
    mean = layer.pop(MEAN_KERNEL)
    if initial.shape != (BLOCKS * mean.shape[0], mean.shape[1]):
        raise UserError(
            f"{LAYER} cannot be unfolded with a kernel of shape {list(initial.shape)}: "
            f"it needs {[BLOCKS * mean.shape[0], mean.shape[1]]}"
        )
    blocks = initial.reshape(BLOCKS, *mean.shape)
    moved = mean - spread * mean_block(initial)
    kernel = spread * blocks + moved[None]
    return {**params, LAYER: {"kernel": kernel.reshape(initial.shape), **layer}}


def spread(
    optimizer: optax.GradientTransformation, steps: int, ema_decay: float = 0.0
) -> jax.Array:
    """Returns the factor by which weight decay shrank the blocks' differences in `steps` steps.

    A difference has no gradient and decays like any weight, so the optimizer is run on one
    weight of 1 without gradient. 1 where nothing decays.

    Args:
      optimizer: of the run, from its first step.
      steps: calls of its `update`.
      ema_decay: of the moving average, where that is what will be unfolded.
    """
    one = {LAYER: {MEAN_KERNEL: jnp.ones((1, 1), jnp.float32)}}
    zero = jax.tree.map(jnp.zeros_like, one)

    def step(i, carry):
        weight, state, average = carry
        updates, state = optimizer.update(zero, state, weight)
        weight = optax.apply_updates(weight, updates)
        return weight, state, averaging.moved(average, weight, ema_decay, i)

    loop = jax.jit(lambda steps: lax.fori_loop(0, steps, step, (one, optimizer.init(one), one)))
    return loop(jnp.int32(steps))[2][LAYER][MEAN_KERNEL][0, 0]


def initial_kernel(
    model: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]
) -> jax.Array:
    """Returns the kernel [49 * C, F] that `model`, not folded, has after `init` with this key."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    return model.clone(fold=False).init(key, images)["params"][LAYER]["kernel"]


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, with a folded gradient counted 49 times: the norm is that of
    the unfolded gradients."""

    def update(updates, state, params=None):
        del params
        squares = jax.tree_util.tree_map_with_path(_square_sum, updates)
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))

        def clip(gradient):
            small = (gradient / norm.astype(gradient.dtype)) * max_norm
            return jnp.where(norm < max_norm, gradient, small)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _square_sum(path, gradient: jax.Array) -> jax.Array:
    return jnp.sum(gradient * gradient) * (BLOCKS if _is_mean(path) else 1)


def _is_mean(path) -> bool:
    return getattr(path[-1], "key", None) == MEAN_KERNEL


def refuse(transformation: optax.GradientTransformation, reason: str):
    """Returns `transformation`, whose `init` raises `UserError(reason)` for folded parameters."""

    def init(params):
        if any(_is_mean(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]):
            raise UserError(reason)
        return transformation.init(params)

    update = optax.with_extra_args_support(transformation).update
    return optax.GradientTransformationExtraArgs(init, update)
