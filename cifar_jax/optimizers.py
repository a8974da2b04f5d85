"""From a recipe to one optax transformation, with PyTorch's meaning of every setting."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax.models import fold
from cifar_jax.recipes import Recipe
from cifar_jax.runtime.errors import UserError, nearest


def _standard_promotion(function):
    """optax mixes dtypes, which a caller's strict promotion rules would refuse."""

    @functools.wraps(function)
    def call(*args, **options):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **options)

    return call


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule | float:
    """Returns the learning rate as a function of the step, or a float where it is constant.

    `cosine` falls from the peak to 0 over the run; `onecycle` is optax's cosine one-cycle (30 %
    of the run up from peak/25, then down to peak/10,000 of that, as in PyTorch's OneCycleLR);
    `step` multiplies by `step_factor` every `step_epochs`. Warm-up goes linearly from 0 and
    counts as part of the run (`onecycle` has its own, so it takes none).
    """
    schedule = _schedule(recipe, steps_per_epoch)
    return _standard_promotion(schedule) if callable(schedule) else schedule


def _schedule(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule | float:
    total = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total)
    rest = max(total - warmup, 1)
    peak = recipe.learning_rate
    if recipe.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(total, peak)
    if recipe.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest)
    elif recipe.schedule == "step":
        every = max(round(recipe.step_epochs * steps_per_epoch), 1)
        boundaries = range(every, total, every)
        main = optax.piecewise_constant_schedule(peak, {b: recipe.step_factor for b in boundaries})
    elif warmup:
        main = optax.constant_schedule(peak)
    else:
        return peak
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def _rate(recipe: Recipe, steps_per_epoch: int, peak: jax.Array | None):
    """`make_schedule`, with a traced peak in place of the recipe's: a schedule's rates are its
    shape times its peak."""
    if peak is None:
        return make_schedule(recipe, steps_per_epoch)
    shape = make_schedule(recipe.replace(learning_rate=1.0), steps_per_epoch)
    return (lambda step: peak * shape(step)) if callable(shape) else peak


_NOT_FOLDED = (
    "--optimizer adam with --weight-decay cannot train the folded layer exactly: "
    "use --optimizer adamw, or --no-fold"
)


# What of a recipe may be traced, so that runs which differ in it share a program.
TRACED = ("learning_rate", "momentum", "weight_decay", "clip_norm")


def make_optimizer(
    recipe: Recipe, steps_per_epoch: int, hparams: Mapping[str, jax.Array] | None = None
) -> optax.GradientTransformation:
    """Returns clip -> (coupled decay) -> rule -> (decoupled decay) -> -learning rate
    -> (factors of layers with a rate of their own).

    SGD's momentum buffer and Adam's epsilon are PyTorch's: buf = mu * buf + g, and
    m_hat / (sqrt(v_hat) + 1e-8). Parameters with a folded layer get the updates of the unfolded
    one (`models/fold.py`); `init` raises `UserError` for Adam with coupled decay, which cannot.

    Args:
      hparams: float32 scalars, traced perhaps, in place of the recipe's own `TRACED` numbers. The
        recipe then says which parts there are: one that it has switched off by 0 stays so.
    """
    parts, given = [], dict(hparams or {})
    clip_norm, weight_decay, momentum = (
        given.get(name, getattr(recipe, name)) for name in ("clip_norm", "weight_decay", "momentum")
    )
    if recipe.clip_norm:
        parts.append(fold.clip_by_global_norm(clip_norm))
    if recipe.weight_decay and recipe.optimizer != "adamw":
        decay = optax.add_decayed_weights(weight_decay)
        parts.append(fold.refuse(decay, _NOT_FOLDED) if recipe.optimizer == "adam" else decay)
    if recipe.optimizer in ("adam", "adamw"):
        parts.append(optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8))
    elif recipe.momentum:
        parts.append(optax.trace(momentum, nesterov=recipe.nesterov))
    if recipe.weight_decay and recipe.optimizer == "adamw":
        parts.append(optax.add_decayed_weights(weight_decay))
    rate = _rate(recipe, steps_per_epoch, given.get("learning_rate"))
    parts.append(optax.scale_by_learning_rate(rate))
    if recipe.rate_scale:
        parts.append(scale_rates(recipe.rate_scales))
    chain = optax.chain(*parts)
    return optax.GradientTransformationExtraArgs(chain.init, _standard_promotion(chain.update))


def learning_rate(recipe: Recipe, steps_per_epoch: int, step: int) -> float:
    """Returns the rate that step number `step` (from 0) uses."""
    schedule = make_schedule(recipe, steps_per_epoch)
    return float(schedule(step)) if callable(schedule) else float(schedule)


# Groups of layers, by how their names begin: frozen ones, and those with a rate of their own.
#
# A layer's name is its path in the parameters (`conv1`, `features_0`, `block1/conv2`). A prefix
# stands for every layer whose name begins with it, a number in it being whole: `conv` is all of
# conv1, conv2, ..., and `features_1` is not features_10.

Params = Mapping[str, Any]


def layer_matches(layer: str, prefix: str) -> bool:
    """Returns whether the layer belongs to the group `prefix`."""
    rest = layer.removeprefix(prefix)
    cuts_a_number = prefix[-1:].isdigit() and rest[:1].isdigit()
    return layer.startswith(prefix) and not cuts_a_number


def layer_names(params: Params) -> list[str]:
    """Returns the names of the layers that hold parameters, in the tree's order."""
    return list(dict.fromkeys("/".join(path[:-1]) for path in flatten_dict(params)))


def check_groups(params: Params, freeze: Iterable[str], rated: Iterable[str]) -> None:
    """Looks at a recipe's prefixes beside a model's parameters (arrays or their shapes).

    Args:
      freeze: prefixes of frozen layers.
      rated: prefixes of layers with a rate of their own.

    Raises:
      UserError: a prefix is that of no layer, nothing is left to train, or a rate is given to
        frozen layers alone.
    """
    layers = layer_names(params)
    for option, prefixes in (("--freeze", freeze), ("--rate-scale", rated)):
        for prefix in prefixes:
            if not any(layer_matches(layer, prefix) for layer in layers):
                raise UserError(
                    f"{option}: no layer begins with {prefix!r}; {nearest(prefix, layers)}"
                )
    trained = [name for name in layers if not any(layer_matches(name, prefix) for prefix in freeze)]
    if not trained:
        raise UserError(
            f"--freeze {','.join(freeze)} leaves no layer to train: {', '.join(layers)}"
        )
    for prefix in rated:
        if not any(layer_matches(layer, prefix) for layer in trained):
            raise UserError(f"--rate-scale {prefix}: all of these layers are frozen by --freeze")


def split_frozen(params: Params, freeze: tuple[str, ...]) -> tuple[Params, Params]:
    """Returns (trained, frozen) parts of the parameters; both are trees of the same layout."""
    if not freeze:
        return params, {}
    trained, frozen = {}, {}
    for path, leaf in flatten_dict(params).items():
        layer = "/".join(path[:-1])
        part = frozen if any(layer_matches(layer, prefix) for prefix in freeze) else trained
        part[path] = leaf
    return unflatten_dict(trained), unflatten_dict(frozen)


def merge_frozen(trained: Params, frozen: Params) -> Params:
    """Returns the parameters that `split` took apart."""
    if not frozen:
        return trained
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def scale_rates(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of layers by the factor of their prefix, the longest that fits.

    Last in a chain it gives each group its own learning rate, as PyTorch's parameter groups do:
    there too momentum and Adam's moments know nothing of the rate, and decoupled decay follows it.
    """

    def factor(path) -> float:
        layer = "/".join(key.key for key in path[:-1])
        fitting = [prefix for prefix in scales if layer_matches(layer, prefix)]
        return scales[max(fitting, key=len)] if fitting else 1.0

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(lambda p, u: u * factor(p), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
