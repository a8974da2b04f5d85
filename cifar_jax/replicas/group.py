"""A group of runs with a replica axis, for the training loop to drive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cifar_jax.replicas import programs as replica_programs
from cifar_jax.reporting import console
from cifar_jax.training import setup
from cifar_jax.training.runs import Arrays, Chunk, Print, Runs
from cifar_jax.training.setup import Run


class Group(Runs):
    """Runs side by side, each of which is what it would be by itself. The best states are kept in
    memory; a run that diverges is frozen, and the others go on. The replica axis on the devices is
    padded to divide by the mesh. Rows carry their run's place in the group as `member`; an epoch is
    one line of means.

    Args:
      members: a `Run` for each.
      hparams: keyword arguments of the step by name, each [R]: what a sweep varies.
      names: what messages call the members, by default after their seeds.
    """

    alone = False
    # Longer than one run's: every replica's state goes in and out of each. 256 runs of the tutorial
    # on two cores: 6,083 images/s in chunks of 0.3 s, 12,072 of 1 s, 11,992 of 4 s.
    chunk_seconds = 1.0

    def __init__(
        self,
        members: Sequence[Run],
        programs: replica_programs.Programs,
        say: Print,
        hparams: dict[str, np.ndarray] | None = None,
        names: Sequence[str] | None = None,
    ):
        super().__init__(members, programs.mesh, programs, say)
        self.names = names or [f"seed {member.config.seed}" for member in members]
        self.hparams = self.place(hparams or {})

    def place(self, tree: Any) -> Any:
        return replica_programs.split_evenly(tree, self.mesh)

    def put(self, trees: Sequence) -> Any:
        return self.place(replica_programs.stack(trees))

    def on_host(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: np.array(x)[: len(self.members)], tree)

    def abstract_payload(self) -> dict:
        one = setup.abstract_payload(self.run.shapes, self.run.steps_per_epoch)
        one["best"] = self.run.shapes if self.validates else {}
        shape = (len(self.members),)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape + x.shape, x.dtype), one)

    def payload(self, arrays: Arrays) -> dict:
        whole = setup.payload(arrays.state, arrays.step_metrics) | {"best": arrays.best}
        count = len(self.members)
        return jax.tree.map(lambda x: x if x.shape[0] == count else x[:count], whole)

    def train(self, arrays: Arrays, alive: np.ndarray, chunk: Chunk) -> Arrays:
        padding = np.zeros(chunk.batch_indices.shape[0] - len(alive), bool)
        alive = self.place(np.concatenate([alive, padding]))
        changing = (arrays.state, arrays.step_metrics, alive)
        state, step_metrics, _ = self.programs.train(changing, *chunk, self.hparams)
        return Arrays(state, step_metrics, arrays.best)

    def next_epoch(self, arrays: Arrays, improved: np.ndarray) -> Arrays:
        best = arrays.best
        if improved.any():
            best = replica_programs.keep(self.place(improved), arrays.state, best)
        return Arrays(arrays.state, self.empty_metrics(), best)

    def finite(self, arrays: Arrays) -> np.ndarray:
        return self.on_host(replica_programs.all_finite(arrays.state.params))

    def label(self, i: int) -> dict:
        return {"member": i}

    def show_window(self, row: dict) -> None:
        pass

    def show_epoch(self, rows: list[dict], improved: np.ndarray) -> None:
        if rows:
            epochs = self.recipe.epochs
            line = console.epochs_line(rows, epochs, self.label_width, self.columns)
            self.say_row(line, runs=len(self.members))

    def diverged(self, i: int, what: str, step: int, latest_step: Callable) -> None:
        self.say(
            f"warning: {self.names[i]}: {what} not finite at step {step}; frozen, the others go on"
        )
