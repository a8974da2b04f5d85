"""Groups of layers, by how their names begin: frozen ones, and those with a rate of their own.

A layer's name is its path in the parameters (`conv1`, `features_0`, `block1/conv2`). A prefix
stands for every layer whose name begins with it, a number in it being whole: `conv` is all of
conv1, conv2, ..., and `features_1` is not features_10.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax.runtime.errors import UserError, nearest

Params = Mapping[str, Any]


def matches(layer: str, prefix: str) -> bool:
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
            if not any(matches(layer, prefix) for layer in layers):
                raise UserError(
                    f"{option}: no layer begins with {prefix!r}; {nearest(prefix, layers)}"
                )
    trained = [name for name in layers if not any(matches(name, prefix) for prefix in freeze)]
    if not trained:
        raise UserError(
            f"--freeze {','.join(freeze)} leaves no layer to train: {', '.join(layers)}"
        )
    for prefix in rated:
        if not any(matches(layer, prefix) for layer in trained):
            raise UserError(f"--rate-scale {prefix}: all of these layers are frozen by --freeze")


def split(params: Params, freeze: tuple[str, ...]) -> tuple[Params, Params]:
    """Returns (trained, frozen) parts of the parameters; both are trees of the same layout."""
    if not freeze:
        return params, {}
    trained, frozen = {}, {}
    for path, leaf in flatten_dict(params).items():
        layer = "/".join(path[:-1])
        part = frozen if any(matches(layer, prefix) for prefix in freeze) else trained
        part[path] = leaf
    return unflatten_dict(trained), unflatten_dict(frozen)


def merge(trained: Params, frozen: Params) -> Params:
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
        fitting = [prefix for prefix in scales if matches(layer, prefix)]
        return scales[max(fitting, key=len)] if fitting else 1.0

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(lambda p, u: u * factor(p), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
