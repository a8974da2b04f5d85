"""From a recipe to one optax transformation, with PyTorch's meaning of every setting."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax.models import fold
from cifar_jax.runtime.errors import UserError, nearest
from cifar_jax.settings import Recipe


def _standard_promotion(function):
    """optax mixes dtypes, which a caller's strict promotion rules would refuse."""

    @functools.wraps(function)
    def call(*args, **options):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **options)

    return call


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule | float:
    """Returns the learning rate as a function of the step, or a float where it is constant.

    `cosine` falls from the peak to 0 over the run, `linear` to `end_factor` of it; `onecycle` is
    optax's cosine one-cycle (30 % of the run up from peak/25, then down to peak/10,000 of that, as
    in PyTorch's OneCycleLR); `step` multiplies by `step_factor` every `step_epochs`. Warm-up goes
    linearly from `warmup_factor` of the peak and counts as part of the run (`onecycle` has its own,
    so it takes none).
    """
    schedule = _schedule(recipe, recipe.epochs, steps_per_epoch)
    return _standard_promotion(schedule) if callable(schedule) else schedule


def _schedule(recipe: Recipe, epochs: float, steps_per_epoch: int) -> optax.Schedule | float:
    total = math.ceil(epochs * steps_per_epoch)
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total)
    rest = max(total - warmup, 1)
    peak = recipe.learning_rate
    if recipe.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(total, peak)
    if recipe.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest)
    elif recipe.schedule == "linear":
        main = optax.linear_schedule(peak, recipe.end_factor * peak, rest)
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
    return optax.join_schedules(
        [optax.linear_schedule(recipe.warmup_factor * peak, peak, warmup), main], [warmup]
    )


def _rates(recipe: Recipe, steps_per_epoch: int, peak: jax.Array | None):
    """Returns the rate of most layers, and {prefix: rate} of those in `rate_epochs` or
    `stop_epochs`. With a traced peak in place of the recipe's: a schedule's rates are its shape
    times its peak."""

    def traced(shape):
        return (lambda step: peak * shape(step)) if callable(shape) else peak

    shapes = recipe if peak is None else recipe.replace(learning_rate=1.0)
    rate = _schedule(shapes, recipe.epochs, steps_per_epoch)
    rates = {}
    for prefix, epochs in recipe.rates_epochs.items():
        total, own = math.ceil(epochs * steps_per_epoch), _schedule(shapes, epochs, steps_per_epoch)
        rates[prefix] = functools.partial(_until, total, own)
    for prefix, epochs in recipe.stops_epochs.items():
        rates[prefix] = functools.partial(_until, math.ceil(epochs * steps_per_epoch), rate)
    if peak is None:
        return rate, rates
    return traced(rate), {prefix: traced(own) for prefix, own in rates.items()}


def _until(total: int, rate: optax.Schedule | float, step):
    """The rate of a step, 0 from step `total` on."""
    now = rate(step) if callable(rate) else rate
    return jnp.where(step < total, now, 0.0)


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
    -> (factors of layers with a rate of their own) -> (rescaling of the filters).

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
    by_muon = recipe.optimizer == "muon"
    if recipe.weight_decay and recipe.optimizer != "adamw":
        decay = decayed_weights(weight_decay, recipe.decay_scales, spare_filters=by_muon)
        parts.append(fold.refuse(decay, _NOT_FOLDED) if recipe.optimizer == "adam" else decay)
    if recipe.optimizer in ("adam", "adamw"):
        parts.append(optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8))
    elif by_muon:
        filters = given.get("muon_momentum", recipe.muon_momentum)
        parts.append(muon_or_momentum(filters, momentum, nesterov=recipe.nesterov))
    elif recipe.momentum:
        parts.append(optax.trace(momentum, nesterov=recipe.nesterov))
    if recipe.weight_decay and recipe.optimizer == "adamw":
        parts.append(decayed_weights(weight_decay, recipe.decay_scales))
    rate, rates = _rates(recipe, steps_per_epoch, given.get("learning_rate"))
    parts.append(scale_by_rates(rate, rates) if rates else optax.scale_by_learning_rate(rate))
    if recipe.rate_scale:
        parts.append(scale_rates(recipe.rate_scales))
    if recipe.rescale_filters:
        parts.append(rescale_filters())
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
# conv1, conv2, ..., and `features_1` is not features_10. It may go on to one of a layer's
# parameters: `conv1/kernel`.

Params = Mapping[str, Any]


def layer_matches(layer: str, prefix: str) -> bool:
    """Returns whether the layer belongs to the group `prefix`."""
    rest = layer.removeprefix(prefix)
    cuts_a_number = prefix[-1:].isdigit() and rest[:1].isdigit()
    return layer.startswith(prefix) and not cuts_a_number


def layer_names(params: Params) -> list[str]:
    """Returns the names of the layers that hold parameters, in the tree's order."""
    return list(dict.fromkeys("/".join(path[:-1]) for path in flatten_dict(params)))


def check_groups(
    params: Params,
    freeze: Iterable[str],
    rated: Iterable[str],
    others: Mapping[str, Iterable[str]] | None = None,
) -> None:
    """Looks at a recipe's prefixes beside a model's parameters (arrays or their shapes).

    Args:
      freeze: prefixes of frozen layers.
      rated: prefixes of layers with a rate of their own.
      others: {option: prefixes} of what else has them.

    Raises:
      UserError: a prefix is that of no layer, nothing is left to train, or a rate is given to
        frozen layers alone.
    """
    layers, names = layer_names(params), ["/".join(path) for path in flatten_dict(params)]
    for option, prefixes in (
        ("--freeze", freeze),
        ("--rate-scale", rated),
        *(others or {}).items(),
    ):
        for prefix in prefixes:
            if not any(layer_matches(name, prefix) for name in names):
                raise UserError(
                    f"{option}: no layer begins with {prefix!r}; {nearest(prefix, layers)}"
                )
    trained = [name for name in names if not any(layer_matches(name, prefix) for prefix in freeze)]
    if not trained:
        raise UserError(
            f"--freeze {','.join(freeze)} leaves no layer to train: {', '.join(layers)}"
        )
    for prefix in rated:
        if not any(layer_matches(name, prefix) for name in trained):
            raise UserError(f"--rate-scale {prefix}: all of these layers are frozen by --freeze")


def split_frozen(params: Params, freeze: tuple[str, ...]) -> tuple[Params, Params]:
    """Returns (trained, frozen) parts of the parameters; both are trees of the same layout."""
    if not freeze:
        return params, {}
    trained, frozen = {}, {}
    for path, leaf in flatten_dict(params).items():
        name = "/".join(path)
        part = frozen if any(layer_matches(name, prefix) for prefix in freeze) else trained
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

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(
            lambda p, u: u * _of(scales, p, 1.0), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _of(values: Mapping[str, Any], path, default: Any) -> Any:
    """Returns the value of the longest prefix that a parameter's name begins with."""
    name = "/".join(key.key for key in path)
    fitting = [prefix for prefix in values if layer_matches(name, prefix)]
    return values[max(fitting, key=len)] if fitting else default


def scale_by_rates(
    rate: optax.Schedule | float, rates: Mapping[str, optax.Schedule | float]
) -> optax.GradientTransformation:
    """As `optax.scale_by_learning_rate(rate)`, with schedules of their own for the layers of
    `rates`, the longest prefix that fits."""

    def update(updates, state, params=None):
        del params

        def now(schedule):
            return schedule(state.count) if callable(schedule) else schedule

        most, own = now(rate), {prefix: now(schedule) for prefix, schedule in rates.items()}
        updates = jax.tree_util.tree_map_with_path(
            lambda p, u: -jnp.asarray(_of(own, p, most), u.dtype) * u, updates
        )
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )


def decayed_weights(
    weight_decay, scales: Mapping[str, float], *, spare_filters: bool = False
) -> optax.GradientTransformation:
    """As `optax.add_decayed_weights`, times the factor of a layer's longest prefix in `scales`;
    with `spare_filters` convolutions' kernels get none."""
    if not scales and not spare_filters:
        return optax.add_decayed_weights(weight_decay)

    def decayed(path, update, weight):
        if spare_filters and weight.ndim == 4:
            return update
        return update + weight_decay * _of(scales, path, 1.0) * weight

    def update(updates, state, params):
        return jax.tree_util.tree_map_with_path(decayed, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# Muon, as airbench94 has it (https://kellerjordan.github.io/posts/muon): the momentum of a
# convolution's kernel, seen as a matrix [F, k * k * C], is replaced by about U V^T of its singular
# value decomposition, found by Newton and Schulz's iteration with these coefficients.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 3


def orthogonalised(kernel: jax.Array) -> jax.Array:
    """Returns a kernel [k, k, C, F] as [F, k * k * C] with singular values near 1, in its shape."""
    a, b, c = NEWTON_SCHULZ
    x = kernel.reshape(-1, kernel.shape[-1]).T
    x = x / (jnp.linalg.norm(x) + 1e-7)
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    x = x.T if turned else x
    return x.T.reshape(kernel.shape)


def muon_or_momentum(filters, others, *, nesterov: bool) -> optax.GradientTransformation:
    """`optax.trace`, of decay `filters` for convolutions' kernels (4 axes), whose trace is then
    orthogonalised, and of decay `others` for everything else.

    `optax.contrib.scale_by_muon` corrects its average for its start, which this does not (nor
    does airbench), so the two differ by 3 % at the second step and by 0.1 % at the ninth.
    """

    def update(updates, state, params=None):
        del params

        def decay(x):
            return filters if x.ndim == 4 else others

        trace = jax.tree.map(lambda g, t: g + decay(g) * t, updates, state.trace)
        found = jax.tree.map(lambda g, t: g + decay(g) * t, updates, trace) if nesterov else trace
        found = jax.tree.map(lambda u: orthogonalised(u) if u.ndim == 4 else u, found)
        return found, optax.TraceState(trace)

    return optax.GradientTransformation(optax.trace(0.0).init, update)


def rescale_filters() -> optax.GradientTransformation:
    """Last in a chain, scales each convolution's kernel [k, k, C, F] to norm sqrt(F) before its
    update is added."""

    def rescaled(update, weight):
        if weight.ndim != 4:
            return update
        return update + (math.sqrt(weight.shape[-1]) / jnp.linalg.norm(weight) - 1) * weight

    def update(updates, state, params):
        return jax.tree.map(rescaled, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
