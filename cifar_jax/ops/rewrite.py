"""A function's plain convolutions and max pools, computed as this package computes its own.

`lax.conv_general_dilated` and the max pool of `lax.reduce_window`, which `flax.linen`, `flax.nnx`
and others call, are slow on a CPU inside a loop (XLA, jax #12868). `rewritten(f)` traces f and
evaluates what it does operation by operation, as f itself but for these:

- a convolution of stride 1 with a square kernel by `convolution.convolve`, as one with a bias,
  `jax.nn.relu` and a 2x2 pool behind it, and `Blocked` from one to the next;
- any other convolution over images, and max pools, by `windows`.

What lies within a `jax.jit` and a `jax.checkpoint` is rewritten too, within other loops and
functions with a gradient of their own it is not.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from cifar_jax.ops import convolution, layout, windows
from cifar_jax.ops.layout import Blocked
from cifar_jax.ops.windows import Window

Note = Callable[[str, str], None]  # of what kind an operation is, and what computes it


def rewritten(function: Callable, lowering: str = "auto", note: Note | None = None) -> Callable:
    """Returns `function`, a pure one of trees of arrays, with the same results to rounding.

    Args:
      lowering: of `convolution.LOWERINGS`, for what `convolution.convolve` computes.
      note: told of every convolution and max pool.
    """

    def call(*args):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        evaluation = _Evaluation(lowering, note or (lambda kind, form: None))
        found = evaluation(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return call


@dataclasses.dataclass(frozen=True)
class _Chain:
    """A convolution, the addition of a bias, relu and perhaps a 2x2 pool: what each is alone is
    needed nowhere."""

    conv: Any
    bias: Any
    pool: bool


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    lowering: str
    note: Note

    def __call__(self, closed, args: Sequence) -> list[jax.Array]:
        """Returns the results of a closed jaxpr; of `args` some may be `Blocked`."""
        jaxpr = closed.jaxpr
        env = dict(zip(jaxpr.constvars + jaxpr.invars, [*closed.consts, *args], strict=True))

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        def images(atom):
            value = read(atom)
            if isinstance(value, Blocked):
                env[atom] = value = layout.to_images(value)
            return value

        chains, skipped = _chains(jaxpr)
        for place, eqn in enumerate(jaxpr.eqns):
            if place in skipped:
                continue
            with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack)):
                found = self._one(eqn, chains.get(place), read, images)
            env.update(zip(eqn.outvars, found, strict=True))
        return [images(atom) for atom in jaxpr.outvars]

    def _one(self, eqn, chain: _Chain | None, read, images) -> Sequence:
        name = eqn.primitive.name
        if chain is not None:
            return [self._convolve(chain.conv, read, images, images(chain.bias), chain.pool)]
        if name == "conv_general_dilated" and _is_plain(eqn):
            return [self._convolve(eqn, read, images)]
        if name == "reduce_window_max" and _pool_window(eqn) is not None:
            self.note("pool", "windows")
            return [windows.max_pool(images(eqn.invars[0]), _pool_window(eqn))]
        if name == "reshape" and isinstance(read(eqn.invars[0]), Blocked) and _flattens(eqn):
            return [layout.flatten(read(eqn.invars[0]))]
        args = [images(atom) for atom in eqn.invars]
        if name == "jit" and any(_slow(eqn)):
            return self(eqn.params["jaxpr"], args)
        if name in ("remat2", "checkpoint") and any(_slow(eqn)):
            inside = functools.partial(self, core.ClosedJaxpr(eqn.params["jaxpr"], ()))
            options = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
            return jax.checkpoint(inside, **options)(args)
        for kind in _slow(eqn):
            self.note(kind, "lax")
        found = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
        return found if eqn.primitive.multiple_results else [found]

    def _convolve(self, eqn, read, images, bias=None, pool=False) -> jax.Array | Blocked:
        """The convolution `eqn`; with a bias [1, 1, 1, F] that, relu and the pool too."""
        kernel, params = images(eqn.invars[1]), eqn.params
        strides, padding = params["window_strides"], params["padding"]
        if not _is_even(eqn):
            self.note("convolution", "patches")
            window = Window(kernel.shape[:2], strides, padding, params["rhs_dilation"])
            groups = params["feature_group_count"]
            return windows.convolve(images(eqn.invars[0]), kernel, window, groups)
        lowering = self.lowering
        if lowering == "auto" and params["precision"] is not None:
            lowering = "gemm"  # Winograd's is less exact
        (n, *out, _), channels = eqn.outvars[0].aval.shape, kernel.shape[2]
        form, _ = convolution.choose(lowering, len(kernel), channels, tuple(out), pool, n)
        self.note("convolution", "gemm" if form == "mixed" else form)
        if len({*padding[0], *padding[1]}) == 1:
            x, around = read(eqn.invars[0]), padding[0][0]
        else:
            x, around = jnp.pad(images(eqn.invars[0]), ((0, 0), *padding, (0, 0))), 0
        bias = None if bias is None else bias.reshape(-1)
        options = {"padding": around, "pool": pool, "lowering": lowering}
        y = convolution.convolve(x, kernel, bias, **options)
        return convolution.to_images(y) if bias is None else y


def _chains(jaxpr) -> tuple[dict[int, _Chain], set[int]]:
    """Returns the chains of a jaxpr by the place of their last equation, and the places of the
    equations before it."""
    readers = collections.defaultdict(list)
    for place, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if not isinstance(atom, core.Literal):
                readers[atom].append(place)
    for atom in jaxpr.outvars:
        if not isinstance(atom, core.Literal):
            readers[atom].append(None)

    def follower(place):
        """The place of the one equation that reads this one's result, None if it is not alone."""
        found = readers[jaxpr.eqns[place].outvars[0]]
        return found[0] if len(found) == 1 else None

    chains, skipped = {}, set()
    for place, conv in enumerate(jaxpr.eqns):
        if not (_is_plain(conv) and _is_even(conv)):
            continue
        add = follower(place)
        bias = None if add is None else _bias(jaxpr.eqns[add], conv.outvars[0])
        relu = None if bias is None else follower(add)
        if relu is None or not _is_relu(jaxpr.eqns[relu]):
            continue
        pool = follower(relu)
        pooled = pool is not None and _pool_window(jaxpr.eqns[pool]) == Window((2, 2), (2, 2))
        chains[pool if pooled else relu] = _Chain(conv, bias, pooled)
        skipped |= {place, add, *([relu] if pooled else [])}
    return chains, skipped


def _slow(eqn):
    """Yields the kinds of all convolutions and max pools that an equation is or holds."""
    kinds = {"conv_general_dilated": "convolution", "reduce_window_max": "pool"}
    if eqn.primitive.name in kinds:
        yield kinds[eqn.primitive.name]
    for inner in core.jaxprs_in_params(eqn.params):
        for held in inner.eqns:
            yield from _slow(held)


def _is_plain(eqn) -> bool:
    """Whether an equation is a convolution over images [N, H, W, C] that `windows` can compute."""
    if eqn.primitive.name != "conv_general_dilated":
        return False
    params, (x, kernel), out = eqn.params, eqn.invars, eqn.outvars[0].aval
    numbers = params["dimension_numbers"]
    return (
        (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
        == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        and params["batch_group_count"] == 1
        and params["lhs_dilation"] == (1, 1)
        and min(map(min, params["padding"])) >= 0
        and x.aval.dtype == kernel.aval.dtype == out.dtype
        and jnp.issubdtype(out.dtype, jnp.floating)
        and out.size > 0
    )


def _is_even(eqn) -> bool:
    """Whether a plain convolution is of those that `convolution.convolve` computes; of kernels of
    one pixel that is a product, and best left one."""
    params, (rows, columns, *_) = eqn.params, eqn.invars[1].aval.shape
    ones = params["window_strides"] == params["rhs_dilation"] == (1, 1)
    return ones and params["feature_group_count"] == 1 and rows == columns > 1


def _bias(eqn, conv):
    """The bias [1, 1, 1, F] that an equation adds to the result `conv`, None if it does not."""
    if eqn.primitive.name != "add":
        return None
    others = [atom for atom in eqn.invars if atom is not conv]
    fits = len(others) == 1 and others[0].aval.shape == (1, 1, 1, conv.aval.shape[3])
    return others[0] if fits and others[0].aval.dtype == conv.aval.dtype else None


def _pool_window(eqn) -> Window | None:
    """The window of a max pool over images, None of anything else."""
    if eqn.primitive.name != "reduce_window_max":
        return None
    params, aval = eqn.params, eqn.outvars[0].aval
    names = ("window_dimensions", "window_strides", "window_dilation", "base_dilation")
    parts = [params[name] for name in names]
    over_pixels = aval.ndim == 4 and all(part[0] == part[3] == 1 for part in parts)
    padding = params["padding"]
    if not over_pixels or padding[0] != (0, 0) or padding[3] != (0, 0):
        return None
    if parts[3] != (1, 1, 1, 1) or aval.size == 0 or not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    size, strides, dilation = (part[1:3] for part in parts[:3])
    return Window(size, strides, padding[1:3], dilation)


def _is_relu(eqn) -> bool:
    """Whether an equation is `jax.nn.relu`, its gradient at 0 included."""
    if eqn.primitive.name != "custom_jvp_call" or len(eqn.invars) != 1:
        return False

    def call(x):
        return eqn.primitive.bind(x, **eqn.primitive.get_bind_params(eqn.params))

    x = eqn.invars[0].aval

    def both(function):
        jvp = jax.make_jaxpr(lambda x, dx: jax.jvp(function, (x,), (dx,)))
        return str(jax.make_jaxpr(function)(x)), str(jvp(x, x))

    return both(call) == both(jax.nn.relu)


def _flattens(eqn) -> bool:
    """Whether a reshape makes one row of each image."""
    n, *rest = eqn.invars[0].aval.shape
    sizes = eqn.params["new_sizes"]
    return eqn.params["dimensions"] is None and sizes == (n, math.prod(rest))
