"""The steps: pure, undecorated functions from arrays to arrays.

They hold no jit, no mesh and no global state, so the same function runs under jit with
shardings, pmap, shard_map, vmap and scan; `cifar_jax.parallel.programs` is where that is applied.
A batch is `{"image": uint8 or float [B, H, W, 3], "label": int32 [B]}` with an optional
`"mask"` [B] (1 counts, 0 is padding). Metrics are sums under the mask and their count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.typing import ArrayLike

from cifar_jax import augment as augmentations
from cifar_jax import optimizers
from cifar_jax.microbatches import over_parts
from cifar_jax.models import init, mode, takes
from cifar_jax.models.layers import BY_EXAMPLE
from cifar_jax.ops import averaging
from cifar_jax.ops.all_reduce import sum_over
from cifar_jax.ops.cross_entropy import cross_entropy
from cifar_jax.runtime.errors import check_batched

Batch = Mapping[str, ArrayLike]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """All that a run carries from one step to the next.

    Attributes:
      step: int32 scalar, steps done so far.
      params: float32 weights.
      batch_stats: running statistics of batch normalisation, {} where there is none.
      opt_state: of the optax transformation, over the layers that are trained.
      key: typed PRNG key; step number n draws from `fold_in(key, n)`.
      ema_params: moving average of the weights, or None.
      ema_batch_stats: that of `batch_stats`, where `ema_params` is kept: averaged weights under
        the statistics of the last ones classify worse than either.
      collections: what else the model keeps, {collection: tree}; of it there is no average.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    key: jax.Array
    ema_params: Any = None
    ema_batch_stats: Any = None
    collections: dict[str, Any] = struct.field(default_factory=dict)


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    ema: bool = False,
    initial: dict | None = None,
    freeze: tuple[str, ...] = (),
) -> TrainState:
    """Returns the state before the first step.

    Args:
      key: typed PRNG key; it seeds the weights and every later draw.
      image_shape: (H, W, C) of the images the model will see.
      ema: whether to keep a moving average of the weights and of `batch_stats`.
      initial: variables {"params": {layer: ...}, "batch_stats", ...} that replace drawn ones; a
        layer that is not in it is drawn.
      freeze: prefixes of layers that are not trained; the optimizer keeps nothing for them.
    """
    init_key, run_key = jax.random.split(key)
    variables = init(model, init_key, jnp.zeros((1, *image_shape), jnp.float32))
    for name, given in (initial or {}).items():
        variables[name] = optimizers.merge_frozen(variables.get(name, {}), given)
    params, batch_stats = variables.pop("params"), variables.pop("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        collections=variables,
        opt_state=optimizer.init(optimizers.split_frozen(params, freeze)[0]),
        key=run_key,
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        ema_batch_stats=jax.tree.map(jnp.copy, batch_stats) if ema else None,
    )


def parameter_count(params: Any) -> int:
    """Returns how many numbers a tree of parameters (arrays or their shapes) holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def make_preprocess(
    normalization: str = "half",
    augment: tuple[str, ...] = (),
    precision: str = "float32",
    resize: int = 0,
    steps_per_epoch: int = 1,
    **sizes: int,
) -> Callable[..., jax.Array]:
    """Returns `preprocess(images, key=None, first_example=0, of_run=None)`: images [B, H, W, C]
    normalised, augmented if there is a key, and resized to `resize` x `resize` unless that is 0.

    Args:
      steps_per_epoch: for augmentations that know the epoch (`augment.BY_RUN`): `of_run` is
        (`TrainState.key`, the step, the images' positions in the data set).
      **sizes: `translate_pixels` and `cutout_size` of `augment.augment`.
    """
    dtype = jnp.dtype(precision)

    def preprocess(images, key=None, first_example=0, of_run=None):
        images = augmentations.normalize(images, normalization, jnp.float32 if resize else dtype)
        if key is not None and augment:
            if of_run is not None:
                run_key, step, index = of_run
                of_run = augmentations.OfRun(run_key, step // steps_per_epoch, index)
            images = augmentations.augment(
                images, augment, key, first_example, of_run=of_run, **sizes
            )
        return augmentations.resize(images, resize).astype(dtype) if resize else images

    return preprocess


def step_keys(key: jax.Array, step: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the keys of step number `step` of a run with this `TrainState.key`: of dropout by
    example, of `preprocess`, and of the streams that other modules draw from."""
    key = jax.random.fold_in(key, step)
    return tuple(jax.random.fold_in(key, i) for i in range(3))


def _mask(batch: Batch) -> jax.Array:
    mask = batch.get("mask")
    return jnp.ones(batch["label"].shape, jnp.float32) if mask is None else mask.astype(jnp.float32)


def _sums(logits, labels, mask, losses) -> Metrics:
    mask = mask.astype(losses.dtype)
    hits = (logits.argmax(axis=-1).astype(labels.dtype) == labels).astype(losses.dtype)
    return {"loss": (losses * mask).sum(), "correct": (hits * mask).sum(), "count": mask.sum()}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocess: Callable[..., jax.Array] | None = None,
    mix: Callable[..., augmentations.Mixed] | None = None,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    lookahead: tuple[int, int] = (0, 0),
    freeze: tuple[str, ...] = (),
    loss_reduction: str = "mean",
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean loss over the unmasked images of the global batch, or on its
    sum, as `loss_reduction` says.

    A batch may come in parts: those of `accumulate`, and of the devices under `axis_name`. This
    package's `Dropout` draws for each image what it draws in the whole batch. Whatever else in a
    module asks for random numbers, flax's `nn.Dropout` for one, gets a key of its own in each
    part: the draws are then independent for every image, but depend on how the batch is cut.
    Besides `dropout` the streams have one source, flax's `params`, which `make_rng` falls back on
    for any name (`has_rng` does not know of it).

    All collections of the model but its parameters are mutable here and read-only in evaluation.
    They go from part to part of `accumulate`; over an axis their floats are averaged, and anything
    else is as on the first device. Flax's `nn.BatchNorm` normalises every part by itself, this
    package's only those of `accumulate`.

    Args:
      optimizer: also one whose `update` takes `value`, which is the mean loss of the global batch
        (`optax.contrib.reduce_on_plateau`, `optax.polyak_sgd`); line searches, which evaluate
        the loss anew by `value_fn`, are not supported.
      preprocess: from `make_preprocess`; the default is norm 0.5 without augmentation. It is
        called with the images of a part, the step's key, which is that of every part, and the
        position of the first in the global batch; and, where it takes `of_run` and the batch has
        an `index` (int32 [B], positions in the data set), with what `make_preprocess` says.
      mix: from `augment.mixer`, of a part's images after `preprocess`; the loss is then that of the
        mixed targets, and `correct` counts the label of an image's larger share.
      ema_decay: of the moving averages, if the state has them; smaller in the first steps
        (`averaging.moved`).
      lookahead: (steps between two returns to the averages, steps of the run), which then move as
        `averaging.looked_ahead` says and not by `ema_decay`; (0, ...) for none.
      freeze: as given to `create_state`. Batch normalisation in a frozen layer goes on with the
        batch's statistics and updates the running ones, as under PyTorch's `requires_grad_(False)`.
      accumulate: parts the batch is cut into, one after another: the same step in less memory
        (`microbatches.over_parts`).
      axis_name: under pmap or shard_map, the axis the batch is split over: gradients, metrics
        and random draws are then those of the global batch.

    Returns:
      The next state, and sums over the global batch: `loss` (nats), `correct`, `count`.

    Raises:
      UserError: images without a batch axis.
    """
    check_batched(batch["image"])
    kept = {name: batch[name] for name in ("image", "label", "index") if name in batch}
    batch = {**kept, "mask": _mask(batch)}
    preprocess = preprocess or make_preprocess()
    if takes(preprocess, "of_run") and "index" in batch:
        preprocess = functools.partial(_with_run, preprocess, state.key, state.step)
    else:
        preprocess = functools.partial(_without_run, preprocess)
    params, model, first_example = _on_device(state.params, model, batch, axis_name)
    gradients = functools.partial(
        _gradients,
        *optimizers.split_frozen(params, freeze),
        step_keys(state.key, state.step),
        model=model,
        preprocess=preprocess,
        mix=mix,
        label_smoothing=label_smoothing,
    )
    if accumulate != 1:
        gradients = functools.partial(over_parts, gradients, accumulate, axis_name)
    carried = {**state.collections, "batch_stats": state.batch_stats}
    (grads, sums), carried = gradients(batch, carried, first_example)
    if axis_name is not None:
        grads, sums, carried = _over_devices(grads, sums, carried, axis_name)
    batch_stats = carried.pop("batch_stats")
    count = jnp.maximum(sums["count"], 1)
    if loss_reduction == "mean":
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    trained, frozen = optimizers.split_frozen(state.params, freeze)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        grads, state.opt_state, trained, value=sums["loss"] / count
    )
    trained = optax.apply_updates(trained, updates)
    ema_params, ema_batch_stats = state.ema_params, state.ema_batch_stats
    if ema_params is not None:
        averages = optimizers.split_frozen(ema_params, freeze)[0], ema_batch_stats
        if lookahead[0]:
            new = (trained, batch_stats)
            averages, new = averaging.looked_ahead(averages, new, state.step, *lookahead)
            trained, batch_stats = new
        else:
            averages = averaging.moved(averages, (trained, batch_stats), ema_decay, state.step)
        ema_params, ema_batch_stats = optimizers.merge_frozen(averages[0], frozen), averages[1]
    state = state.replace(
        step=state.step + 1,
        params=optimizers.merge_frozen(trained, frozen),
        batch_stats=batch_stats,
        collections=carried,
        opt_state=opt_state,
        ema_params=ema_params,
        ema_batch_stats=ema_batch_stats,
    )
    return state, sums


def one_then_other(
    first: Callable, then: Callable, steps: int, state: TrainState, *arguments
) -> tuple[TrainState, Metrics]:
    """Takes a step that is `first` in the first `steps` steps of a run and `then` after them.

    Both take and return what `train_step` does and may differ in what they make of the images. One
    of them is computed; mapped by `vmap` over runs, both are.
    """
    return lax.cond(state.step < steps, first, then, state, *arguments)


def _with_run(preprocess, run_key, step, batch, key, first_example):
    of_run = (run_key, step, batch["index"])
    return preprocess(batch["image"], key, first_example, of_run=of_run)


def _without_run(preprocess, batch, key, first_example):
    return preprocess(batch["image"], key, first_example)


def _on_device(params, model: nn.Module, batch: Batch, axis_name: str | None):
    """Returns the parameters and the model as one device of the axis uses them, and the position
    of its first image in the global batch."""
    first_example = jnp.zeros((), jnp.int32)
    if axis_name is not None:
        first_example = lax.axis_index(axis_name).astype(jnp.int32) * batch["label"].shape[0]
        # Under shard_map the gradient of a replicated value is summed over the axis already;
        # marked as varying it stays local, and the one psum below is right everywhere.
        params = lax.pcast(params, axis_name, to="varying")
        if hasattr(model, "axis_name"):  # normalises over the batch
            model = model.clone(axis_name=axis_name)
    return params, model, first_example


def _gradients(
    trained, frozen, keys, batch, carried, first_example, *, model, preprocess, mix, label_smoothing
):
    """Returns ((gradients by `trained`, metrics), collections), sums over one part of a batch."""
    dropout_key, preprocess_key, foreign_key = keys
    part = jax.random.fold_in(foreign_key, first_example)
    rngs = {
        BY_EXAMPLE: dropout_key,
        "dropout": jax.random.fold_in(part, 0),
        "params": jax.random.fold_in(part, 1),
    }
    position = {"first_example": first_example, "mask": batch["mask"]}
    images = preprocess(batch, preprocess_key, first_example)
    labels, loss_of = batch["label"], functools.partial(cross_entropy, smoothing=label_smoothing)
    if mix is not None:
        images, partner, share = mix(images, preprocess_key, first_example, batch["mask"])
        loss_of = functools.partial(_mixed_loss, loss_of, labels, labels[partner], share)
        labels = jnp.where(share >= 0.5, labels, labels[partner])

    def loss_fn(trained):
        params = optimizers.merge_frozen(trained, frozen)
        logits, updates = model.apply(
            {"params": params, **carried, "position": position},
            images,
            **mode(model, train=True),
            rngs=rngs,
            mutable=list(carried),
        )
        if logits.dtype.itemsize < 4:
            logits = logits.astype(jnp.float32)
        sums = _sums(logits, labels, batch["mask"], loss_of(logits, labels))
        return sums["loss"], (sums, {name: updates.get(name, {}) for name in carried})

    grads, (sums, carried) = jax.grad(loss_fn, has_aux=True)(trained)
    return (grads, sums), carried


def _mixed_loss(loss_of, first, second, share, logits, _):
    """Returns the cross-entropy with mixed targets, which is linear in them."""
    share = share.astype(logits.dtype)
    return share * loss_of(logits, first) + (1 - share) * loss_of(logits, second)


def _over_devices(grads, sums, carried, axis_name: str):
    """Adds up gradients and metrics over the axis; the collections' floats become their mean,
    anything else in them what the first device has."""
    first, devices = lax.axis_index(axis_name) == 0, lax.axis_size(axis_name)

    def is_float(x) -> bool:
        return jnp.issubdtype(x.dtype, jnp.inexact)

    parts = jax.tree.map(lambda x: x if is_float(x) else jnp.where(first, x, 0), carried)
    grads, sums, parts = sum_over((grads, sums, parts), axis_name)
    carried = jax.tree.map(
        lambda x, part: part / devices if is_float(x) else part.astype(x.dtype), carried, parts
    )
    return grads, sums, carried


def inference_variables(state: TrainState) -> dict:
    """Returns the variables to evaluate: the averaged ones where they are kept."""
    params, batch_stats = state.ema_params, state.ema_batch_stats
    if params is None:
        params, batch_stats = state.params, state.batch_stats
    return {"params": params, "batch_stats": batch_stats, **state.collections}


def predict_step(
    variables: dict,
    images: ArrayLike,
    *,
    model: nn.Module,
    preprocess: Callable[..., jax.Array] | None = None,
    tta: str = "none",
) -> jax.Array:
    """Returns float32 logits [B, C] of images [B, H, W, 3], dropout off; with `tta` their mean over
    the views of `augment.views`.

    Raises:
      UserError: images without a batch axis.
    """
    check_batched(images)
    preprocess = preprocess or make_preprocess()

    def logits_of(images):
        logits = model.apply(variables, images, **mode(model, train=False))
        return logits.astype(jnp.float32)

    if tta == "none":
        return logits_of(preprocess(images))
    views, weights = augmentations.views(preprocess(images), tta)
    return jnp.tensordot(jnp.array(weights, jnp.float32), lax.map(logits_of, views), 1)


def eval_step(
    variables: dict,
    batch: Batch,
    *,
    model: nn.Module,
    preprocess: Callable[..., jax.Array] | None = None,
    tta: str = "none",
    axis_name: str | None = None,
) -> Metrics:
    """Returns sums over the unmasked images: `loss` (nats), `correct`, `count`, and `confusion`
    [C, C] int32, whose entry (i, j) counts images of class i taken for j."""
    logits = predict_step(variables, batch["image"], model=model, preprocess=preprocess, tta=tta)
    labels, mask = batch["label"], _mask(batch)
    sums = _sums(logits, labels, mask, cross_entropy(logits, labels))
    classes = jnp.arange(logits.shape[-1])
    is_true = (labels[:, None] == classes[None]) & (mask[:, None] > 0)
    is_taken = logits.argmax(axis=-1)[:, None] == classes[None]
    sums["confusion"] = (is_true[:, :, None] & is_taken[:, None, :]).sum(axis=0, dtype=jnp.int32)
    return sums if axis_name is None else lax.psum(sums, axis_name)
