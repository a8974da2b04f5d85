"""Many runs at once, ours and PyTorch's: sides of `benchmarks.worker` for `benchmarks.replicas`.

Replica 0 starts from the weights of the single run (`sides.Ours`), sees its batches, and gives the
losses that all sides are compared by. The other replicas have weights and orders of their own.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from benchmarks.cases import Case, full_batches
from benchmarks.sides import Side, compared_steps, full_float32, plain_step
from benchmarks.torch_side import read_weights


def replica_orders(images: int, batch_size: int, replicas: int) -> np.ndarray:
    """Returns int32 [replicas, steps, batch]: the single run's batches, then others."""
    order = full_batches(images, batch_size)
    rng = np.random.default_rng(11)
    others = [rng.permutation(order.reshape(-1)).reshape(order.shape) for _ in range(replicas - 1)]
    return np.stack([order, *others])


class ReplicaSide(Side):
    """Base: chunks of steps of all replicas, in a row until the orders end."""

    replicas: int
    orders: np.ndarray
    row = 0

    def steps(self, row: int, count: int) -> None:
        """Starts so many steps of every replica."""
        raise NotImplementedError

    def dispatch(self) -> int:
        if self.row + self.chunk > self.orders.shape[1]:
            self.row = 0
        self.steps(self.row, self.chunk)
        self.row += self.chunk
        return self.replicas * self.chunk * self.orders.shape[2]


class OurReplicas(ReplicaSide):
    """The programs of `cifar_jax.train --seeds` on all local devices.

    Args:
      form: `map` or `vmap` (`cifar_jax.replicas.programs`).
      replicas: how many.
    """

    def __init__(self, form: str, replicas: int):
        self.form, self.replicas = form, replicas

    def prepare(self, case: Case, dataset, precision: str, weights: Path, seconds: float) -> dict:
        """Builds the case; its weights are drawn from the seed that `sides.Ours` draws from."""
        import jax

        from cifar_jax.parallel import placement, programs
        from cifar_jax.replicas import programs as replica_programs
        from cifar_jax.replicas.group import Group
        from cifar_jax.runtime.timing import Clock, compile_seconds
        from cifar_jax.training.setup import Options, make_run
        from cifar_jax.training.workdir import Config, describe_data

        recipe, described = case.settings(precision), describe_data(dataset)
        options = Options(lowering=replica_programs.choose_lowering(self.form, "auto"))
        configs = [Config(case.recipe, recipe, seed, described) for seed in range(self.replicas)]
        run = make_run(configs[0], dataset, options, Clock())
        compiled = compile_seconds()
        mesh = replica_programs.replica_mesh("all", self.replicas)
        start, split = time.perf_counter(), dataset.splits["train"]
        self.data = jax.block_until_ready(placement.put(split.images, split.labels, mesh))
        data_seconds = time.perf_counter() - start
        self.orders = replica_orders(len(split), case.batch_size, self.replicas)
        self.order = replica_programs.split_evenly(self.orders, mesh)
        states = [run.with_config(config).create() for config in configs]

        def fresh():
            metrics = programs.empty_metrics(self.replicas, self.orders.shape[1])
            tree = (replica_programs.stack(states), metrics, np.ones(self.replicas, bool))
            return replica_programs.split_evenly(tree, mesh)

        count = min(compared_steps(recipe), self.orders.shape[1])
        self.changing = fresh()
        self.train = replica_programs.compile_training(plain_step(run), self.form, mesh)
        with full_float32():
            self.steps(0, count)
        metrics = {name: np.asarray(values[0][:count]) for name, values in self.changing[1].items()}
        self.changing = fresh()
        self.train = replica_programs.make_programs(run, self.form, mesh).train
        self.settle(programs.Chunks(self.orders.shape[1], seconds=Group.chunk_seconds))
        self.warm_up(seconds)
        return {
            "losses": (metrics["loss"] / metrics["count"]).tolist(),
            "compile_seconds": compile_seconds() - compiled,
            "data_seconds": data_seconds,
        }

    def settle(self, chunks) -> None:
        """Sets the chunk to what `programs.Chunks` comes to in training, after a few of them."""
        for _ in range(7):  # the first compiles, and each grows by 8 times at most
            self.chunk = chunks.next(self.orders.shape[1])
            chunks.ran(self.chunk, self.timed())

    def steps(self, row: int, count: int) -> None:
        self.changing = self.train(self.changing, self.data, self.order, row, row, count)

    def sync(self) -> None:
        import jax

        jax.block_until_ready(self.changing)


class TorchReplicas(ReplicaSide):
    """PyTorch's own way: `torch.func` over stacked weights, the optimiser over the stack.

    vmap makes the convolutions of many replicas grouped ones. SGD and Adam work number by number,
    so that one optimiser over stacked weights is every replica's own.
    """

    def __init__(self, replicas: int, device: str):
        self.replicas, self.device = replicas, device

    def prepare(self, case: Case, dataset, precision: str, weights: Path, seconds: float) -> dict:
        """Builds the case from our initial `weights` (.npz)."""
        import torch
        from torch import nn

        from benchmarks import torch_trainers
        from benchmarks.torch_trainers import EagerTrainer, NotRun

        if precision != "float32":
            raise NotRun("torch.func is measured in float32")
        recipe, split = case.settings(precision), dataset.splits["train"]
        start = time.perf_counter()
        one = EagerTrainer(
            recipe,
            split.images,
            split.labels,
            initial_state=read_weights(weights),
            device=self.device,
        )
        self.pixels, self.labels = one.training_data
        data_seconds = time.perf_counter() - start
        torch.manual_seed(1)
        others = [type(one.model)().to(self.device) for _ in range(self.replicas - 1)]
        self.models = [one.model, *others]
        self.orders = replica_orders(len(split), case.batch_size, self.replicas)
        count = min(compared_steps(recipe), self.orders.shape[1])
        rates = [m.p for m in one.model.modules() if isinstance(m, nn.Dropout)]
        self._set_dropout([0.0] * len(rates))
        self._start(recipe)
        with torch_trainers.full_float32():
            losses = [float(self._step(row)[0]) for row in range(count)]
        self._set_dropout(rates)
        self._start(recipe)
        self.size_chunk(0.1, min(512, self.orders.shape[1]), first=2)
        self.warm_up(seconds)
        return {"losses": losses, "compile_seconds": 0.0, "data_seconds": data_seconds}

    def _set_dropout(self, rates: list[float]) -> None:
        from torch import nn

        layers = [m for m in self.models[0].modules() if isinstance(m, nn.Dropout)]
        for layer, rate in zip(layers, rates, strict=True):
            layer.p = rate

    def _start(self, recipe) -> None:
        """Stacks the models' weights, and makes the program and the optimiser of the stack."""
        import torch
        from torch.func import functional_call, grad_and_value, stack_module_state, vmap
        from torch.nn import functional as F

        from benchmarks.torch_trainers import make_optimizer

        stacked, _ = stack_module_state(self.models)
        self.weights = {name: value.detach().clone() for name, value in stacked.items()}
        model = self.models[0]

        def loss(weights, images, labels):
            return F.cross_entropy(functional_call(model, weights, (images,)), labels)

        self.gradients = vmap(grad_and_value(loss), randomness="different")
        self.optimizer = make_optimizer(recipe, list(self.weights.values()), fused=True)
        # One copy to the device for good.
        self.order = torch.tensor(self.orders, dtype=torch.int64, device=self.device)

    def _step(self, row: int):
        """One step of every replica; returns their losses [replicas]."""
        picked = self.order[:, row]
        gradients, losses = self.gradients(self.weights, self.pixels[picked], self.labels[picked])
        for name, weight in self.weights.items():
            weight.grad = gradients[name]
        self.optimizer.step()
        return losses

    def steps(self, row: int, count: int) -> None:
        for i in range(count):
            self._step(row + i)

    def sync(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
