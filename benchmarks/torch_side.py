"""PyTorch's side of a comparison: a peer of `torch_reference.PEERS` behind `sides.Side`."""

from __future__ import annotations

import functools
import itertools
import time
from pathlib import Path

from benchmarks.cases import Case, full_batches
from benchmarks.sides import Side, compared_steps, read_params


def read_weights(path: Path) -> dict:
    """Returns the PyTorch state dict of the weights that `Ours.prepare` wrote."""
    from benchmarks.torch_models import state_from_flax

    return state_from_flax(read_params(path))


class PyTorch(Side):
    """A peer of `torch_reference.PEERS`."""

    def __init__(self, peer: str, device: str):
        self.peer, self.device = peer, device

    def prepare(self, case: Case, dataset, precision: str, weights: Path, seconds: float) -> dict:
        """Builds the case from our initial `weights` (.npz). Raises `NotRun`."""
        from benchmarks.torch_reference import PEERS

        make = functools.partial(
            PEERS[self.peer],
            case.settings(precision),
            initial_state=read_weights(weights),
            device=self.device,
        )
        start = time.perf_counter()
        if case.kind == "train":
            split = dataset.splits["train"]
            self.trainer = make(split.images, split.labels)
            data_seconds = time.perf_counter() - start
            start = time.perf_counter()
            losses = self._prepare_training(case, make, split)
        else:
            split = dataset.splits["test"]
            self.trainer = make(split.images[:1], split.labels[:1])
            data = self.trainer.place(split.images, split.labels)
            data_seconds = time.perf_counter() - start
            start = time.perf_counter()
            losses = self._prepare_evaluation(case, data)
        self.warm_up(seconds)
        compiles = "compile" in self.peer or "cudagraph" in self.peer
        return {
            "losses": losses,
            # From the first step to the end of the warm-up.
            "compile_seconds": time.perf_counter() - start if compiles else 0.0,
            "data_seconds": data_seconds,
            "workers": getattr(self.trainer, "workers", None),
        }

    def _prepare_training(self, case: Case, make, split) -> list[float]:
        from torch import nn

        from benchmarks.torch_published import PublishedTrainer
        from benchmarks.torch_trainers import full_float32

        order = full_batches(len(split), case.batch_size)
        published = isinstance(self.trainer, PublishedTrainer)
        if published:
            few = order[: max(3, 4000 // case.batch_size)]
            self.trainer.workers = self.trainer.fastest_worker_count(few)
        compared = self.trainer
        dropout = any(isinstance(module, nn.Dropout) for module in self.trainer.model.modules())
        if dropout or self.device == "cuda":
            # On a copy, without dropout: masks differ between the sides. What a GPU's trainer
            # compiles or captures for the comparison is of another precision.
            compared = make(split.images, split.labels)
            for module in compared.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            if published:
                compared.workers = self.trainer.workers
        with full_float32():
            losses = compared.run(order[: compared_steps(case.settings())]).tolist()
        if published:
            # One loader for good: starting its workers counts for no window.
            self.stream = self.trainer.steps(itertools.cycle(order))
            self.dispatch = functools.partial(self._published, case.batch_size)
        else:
            self.order, self.row = order, 0
            self.dispatch = self._train
            self.size_chunk(0.1, min(512, len(order)))
        return losses

    def _prepare_evaluation(self, case: Case, data) -> list[float]:
        from benchmarks.torch_trainers import full_float32

        if hasattr(self.trainer, "worker_counts"):
            seconds = {}
            for workers in self.trainer.worker_counts:
                self.trainer.workers = workers
                start = time.perf_counter()
                self.trainer.evaluate(data, case.batch_size)
                seconds[workers] = time.perf_counter() - start
            self.trainer.workers = min(seconds, key=seconds.get)
        self.dispatch = functools.partial(self._evaluate, data, case.batch_size)
        with full_float32():
            return [self.trainer.evaluate(data, case.batch_size)["loss"]]

    def _train(self) -> int:
        if self.row + self.chunk > len(self.order):
            self.row = 0
        self.trainer.run(self.order[self.row : self.row + self.chunk])
        self.row += self.chunk
        return self.chunk * self.order.shape[1]

    def _published(self, batch_size: int) -> int:
        next(self.stream)
        return batch_size

    def _evaluate(self, data, batch_size: int) -> int:
        self.trainer.evaluate(data, batch_size)
        return len(data[1]) if isinstance(data, tuple) else len(data)

    def sync(self) -> None:
        self.trainer.sync()
