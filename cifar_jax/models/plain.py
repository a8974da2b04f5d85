"""Networks in plain Flax, whose convolutions and max pools are computed as this package's own.

Layers, parameters and names stay as they are: `fast` gives the model an `apply` that evaluates what
its own does with the operations of `ops/rewrite.py`, and a field `lowering` like that of the models
here. It is of use on a CPU; elsewhere `auto` changes nothing, as `lax` does everywhere.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax.ops import rewrite


def fast(model: nn.Module, lowering: str = "auto") -> nn.Module:
    """Returns `model` as one of a class derived from its own, with this `lowering`; a model that
    has such a field computes its convolutions by itself and is returned as it is."""
    if hasattr(model, "lowering"):
        return model
    fields = [field.name for field in dataclasses.fields(model) if field.init]
    given = {name: getattr(model, name) for name in fields if name not in ("parent", "name")}
    return _derived(type(model))(**given, lowering=lowering)


@functools.cache  # one class for each: equal models stay equal
def _derived(base: type[nn.Module]) -> type[nn.Module]:
    class Fast(base):
        lowering: str = "auto"

        @property
        def rewrites(self) -> bool:
            on_cpu = jax.default_backend() == "cpu"
            return self.lowering != "lax" and (self.lowering != "auto" or on_cpu)

        @nn.nowrap
        def apply(self, variables, *args, rngs=None, **options):
            apply = super().apply
            if not self.rewrites:
                return apply(variables, *args, rngs=rngs, **options)

            def call(variables, args, rngs):
                return apply(variables, *args, rngs=rngs, **options)

            return rewrite.rewritten(call, self.lowering)(variables, args, rngs)

    Fast.__name__, Fast.__qualname__ = base.__name__, base.__qualname__
    return Fast


def forms(model: nn.Module, batch: tuple[int, ...], **mode: bool) -> dict[str, dict[str, int]]:
    """Returns how many convolutions and pools of a model of `fast` are computed how, e.g.
    {"convolution": {"winograd": 5, "patches": 1}, "pool": {"windows": 1}}; {} of any other model,
    and where nothing is rewritten. A 2x2 pool right behind bias and relu counts with its
    convolution.

    Args:
      batch: (N, H, W, C) of the images it is called with.
      mode: `train`, where it takes that.
    """
    if not getattr(model, "rewrites", False):
        return {}
    plain, found = model.clone(lowering="lax"), collections.defaultdict(collections.Counter)

    def note(kind: str, form: str) -> None:
        found[kind][form] += 1

    def call(variables, images, key):
        return plain.apply(
            variables, images, rngs={"params": key, "dropout": key}, mutable=True, **mode
        )

    def noted(images, key) -> Any:
        variables = plain.init(key, images, **mode)
        return rewrite.rewritten(call, model.lowering, note)(variables, images, key)

    jax.eval_shape(noted, jax.ShapeDtypeStruct(batch, jnp.float32), jax.random.key(0))
    return {kind: dict(counts) for kind, counts in found.items()}


def forms_line(found: dict[str, dict[str, int]]) -> str:
    """Returns what `forms` found as one line."""
    parts = []
    for kind, counts in sorted(found.items()):
        many = sum(counts.values())
        how = ", ".join(f"{count} by {form}" for form, count in sorted(counts.items()))
        parts.append(f"{many} plain {kind}{'s' if many > 1 else ''}: {how}")
    return f"Layers     {'; '.join(parts)} (--conv lax leaves them as they are)"
