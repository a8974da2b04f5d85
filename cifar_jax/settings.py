"""`Recipe`: every setting that makes a run what it is, apart from its seed and its data.

A setting is defined here once: its default, what it is, and which values it takes. `--help`, the
check and the table of docs/recipes.md follow from that.
"""

from __future__ import annotations

import dataclasses
import math

from cifar_jax.runtime.errors import UserError, nearest

OPTIMIZER_NAMES = ("adam", "adamw", "muon", "sgd")
SCHEDULE_NAMES = ("constant", "cosine", "linear", "onecycle", "step")
TO_THE_END = (
    "cosine",
    "linear",
    "onecycle",
)  # schedules whose rates depend on the number of epochs
PRECISIONS = ("float32", "bfloat16")
TTA_NAMES = ("none", "mirror", "mirror-shift")


def setting(
    default,
    text: str,
    *,
    low: float | None = None,
    high: float = math.inf,
    above: float | None = None,
    choices: tuple[str, ...] = (),
):
    """Returns a field of `Recipe`: what `--help`, the docstring, the README's table and the check
    know of it.

    Args:
      default: its value, of the field's type, where a recipe does not say.
      text: what it is, in one line.
      low, above, high: a number is at least `low`, or greater than `above`, and at most `high`.
      choices: the names it may be; () where `check` does not know them.
    """
    about = {"text": text, "low": low, "above": above, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One run's settings. Fields are plain values, so a recipe is also its JSON."""

    model: str = setting(
        "tutorial_cnn", "network; picks its own published recipe; or your own, mynet.py:Net"
    )
    model_option: tuple[str, ...] = setting((), "name=value: what the network is made with")
    dataset: str = setting(
        "cifar10",
        "cifar10, cifar100, shapes10, any prepared tfds set of images, folder:PATH or npz:FILE",
    )
    normalize: str = setting(
        "half", "half ([-1, 1]), unit ([0, 1]), cifar10 or imagenet statistics"
    )
    augment: tuple[str, ...] = setting(
        (),
        "transforms of training images, in order: alternating_flip, cutout, flip, translate; after "
        "these, of the batch: mixup, cutmix",
    )
    translate_pixels: int = setting(
        4, "largest shift of translate, each way, in pixels", low=1, high=1024
    )
    cutout_size: int = setting(8, "side of the square of cutout, in pixels", low=1, high=4096)
    mixup_alpha: float = setting(
        1.0, "of mixup: an image's share is drawn from Beta(alpha, alpha)", low=0.01, high=100
    )
    cutmix_alpha: float = setting(
        1.0, "of cutmix: likewise, the share of the area", low=0.01, high=100
    )
    validation_fraction: float = setting(
        0.0, "share of the training images held out at random", low=0, high=0.95
    )
    epochs: int = setting(2, "passes over the training images", low=1, high=100_000)
    batch_size: int = setting(
        4, "images in a step; an epoch's last may hold fewer", low=1, high=1_000_000
    )
    drop_last: bool = setting(False, "leave out an epoch's last batch where it holds fewer")
    eval_batch_size: int = setting(
        500, "images in an evaluation batch (results do not depend on it)", low=1, high=1_000_000
    )
    optimizer: str = setting(
        "sgd",
        "sgd, adam, adamw, or muon: convolutions by Muon, all other layers by sgd",
        choices=OPTIMIZER_NAMES,
    )
    learning_rate: float = setting(0.001, "peak rate of the schedule", low=0, high=1000)
    momentum: float = setting(
        0.0, "of sgd; 0 is plain SGD, and adam ignores it", low=0, high=0.99999
    )
    muon_momentum: float = setting(0.6, "momentum of what muon trains", low=0, high=0.99999)
    nesterov: bool = setting(False, "Nesterov's form of the momentum")
    rescale_filters: bool = setting(
        False, "before each step, scale a convolution's kernel to norm sqrt(output channels)"
    )
    weight_decay: float = setting(
        0.0,
        "added to the gradient by sgd and adam, decoupled in adamw, none of what muon trains",
        low=0,
        high=10,
    )
    decay_scale: tuple[str, ...] = setting((), "prefix=factor: layers with another weight decay")
    loss_reduction: str = setting(
        "mean",
        "mean or sum: over the batch, of the loss whose gradient is taken",
        choices=("mean", "sum"),
    )
    schedule: str = setting(
        "constant", "constant, cosine, linear, onecycle or step", choices=SCHEDULE_NAMES
    )
    warmup_epochs: float = setting(
        0.0, "linear warm-up from warmup_factor times the peak", low=0, high=100_000
    )
    warmup_factor: float = setting(0.0, "share of the peak a warm-up starts at", low=0, high=1)
    end_factor: float = setting(0.0, "share of the peak the linear schedule ends at", low=0, high=1)
    step_epochs: float = setting(
        10.0, "epochs between two drops of the step schedule", above=0, high=100_000
    )
    step_factor: float = setting(0.1, "factor of such a drop", above=0, high=1)
    clip_norm: float = setting(0.0, "largest global gradient norm; 0 is off", low=0, high=1e6)
    label_smoothing: float = setting(
        0.0, "share of the target spread over all classes", low=0, high=0.999
    )
    ema_decay: float = setting(
        0.0,
        "moving average of weights and statistics, evaluated in their place; 0 is off",
        low=0,
        high=0.999999,
    )
    select_best: bool = setting(
        False, "test the weights of the lowest validation loss, not the last ones"
    )
    patience: int = setting(
        0,
        "epochs without a new lowest validation loss after which a run ends; 0 is off",
        low=0,
        high=100_000,
    )
    log_every: int = setting(
        0, "steps between two printed mean losses; 0 is once an epoch", low=0, high=1_000_000_000
    )
    fold: bool = setting(
        True, "vgg16: train the first linear layer folded where that is exact (models/fold.py)"
    )
    precision: str = setting(
        "float32", "float32, or bfloat16 activations over float32 weights", choices=PRECISIONS
    )
    resize: int = setting(
        0, "side in pixels to which images are resized on the device; 0 is off", low=0, high=4096
    )
    low_resolution: str = setting(
        "none",
        "side:share, as 24:0.4: the first share of the steps sees images of so many pixels a side",
    )
    freeze: tuple[str, ...] = setting((), "beginnings of names of layers that are not trained")
    rate_scale: tuple[str, ...] = setting((), "prefix=factor: layers with another learning rate")
    rate_epochs: tuple[str, ...] = setting(
        (), "prefix=epochs: layers whose schedule is that of so many epochs; then their rate is 0"
    )
    stop_epochs: tuple[str, ...] = setting(
        (), "prefix=epochs: layers that are trained for the first so many epochs only"
    )
    lookahead: int = setting(
        0,
        "steps between two returns to a slow average of weights and statistics; 0 is off",
        low=0,
        high=1_000_000,
    )
    whitening_images: int = setting(
        0,
        "training images whose patches give the kernel of a whitening layer; 0 draws it",
        low=0,
        high=100_000_000,
    )
    tta: str = setting(
        "none",
        "test-time augmentation: none, mirror, or mirror-shift; the mean of the views' logits",
        choices=TTA_NAMES,
    )
    accumulate: int = setting(
        1, "microbatches of a step, one after another, for small memories", low=1, high=1_000_000
    )
    remat: bool = setting(
        False, "compute activations again in the backward pass, for small memories"
    )

    def __post_init__(self):
        check(self)

    def replace(self, **changes) -> Recipe:
        """Returns a copy with `changes`. Raises `UserError` on unknown fields or bad values."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise UserError(f"unknown recipe field {name!r}; {nearest(name, names)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Returns the fields as JSON-ready values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict) -> Recipe:
        """Returns the recipe that `to_dict` wrote. Raises `UserError` on unknown fields."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls().replace(**values | lists)

    @property
    def rate_scales(self) -> dict[str, float]:
        """`rate_scale` as {prefix: factor}. Raises `UserError` where an entry is none."""
        return dict(_rate_scale(entry) for entry in self.rate_scale)

    @property
    def decay_scales(self) -> dict[str, float]:
        """`decay_scale`, likewise."""
        return dict(_prefixed("--decay-scale", e, "head=0.1") for e in self.decay_scale)

    @property
    def rates_epochs(self) -> dict[str, float]:
        """`rate_epochs`, likewise."""
        return dict(_prefixed("--rate-epochs", e, "head=3", above=0) for e in self.rate_epochs)

    @property
    def stops_epochs(self) -> dict[str, float]:
        """`stop_epochs`, likewise."""
        return dict(_prefixed("--stop-epochs", e, "head=3", above=0) for e in self.stop_epochs)

    @property
    def low_resolution_first(self) -> tuple[int, float]:
        """`low_resolution` as (side, share of the steps), (0, 0) for none. Raises `UserError` where
        it is neither."""
        if self.low_resolution == "none":
            return 0, 0.0
        side, _, share = self.low_resolution.partition(":")
        try:
            found = int(side), float(share)
        except ValueError:
            found = 0, 0.0
        if not (1 <= found[0] <= 4096 and 0 < found[1] < 1):
            raise UserError(
                "--low-resolution takes a side in pixels and a share of the steps between 0 and 1, "
                f"as 24:0.4, or none; got {self.low_resolution!r}"
            )
        return found


def option_of(name: str) -> str:
    """Returns the command-line option of a field: `--batch-size` of `batch_size`."""
    return f"--{name.replace('_', '-')}"


Recipe.__doc__ += "\n\n    Attributes:\n" + "\n".join(
    f"      {field.name}: {field.metadata['text']}." for field in dataclasses.fields(Recipe)
)


def settings_table() -> str:
    """Returns the Markdown table of all settings, as docs/recipes.md holds it."""
    rows = ["| option | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(Recipe):
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        shown = ",".join(map(str, default)) or "none"
        rows.append(f"| `{option_of(field.name)}` | {shown} | {field.metadata['text']} |")
    return "\n".join(rows)


def _prefixed(option: str, entry: str, example: str, *, above: float = -1.0) -> tuple[str, float]:
    """Parses `prefix=number`: at least 0, or greater than `above`, and at most 100,000."""
    prefix, _, number = entry.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not prefix or math.isnan(value):
        what = f"prefix={'epochs' if option.endswith('epochs') else 'factor'}"
        raise UserError(f"{option} takes {what}, as {example}; got {entry!r}")
    if not max(above, 0) <= value <= 100_000 or value == above:
        bound = "at least 0" if above < 0 else f"above {above:g}"
        raise UserError(f"{option} {entry}: the number must be {bound} and at most 100000")
    return prefix, value


def _rate_scale(entry: str) -> tuple[str, float]:
    prefix, value = _prefixed("--rate-scale", entry, "features=0.1")
    if not 0 < value <= 1000:
        raise UserError(
            f"--rate-scale {entry}: the factor must be above 0 and at most 1000; "
            f"for layers that are not to be trained there is --freeze {prefix}"
        )
    return prefix, value


def _check_number(field: dataclasses.Field, value) -> None:
    option, about = option_of(field.name), field.metadata
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise UserError(f"{option} must be a number, got {value!r}")
    if field.type == "int" and not isinstance(value, int):
        raise UserError(f"{option} must be a whole number, got {value!r}")
    least, bound = (
        ("at least", about["low"]) if about["above"] is None else ("above", about["above"])
    )
    too_low = value < bound if about["above"] is None else value <= bound
    if too_low or value > about["high"]:
        raise UserError(
            f"{option} must be {least} {bound} and at most {about['high']:g}, got {value}"
        )


def check(recipe: Recipe) -> None:
    """Raises `UserError` naming the first field whose value cannot be meant."""
    fields = dataclasses.fields(recipe)
    for field in fields:
        if field.type in ("int", "float"):
            _check_number(field, getattr(recipe, field.name))
    for field in fields:
        value, choices = getattr(recipe, field.name), field.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"unknown {field.name} {value!r}; {nearest(value, choices)}")
    if recipe.nesterov and (recipe.optimizer not in ("sgd", "muon") or recipe.momentum == 0):
        raise UserError("--nesterov needs --optimizer sgd or muon and a --momentum above 0")
    if recipe.select_best and recipe.validation_fraction == 0:
        raise UserError("--select-best needs validation images: set --validation-fraction")
    if recipe.patience and recipe.validation_fraction == 0:
        raise UserError("--patience needs validation images: set --validation-fraction")
    for name, found in (
        ("rate_scale", recipe.rate_scales),
        ("decay_scale", recipe.decay_scales),
        ("rate_epochs", recipe.rates_epochs),
        ("stop_epochs", recipe.stops_epochs),
    ):
        given = getattr(recipe, name)
        if len(found) < len(given):
            raise UserError(f"{option_of(name)} {','.join(given)} names a prefix twice")
    both = sorted(recipe.rates_epochs.keys() & recipe.stops_epochs.keys())
    if both:
        raise UserError(f"--rate-epochs and --stop-epochs both name {both[0]}; give one of them")
    _ = recipe.low_resolution_first
    if recipe.lookahead and recipe.ema_decay:
        raise UserError("--lookahead keeps an average of its own: leave --ema-decay away")
    if recipe.accumulate > recipe.batch_size:
        raise UserError(
            f"--accumulate {recipe.accumulate} cuts finer than --batch-size {recipe.batch_size}"
        )
    if recipe.warmup_epochs > recipe.epochs:
        raise UserError(
            f"--warmup-epochs {recipe.warmup_epochs:g} is longer than --epochs {recipe.epochs}"
        )


def parse_names(text: str) -> tuple[str, ...]:
    """Parses `a,b` or nothing into a tuple of names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
