"""A side of a comparison, living in a process of its own, and ours; PyTorch's: `torch_side.py`.

`prepare` builds a case, compares and warms up; `window` then runs a fixed number of steps (or
whole evaluations), synchronised at both ends, and returns images and seconds.
"""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path

import numpy as np

from benchmarks.cases import PLAIN, Case, full_batches

COMPARED_STEPS = 50
# Of networks whose steps take seconds on a CPU.
COMPARED_STEPS_LARGE = 5
WARM_UP = 3


def compared_steps(recipe) -> int:
    """Returns how many first losses the sides are compared by."""
    return COMPARED_STEPS_LARGE if recipe.model.startswith("vgg") else COMPARED_STEPS


def plain_step(run):
    """Returns the training step of a `cifar_jax.training.setup.Run` without dropout and
    augmentation."""
    from cifar_jax import optimizers, steps

    recipe, model = run.config.recipe, run.model
    return functools.partial(
        steps.train_step,
        model=model.clone(dropout_rate=0.0) if hasattr(model, "dropout_rate") else model,
        optimizer=optimizers.make_optimizer(recipe, run.steps_per_epoch),
        preprocess=steps.make_preprocess(recipe.normalize, (), recipe.precision),
    )


def full_float32():
    """No TensorFloat-32 inside, on a GPU: for losses that are compared (`torch_trainers`)."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    return contextlib.nullcontext() if on_cpu else jax.default_matmul_precision("highest")


class Side:
    """Base: windows of a fixed number of dispatches, set by `warm_up`; where a dispatch is several
    steps, `chunk` is how many."""

    dispatches = 1
    chunk = 1

    def cpu_threads(self, case: Case) -> int | None:
        """Returns how many threads of a CPU the process should compute with, None for all."""
        return None

    def dispatch(self) -> int:
        """Starts some work and returns how many images it is; may return before it is done."""
        raise NotImplementedError

    def sync(self) -> None:
        """Waits for all that was dispatched."""
        raise NotImplementedError

    def timed(self) -> float:
        """Returns the seconds of one dispatch."""
        start = time.perf_counter()
        self.dispatch()
        self.sync()
        return time.perf_counter() - start

    def size_chunk(self, seconds: float, most: int, first: int = 5) -> None:
        """Sets the chunk to about `seconds`, by the second of two of `first` steps."""
        self.chunk = min(first, most)
        self.timed()
        self.chunk = int(max(1, min(most, seconds * self.chunk / self.timed())))

    def warm_up(self, seconds: float) -> None:
        """Runs three dispatches after the first, and sets the window to about `seconds`."""
        times = [self.timed() for _ in range(1 + WARM_UP)]
        self.dispatches = max(1, round(seconds / max(min(times[1:]), 1e-6)))

    def window(self) -> tuple[int, float]:
        """Returns (images, seconds) of one measured window."""
        self.sync()
        start = time.perf_counter()
        images = sum(self.dispatch() for _ in range(self.dispatches))
        self.sync()
        return images, time.perf_counter() - start


def read_params(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters {layer: {name: array}} that `Ours.prepare` wrote."""
    params: dict = {}
    with np.load(path) as saved:
        for name, value in saved.items():
            layer, kind = name.split("/")
            params.setdefault(layer, {})[kind] = value
    return params


class Ours(Side):
    """cifar_jax, through the very programs that `cifar_jax.train` runs.

    Args:
      lowering: the convolutions' (`auto`, `lax`, `gemm`, `winograd`).
      fold: whether VGG16's first linear layer is folded.
      devices: local devices that share a batch, as `cifar_jax.train --devices`.
      plain: whether the network is that of `plain_networks.py`, from the weights of another side.
    """

    def __init__(
        self,
        lowering: str = "auto",
        fold: bool = True,
        devices: str = "auto",
        plain: bool = False,
    ):
        self.lowering, self.fold, self.devices = lowering, fold, devices
        self.plain = plain

    def recipe(self, case: Case, precision: str = "float32"):
        """Returns the case's recipe with this side's network."""
        recipe = case.settings(precision).replace(fold=self.fold)
        return recipe.replace(model=f"{PLAIN}:{recipe.model}") if self.plain else recipe

    def cpu_threads(self, case: Case) -> int | None:
        from cifar_jax.training import setup

        training = case.kind == "train"
        return setup.cpu_threads(self.recipe(case), self.devices) if training else None

    def prepare(self, case: Case, dataset, precision: str, weights: Path, seconds: float) -> dict:
        """Builds the case and writes the initial weights to `weights` (.npz)."""
        import jax

        from cifar_jax import input_pipeline, steps
        from cifar_jax.parallel import hardware, placement
        from cifar_jax.runtime.timing import Clock, compile_seconds
        from cifar_jax.training.setup import Options, make_run
        from cifar_jax.training.workdir import Config, describe_data

        recipe = self.recipe(case, precision)
        config = Config(case.recipe, recipe, 0, describe_data(dataset))
        self.run = run = make_run(
            config, dataset, Options(lowering=self.lowering, devices=self.devices), Clock()
        )
        compiled = compile_seconds()
        self.state = run.create({"params": read_params(weights)} if self.plain else None)
        if not self.plain:
            flat = {
                f"{layer}/{name}": np.asarray(value)
                for layer, values in self._unfolded().items()
                for name, value in values.items()
            }
            np.savez(weights, **flat)
        start = time.perf_counter()
        split = dataset.splits["train" if case.kind == "train" else "test"]
        where = run.mesh if case.kind == "train" else None
        self.data = jax.block_until_ready(placement.put(split.images, split.labels, where))
        data_seconds = time.perf_counter() - start
        if case.kind == "train":
            order = full_batches(len(split), case.batch_size)
            self.rows, self.row = len(order), 0
            self.state, self.order = placement.replicate((self.state, order), run.mesh)
            losses = self._first_losses(recipe)
            self.dispatch = self._train
            self._begin()
        else:
            positions = np.arange(len(split), dtype=np.int32)
            self.order = jax.device_put(input_pipeline.batches(positions, case.batch_size))
            self.variables = steps.inference_variables(self.state)
            self.dispatch = functools.partial(self._evaluate, len(split))
            with full_float32():
                self._evaluate(0)
            losses = [float(self.pending["loss"]) / len(split)]
        self.warm_up(seconds)
        return {
            "losses": losses,
            "compile_seconds": compile_seconds() - compiled,
            "data_seconds": data_seconds,
            "cpu_threads": hardware.computing_threads(),
        }

    def _unfolded(self):
        """The initial weights as PyTorch has them."""
        from cifar_jax.weights import init_from

        image_shape = self.run.config.dataset["image_shape"]
        return init_from.unfold_initial(
            self.state.params, self.run.model, self.run.keys["state"], image_shape
        )

    def _first_losses(self, recipe) -> list[float]:
        """The first losses from the saved weights, dropout off, training a copy."""
        import jax
        import jax.numpy as jnp

        from cifar_jax.parallel import programs

        train_many = self.run.train_many
        if hasattr(self.run.model, "dropout_rate"):
            train_many = programs.compile_training(plain_step(self.run), mesh=self.run.mesh)
        count = min(compared_steps(recipe), self.rows)
        copy = jax.tree.map(jnp.copy, self.state)
        changing = (copy, self._empty_metrics())
        with full_float32():
            _, metrics = train_many(changing, self.data, self.order, 0, 0, count)
        sums = {name: np.asarray(values)[:count] for name, values in metrics.items()}
        return (sums["loss"] / sums["count"]).tolist()

    def _empty_metrics(self):
        from cifar_jax.parallel import placement, programs

        return placement.replicate(programs.empty_metrics(self.rows), self.run.mesh)

    def _begin(self) -> None:
        """Makes ready what `_train` needs: as many steps a dispatch as `cifar_jax.train` takes, or
        nearly so; where a length is a program, 256."""
        import jax

        self.pending = self._empty_metrics()
        if jax.default_backend() == "cpu":
            self.size_chunk(0.3, self.rows)
        else:
            self.chunk = min(256, self.rows)

    def _train(self) -> int:
        if self.row + self.chunk > self.rows:
            self.row = 0
        changing = (self.state, self.pending)
        self.state, self.pending = self.run.train_many(
            changing, self.data, self.order, self.row, self.row, self.chunk
        )
        self.row += self.chunk
        return self.chunk * self.order.shape[1]

    def _evaluate(self, images: int) -> int:
        self.pending = self.run.evaluate(self.variables, self.data, self.order)
        return images

    def sync(self) -> None:
        import jax

        jax.block_until_ready(self.pending)


class OurStep(Ours):
    """`steps.train_step` under a bare `jax.jit`, one step a dispatch, on one device: what a first
    port to JAX looks like. Evaluation is that of `Ours`."""

    def __init__(self, lowering: str = "auto", fold: bool = True):
        super().__init__(lowering, fold, devices="1")

    def _jitted(self, step):
        import jax

        from cifar_jax.parallel import programs

        def one(state, data, order, row):
            return step(state, data.take(order[row]))

        return jax.jit(one, donate_argnums=0, compiler_options=programs.compiler_options())

    def _first_losses(self, recipe) -> list[float]:
        import jax
        import jax.numpy as jnp

        step, losses = self._jitted(plain_step(self.run)), []
        state = jax.tree.map(jnp.copy, self.state)
        for row in range(min(compared_steps(recipe), self.rows)):
            with full_float32():
                state, sums = step(state, self.data, self.order, np.int32(row))
            losses.append(float(sums["loss"] / sums["count"]))
        return losses

    def _begin(self) -> None:
        from cifar_jax.training import setup

        run = self.run
        self.step = self._jitted(setup.step_of(run.config.recipe, run.model, run.steps_per_epoch))

    def _train(self) -> int:
        if self.row == self.rows:
            self.row = 0
        self.state, self.pending = self.step(self.state, self.data, self.order, np.int32(self.row))
        self.row += 1
        return self.order.shape[1]
