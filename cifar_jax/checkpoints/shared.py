"""The leader's checkpoints, for all processes of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_jax.checkpoints.save_restore import Checkpoints, Restored
from cifar_jax.parallel.agreement import from_leader, is_leader, several, share
from cifar_jax.runtime.keys import is_key


def open_checkpoints(directory: Path) -> Checkpoints | Shared:
    """Returns `Checkpoints`; of several processes the leader's serve all."""
    leaders = Checkpoints(directory) if is_leader() else None
    return Shared(leaders) if several() else leaders


class Shared:
    """The leader's `Checkpoints`, None elsewhere, with those of their methods that training uses.

    Weights are the same in every process, so the leader saves its own copy and on restoring sends
    it to the others. `restore` and `committed` must be called by all.
    """

    def __init__(self, leaders: Checkpoints | None):
        self._leaders = leaders

    def save(self, step: int, state: Any, extra: dict | None = None, **options) -> None:
        if self._leaders:
            self._leaders.save(step, state, extra, **options)

    def restore(self, abstract_state: Any, *, which: str | int = "latest") -> Restored:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_state)
        found = self._leaders and self._leaders.restore(shapes, which=which)
        step, *about = from_leader(found and [found.step, found.extra, found.metric, found.skipped])
        return Restored(step, share(found.state if found else jax.tree.map(_blank, shapes)), *about)

    def committed(self) -> bool:
        return from_leader(self._leaders and self._leaders.committed())

    def latest_step(self) -> int | None:
        return self._leaders and self._leaders.latest_step()

    def wait(self) -> None:
        if self._leaders:
            self._leaders.wait()

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *error) -> None:
        if self._leaders:
            self._leaders.__exit__(*error)


def _blank(shape: jax.ShapeDtypeStruct) -> Any:
    """An array of that shape for `share` to fill."""
    return jax.random.key(0) if is_key(shape) else np.zeros(shape.shape, shape.dtype)
