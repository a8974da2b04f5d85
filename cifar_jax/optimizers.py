"""From a recipe to one optax transformation, with PyTorch's meaning of every setting."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import optax

from cifar_jax.layer_groups import scale_rates
from cifar_jax.models import fold
from cifar_jax.recipes import Recipe


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
