"""The learning-rate range test: runs whose rate rises at every step from far too small to far too
large, and what the loss on the way says of the rate to take.

Smith 2017, "Cyclical learning rates for training neural networks" (arXiv:1506.01186), section 3.3.
The rate rises exponentially, and what is taken is a tenth of that of the lowest loss, as fastai's
`lr_find` has it ("minimum"). The loss is the mean of several seeds: batches of four images are too
noisy for one. Images that are learned by heart on the way keep a loss near 0 at any higher rate;
there the first rate counts that comes near it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cifar_jax import input_pipeline
from cifar_jax.parallel import programs
from cifar_jax.replicas.group import Group
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.progress import Progress
from cifar_jax.settings import Recipe
from cifar_jax.training.runs import Chunk

IMAGES = 10_000  # what a ramp sees by default, of each seed
LEAST_STEPS, MOST_STEPS = 100, 2_000
LOOK = 20  # steps between two looks at the losses
WIDTH = 0.02  # standard deviation of the smoothing, of the whole ramp
BELOW_LOWEST = 10.0
LEFT = 0.02  # of the way down, where the loss does not rise again
# The lowest loss must lie so many standard errors below where the ramp began.
CLEARLY = 5.0


def default_steps(batch_size: int) -> int:
    """Returns how many steps a ramp takes for such batches."""
    return min(max(-(-IMAGES // batch_size), LEAST_STEPS), MOST_STEPS)


def rates(low: float, high: float, steps: int) -> np.ndarray:
    """Returns the rate of each step, float64 [steps]. Raises `UserError` for no such ramp."""
    if not 0 < low < high < np.inf:
        raise UserError(f"--low {low:g} --high {high:g}: a ramp goes up, from above 0")
    if steps < LEAST_STEPS:
        raise UserError(f"--steps {steps} are too few to see a curve; give {LEAST_STEPS} or more")
    return np.geomspace(low, high, steps)


def held(recipe: Recipe) -> Recipe:
    """Returns the recipe with a rate that only the ramp changes."""
    return recipe.replace(schedule="constant", warmup_epochs=0.0)


def losses_along(group: Group, ramp: np.ndarray, bar: Progress) -> np.ndarray:
    """Trains every member along the ramp; returns the mean loss of each step's batch, float64
    [R, steps], of the steps until a loss is not finite, or is far above the first.

    Args:
      group: of runs whose step takes `learning_rate` (`setup.swept_step_of`), loaded.
      ramp: float [steps].
    """
    recipe, members = group.recipe, len(group.members)
    epochs = -(-len(ramp) // group.run.steps_per_epoch)
    orders = [
        np.concatenate(
            [
                input_pipeline.epoch_order(
                    m.keys["order"], epoch, m.training, recipe.batch_size, recipe.drop_last
                )
                for epoch in range(epochs)
            ]
        )
        for m in group.members
    ]
    batch_indices, alive = group.put(orders), np.ones(members, bool)
    metrics = group.place(programs.empty_metrics(members, len(ramp)))
    arrays = dataclasses.replace(group.begin(), step_metrics=metrics, best={})
    found = np.empty((members, 0))
    for begin in range(0, len(ramp), LOOK):
        end = min(begin + LOOK, len(ramp))
        for step in range(begin, end):
            rate = np.full(members, ramp[step], np.float32)
            group.hparams = group.place({"learning_rate": rate})
            chunk = Chunk(group.examples, batch_indices, step, step, 1)
            arrays = group.train(arrays, alive, chunk)
        seen = group.on_host(arrays.step_metrics)
        with np.errstate(invalid="ignore", divide="ignore"):  # a frozen run counts no images
            found = (seen["loss"] / seen["count"])[:, :end].astype(float)
        mean = found.mean(axis=0)
        bar.update((end - begin) * members * recipe.batch_size, loss=float(mean[-1]))
        over = ~(mean < 4 * mean[:LOOK].mean())  # a loss that is not a number too
        if over.any():
            return found[:, : int(np.argmax(over))]
    return found


def smoothed(values: np.ndarray, width: float) -> np.ndarray:
    """Returns the means of values [steps] under a Gaussian window of this standard deviation, in
    steps; at the ends the window is cut."""
    at = np.arange(len(values))
    window = np.exp(-0.5 * ((at[:, None] - at) / width) ** 2)
    return window @ values / window.sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a ramp says.

    Attributes:
      suggestion: the learning rate to take, two digits; None where `why` there is none.
      lowest_at: the rate of the lowest smoothed loss.
      lowest, first: that lowest loss, and the mean of the first tenth of the ramp.
      smooth: the smoothed mean loss, float64 [steps], of the steps taken.
      why: what is wrong and what to do, else "".
    """

    suggestion: float | None
    lowest_at: float
    lowest: float
    first: float
    smooth: np.ndarray
    why: str = ""


def read(losses: np.ndarray, ramp: Sequence[float]) -> Found:
    """Reads losses [R, steps taken] along a ramp [steps].

    Raises:
      UserError: hardly a step was taken: the lowest rate is far too high.
    """
    taken = losses.shape[1]
    early = len(ramp) // 10
    if taken < 2 * early:
        raise UserError(
            f"the loss explodes at a learning rate of {ramp[min(taken, len(ramp) - 1)]:.2g}: the "
            "ramp begins too high; give a smaller --low"
        )
    mean, width = losses.mean(axis=0), WIDTH * len(ramp)
    smooth = smoothed(mean, width)
    first, lowest = float(mean[:early].mean()), float(smooth.min())
    height = first - lowest
    best = int(np.argmin(smooth))
    if smooth[-1] < lowest + height / 2:
        best = int(np.argmax(smooth <= lowest + LEFT * height))
    # Of a mean under the window, which weighs 2 sqrt(pi) widths of independent steps.
    noise = float(mean[:early].std(ddof=1)) / np.sqrt(2 * np.sqrt(np.pi) * max(width, 1.0))
    lowest_at, why = float(ramp[best]), ""
    if height < CLEARLY * noise:
        why = (
            f"the loss does not fall clearly anywhere (from {first:.3f} to {lowest:.3f}): give "
            f"--steps {2 * len(ramp)}, or more --seeds"
        )
    elif best >= len(ramp) - early:
        why = f"the loss still falls at the highest rate, {lowest_at:.2g}: give a larger --high"
    suggestion = None if why else float(f"{lowest_at / BELOW_LOWEST:.2g}")
    return Found(suggestion, lowest_at, lowest, first, smooth, why)
