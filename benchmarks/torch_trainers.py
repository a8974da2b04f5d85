"""The PyTorch peers: what one has to write in PyTorch to train these networks, slow to fast.

Every trainer runs the same arithmetic (same loss, optimiser, batches); only the way the work
reaches the processor differs:

  published  Dataset of PIL images, ToTensor and Normalize an image, DataLoader, `loss.item()`
             every step, as the write-ups have it.
  eager      normalised tensors in memory (on the GPU: on the device), one gather a batch,
             fused optimiser, no host sync.
  compile    eager with forward, loss and backward through `torch.compile`.
  cudagraph  the whole step, gather to optimiser, as one CUDA graph replayed.

A peer that cannot run on this machine raises `NotRun` with the reason.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.torch_models import MODELS
from cifar_jax.recipes import Recipe
from cifar_jax.runtime.errors import UserError, lookup

# name -> (mean, std) of `Normalize`, written out here so that this process need not import jax:
# a DataLoader forks its workers, which jax's threads do not survive.
NORMALIZE = {"half": ((0.5,) * 3, (0.5,) * 3), "unit": ((0.0,) * 3, (1.0,) * 3)}


class NotRun(Exception):
    """This peer cannot run here; the message is the reason, for the table."""


def make_optimizer(recipe: Recipe, parameters, **options) -> torch.optim.Optimizer:
    """Returns the recipe's `torch.optim` optimiser; `options` such as `fused=True` go to it."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            **options,
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, **options)


def check_recipe(recipe: Recipe) -> None:
    """Raises `UserError` where a recipe asks for what these reference loops do not do."""
    plain = Recipe()
    names = ("augment", "schedule", "warmup_epochs", "clip_norm", "label_smoothing", "ema_decay")
    for name in names:
        if getattr(recipe, name) != getattr(plain, name):
            raise UserError(f"the PyTorch reference has no {name}; leave it at its default")


def allow_tf32(allowed: bool) -> None:
    """Says whether a GPU may round the factors of products and convolutions to TensorFloat-32. JAX
    does by default, PyTorch in convolutions only; timed, both do."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def full_float32():
    """No TensorFloat-32 inside: for losses that are compared."""
    allow_tf32(False)
    try:
        yield
    finally:
        allow_tf32(True)


class Trainer:
    """One training run: model, optimiser and where the images are.

    Args:
      recipe: hyper-parameters; of its fields model, normalize, batch_size, optimizer (with its
        settings) and precision matter here.
      images: uint8 [N, 32, 32, 3] to train on; labels: int [N].
      seed: for `torch.manual_seed`, before the weights are drawn.
      initial_state: a state dict to start from, in place of PyTorch's own initialisation.
      device: `cpu` or `cuda`.
      channels_last: memory format of weights and batches.
    """

    optimizer_options: ClassVar[dict] = {"fused": True}

    def __init__(
        self,
        recipe: Recipe,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int = 0,
        initial_state: dict[str, torch.Tensor] | None = None,
        device: str = "cpu",
        channels_last: bool = False,
    ):
        check_recipe(recipe)
        if device == "cuda" and not torch.cuda.is_available():
            raise NotRun("no GPU that PyTorch can use")
        if device == "cuda":
            allow_tf32(True)
            torch.backends.cudnn.benchmark = True  # convolutions chosen by measurement, as XLA's
        torch.manual_seed(seed)
        self.recipe, self.device, self.channels_last = recipe, device, channels_last
        self.model = lookup(MODELS, recipe.model, "model")()
        if initial_state is not None:
            # Running statistics may be left out: they start where PyTorch starts them.
            self.model.load_state_dict({**self.model.state_dict(), **initial_state})
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = self.model.to(device, memory_format=memory_format)
        self.optimizer = make_optimizer(recipe, self.model.parameters(), **self.optimizer_options)
        self.loss_function, self.sums_function = self.loss, self.sums
        self.training_data = self.place(images, labels)

    def place(self, images: np.ndarray, labels: np.ndarray):
        """Puts uint8 images and labels where the peer keeps them; `evaluate` takes the result."""
        raise NotImplementedError

    def run(self, order: Sequence[np.ndarray]) -> torch.Tensor:
        """Trains on each batch of indices in `order`; returns its losses, float32 [steps]."""
        raise NotImplementedError

    def batches(self, data, batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Placed images and labels, in order, in batches; the last may be smaller."""
        raise NotImplementedError

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 activations where the recipe asks for them."""
        if self.recipe.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        with self.autocast():
            return F.cross_entropy(self.model(images).float(), labels)

    def sums(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[sum of losses, correct in class 0, correct in class 1, ...], float32, on the device."""
        with self.autocast():
            logits = self.model(images).float()
        hit = (logits.argmax(1) == labels).float()
        by_class = torch.zeros(logits.shape[1], device=hit.device).index_add(0, labels, hit)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return torch.cat([loss.reshape(1), by_class])

    @torch.no_grad()
    def evaluate(self, data, batch_size: int) -> dict:
        """Returns loss (mean), accuracy, correct and per_class (correct) over placed `data`."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for images, labels in self.batches(data, batch_size):
            total = total + self.sums_function(images, labels)
            count += len(labels)
        self.model.train()
        loss, *per_class = total.tolist()
        correct = int(sum(per_class))
        return {
            "loss": loss / count,
            "accuracy": correct / count,
            "correct": correct,
            "per_class": [int(number) for number in per_class],
        }

    def sync(self) -> None:
        """Waits until the device has done everything asked of it."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class EagerTrainer(Trainer):
    """Normalised float32 tensors in memory, PyTorch's eager mode, fused optimiser."""

    def place(self, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = lookup(NORMALIZE, self.recipe.normalize, "normalization")
        mean, std = (torch.tensor(value, device=self.device) for value in (mean, std))
        pixels = torch.tensor(images, device=self.device).float()
        pixels = pixels.div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)
        if not self.channels_last:
            pixels = pixels.contiguous()
        return pixels, torch.tensor(labels, dtype=torch.int64, device=self.device)

    def batches(self, data, batch_size: int):
        images, labels = data
        return zip(images.split(batch_size), labels.split(batch_size), strict=True)

    def run(self, order: Sequence[np.ndarray]) -> torch.Tensor:
        images, labels = self.training_data
        sizes = [len(indices) for indices in order]
        # One copy to the device for all steps of a call, not one a step.
        flat = torch.tensor(np.concatenate(order), dtype=torch.int64, device=self.device)
        losses = [self.step(images[part], labels[part]) for part in flat.split(sizes)]
        return torch.stack(losses)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One update; returns the batch's loss without waiting for it."""
        loss = self.loss_function(images, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class CompileTrainer(EagerTrainer):
    """Eager, with forward, loss and backward compiled; `mode` is `torch.compile`'s."""

    mode: str | None = None

    def __init__(self, *args, **kwargs):
        if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            raise NotRun("torch.compile needs a C++ compiler")
        super().__init__(*args, **kwargs)
        if self.mode == "reduce-overhead" and self.device == "cpu":
            raise NotRun("reduce-overhead means CUDA graphs: on a CPU it is the default mode")
        # Programs belong to the code, not to this object: without a reset those of earlier
        # trainers would count towards the limit after which PyTorch gives up compiling.
        torch.compiler.reset()
        self.compiled_loss = torch.compile(self.loss, mode=self.mode, dynamic=False)
        self.sums_function = torch.compile(self.sums, mode=self.mode, dynamic=False)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # The short last batch of an epoch is not worth a second program.
        full = len(images) == self.recipe.batch_size
        self.loss_function = self.compiled_loss if full else self.loss
        if self.mode is not None and self.device == "cuda":
            # Those modes replay CUDA graphs, whose outputs the next replay overwrites.
            torch.compiler.cudagraph_mark_step_begin()
            return super().step(images, labels).clone()
        return super().step(images, labels)


class CompileMaxAutotuneTrainer(CompileTrainer):
    """`torch.compile` with its kernels chosen by measurement."""

    mode = "max-autotune"


class CompileReduceOverheadTrainer(CompileTrainer):
    """`torch.compile` with forward and backward replayed as CUDA graphs."""

    mode = "reduce-overhead"


class CudaGraphTrainer(EagerTrainer):
    """Gather, forward, backward and optimiser captured once as a CUDA graph.

    The order of a whole call lies on the device, and the graph itself counts its steps, so a
    step costs the host one launch.
    """

    optimizer_options: ClassVar[dict] = {"fused": True, "capturable": True}

    def __init__(self, recipe: Recipe, *args, device: str = "cuda", **kwargs):
        if device != "cuda" or not torch.cuda.is_available():
            raise NotRun("a CUDA graph needs a GPU")
        if recipe.optimizer == "sgd":
            # SGD keeps nothing on the host and has no such switch.
            self.optimizer_options = {"fused": True}
        super().__init__(recipe, *args, device=device, **kwargs)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capacity = 0

    def run(self, order: Sequence[np.ndarray]) -> torch.Tensor:
        size = self.recipe.batch_size
        full = [indices for indices in order if len(indices) == size]
        rest = order[len(full) :]
        if any(len(indices) == size for indices in rest):
            raise ValueError("only the last batch of a call may be short")
        if not full:
            return super().run(rest)
        if self.graph is None or len(full) > self.capacity:
            self.capture(len(full))
        indices = torch.tensor(np.stack(full), dtype=torch.int64, device=self.device)
        self.order[: len(full)] = indices
        self.position.zero_()
        for _ in full:
            self.graph.replay()
        losses = self.losses[: len(full)].clone()
        return torch.cat([losses, super().run(rest)]) if len(rest) else losses

    def capture(self, steps: int) -> None:
        """Records the step, leaving weights, optimiser and generator as they were."""
        self.capacity = steps
        self.order = torch.zeros(
            steps, self.recipe.batch_size, dtype=torch.int64, device=self.device
        )
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.losses = torch.zeros(steps, device=self.device)
        images, labels = self.training_data

        def step() -> None:
            indices = self.order.index_select(0, self.position)[0]
            loss = self.loss_function(images[indices], labels[indices])
            loss.backward()
            self.optimizer.step()
            self.losses.index_copy_(0, self.position, loss.detach().reshape(1))
            self.position.add_(1)

        weights = [weight.detach().clone() for weight in self.model.parameters()]
        kept = {name: value.clone() for name, value in self.optimizer_tensors().items()}
        random_state = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # cuDNN and cuBLAS make their workspaces before the capture
                self.position.zero_()
                self.optimizer.zero_grad(set_to_none=True)
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.position.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()
        # The graph writes gradients to its own memory; an eager step must not add to those.
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, value in zip(self.model.parameters(), weights, strict=True):
                weight.copy_(value)
            for name, value in self.optimizer_tensors().items():
                value.copy_(kept[name]) if name in kept else value.zero_()
        torch.cuda.set_rng_state(random_state)

    def optimizer_tensors(self) -> dict[tuple[int, str], torch.Tensor]:
        """The optimiser's state tensors by parameter number and name."""
        return {
            (number, name): value
            for number, weight in enumerate(self.model.parameters())
            for name, value in self.optimizer.state[weight].items()
            if torch.is_tensor(value)
        }
