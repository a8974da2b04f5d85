"""The leader's checkpoints, for all processes of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_jax.checkpoints.restoring import Restored
from cifar_jax.checkpoints.saving import Checkpoints
from cifar_jax.parallel.agreement import _own, from_leader, is_leader, several, share
from cifar_jax.runtime.keys import is_key


def open_checkpoints(directory: Path):
    """Returns `saving.Checkpoints`; of several processes the leader's serve all."""
    leaders = Checkpoints(directory) if is_leader() else None
    return Shared(leaders) if several() else leaders


class Shared:
    """The leader's `Checkpoints`, with the part of their methods that training uses.

    Weights are the same in every process, so the leader saves its own copy and on restoring sends
    it to the others. `restore` and `committed` must be called by all.
    """

    def __init__(self, leaders):
        self._leaders = leaders

    def save(self, step: int, state: Any, extra: dict | None = None, **options) -> None:
        if self._leaders is not None:
            self._leaders.save(step, jax.tree.map(_own, state), extra, **options)

    def restore(self, abstract_state: Any, *, which: str | int = "latest"):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_state)
        found = None
        if self._leaders is not None:
            found = self._leaders.restore(shapes, which=which)
        about = from_leader(found and [found.step, found.extra, found.metric, found.skipped])
        state = found.state if found else jax.tree.map(_blank, shapes)
        step, extra, metric, skipped = about
        return Restored(step, share(state), extra, metric, skipped)

    def committed(self) -> bool:
        return from_leader(self._leaders and self._leaders.committed())

    def latest_step(self) -> int | None:
        return self._leaders and self._leaders.latest_step()

    def wait(self) -> None:
        if self._leaders is not None:
            self._leaders.wait()

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *error) -> None:
        if self._leaders is not None:
            self._leaders.__exit__(*error)


def _blank(shape: jax.ShapeDtypeStruct) -> Any:
    """An array of that shape for `share` to fill."""
    if is_key(shape):
        return jax.random.key(0)
    return np.zeros(shape.shape, shape.dtype)
