"""The run directory: what a run is, on disk, and when a directory may be used for it.

config.json      recipe, seed, data set: what must be equal to go on
metrics.jsonl    one row a window, an epoch, the test
summary.json     written at the end
checkpoints/     newest and best
code/            the file of a network of the user's own
plots/           pictures
predictions.npz  probabilities of the test images, and of validation's (`reporting/predictions.py`)
report.html      one page about the run

Of several runs at once (`--seeds`), the directory holds `config.json`, `summary.json` and `plots/`
of all of them together, `seed-<n>/`, each the directory of an ordinary run, and until these are
written `groups/`, what it takes to go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from cifar_jax.checkpoints.manifests import latest_step
from cifar_jax.models import own
from cifar_jax.models.own import Code
from cifar_jax.runtime import files
from cifar_jax.runtime.errors import ReaderLeft, UserError, notice
from cifar_jax.runtime.files import write_json
from cifar_jax.settings import TO_THE_END, Recipe

FORMAT = 1
_OWN_NAMES = (
    *("config.json", "metrics.jsonl", "summary.json", "checkpoints", "plots", "tensorboard"),
    *("predictions.npz", "predictions.csv", "report.html"),
    *("probabilities.npy", "results.csv", "groups", "log_id", "wandb", own.COPIES),
)
_OWN_PATTERN = "seed-*"


@dataclasses.dataclass(frozen=True)
class Config:
    """What makes a run: with equal configs, weights and metrics are equal.

    Attributes:
      recipe_name: the entry of `RECIPES` it started from.
      recipe: all its settings, overrides included.
      seed: of weights, split, order, dropout and augmentation.
      dataset: `name`, `version`, `fingerprint`, `class_names`, `image_shape` and `sizes` (images
        by split) of the data, and `test_fraction` where its test split was held out of `train`.
      seeds: of a directory of several runs, all their seeds (`seed` is the first); else empty.
      axes: of a sweep, which settings it varies and how; else None.
      init_from: of the weights it starts from where they are not drawn (`init_from.Initial`):
        `source`, `sha256`, `redrawn`; else None. Their content counts, not where they lay.
      code: the file of a network of the user's own, else None; likewise.
    """

    recipe_name: str
    recipe: Recipe
    seed: int
    dataset: dict
    init_from: dict | None = None
    seeds: tuple[int, ...] = ()
    axes: dict | None = None
    code: Code | None = None

    @property
    def training_images(self) -> int:
        """Images of the training split that are not held out for validation."""
        size = self.dataset["sizes"]["train"]
        return size - round(size * self.recipe.validation_fraction)

    @property
    def steps_per_epoch(self) -> int:
        if self.recipe.drop_last:
            return self.training_images // self.recipe.batch_size
        return -(-self.training_images // self.recipe.batch_size)

    @property
    def images_per_epoch(self) -> int:
        """Images of an epoch's steps."""
        return min(self.training_images, self.steps_per_epoch * self.recipe.batch_size)

    def to_dict(self) -> dict:
        """Returns the contents of config.json."""
        return {
            "format": FORMAT,
            "recipe_name": self.recipe_name,
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "dataset": self.dataset,
            **({"init_from": self.init_from} if self.init_from else {}),
            **({"seeds": list(self.seeds)} if self.seeds else {}),
            **({"axes": self.axes} if self.axes else {}),
            **({"code": dataclasses.asdict(self.code)} if self.code else {}),
        }


def describe_data(dataset) -> dict:
    """Returns the part of a config that says which data a run is about."""
    return {
        "name": dataset.name,
        "version": dataset.version,
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.splits["train"].images.shape[1:]),
        "sizes": {name: len(split) for name, split in dataset.splits.items()},
        **({"test_fraction": dataset.test_fraction} if dataset.test_fraction else {}),
    }


def config_of_seeds(
    name: str, recipe: Recipe, dataset, seeds: tuple[int, ...], axes: dict | None = None
) -> Config:
    """Returns the config of runs of one recipe, a seed each, with the code of its network."""
    data, code = describe_data(dataset), own.code_of(recipe.model)
    return Config(name, recipe, seeds[0], data, seeds=seeds, code=code, axes=axes)


def write_config(path: Path, config: Config) -> None:
    """Writes `config.json`, and the copy of a network of the user's own before it."""
    own.keep_copy(config.code, path)
    write_json(path / "config.json", config.to_dict())


def read_config(path: Path) -> Config:
    """Returns the config of the run directory `path`. Raises `UserError` where there is none."""
    file = Path(path) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a run directory: it has no config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); the run cannot go on from it") from None
    try:
        if values["format"] != FORMAT:
            raise UserError(f"{file} has format {values['format']}, this version reads {FORMAT}")
        recipe = Recipe.from_dict(values["recipe"])
        config = Config(values["recipe_name"], recipe, values["seed"], values["dataset"])
        config = dataclasses.replace(
            config,
            init_from=values.get("init_from"),
            seeds=tuple(values.get("seeds", ())),
            axes=values.get("axes"),
            code=own.Code(**values["code"]) if values.get("code") else None,
        )
        if own.is_own(recipe.model) != (config.code is not None):
            raise ValueError("code")
        _check_init(config.init_from)
        _check_data(config.dataset)
        return config
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__} {error}") from None


def _check_data(data: dict) -> None:
    """Raises one of Python's errors where `data` is not what `describe_data` returns."""
    numbers = [*data["sizes"].values(), *data["image_shape"], data["sizes"]["train"]]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError("a size in it is no positive whole number")
    if len(data["image_shape"]) != 3 or not all(isinstance(n, str) for n in data["class_names"]):
        raise ValueError("image_shape or class_names")
    if not isinstance(data["name"], str) or not isinstance(data.get("test_fraction", 0.0), float):
        raise ValueError("name or test_fraction")


def _check_init(init: dict | None) -> None:
    """Raises ValueError where `init` is not what `init_from.load` records."""
    if init is not None and not all(isinstance(init[n], str) for n in ("source", "sha256")):
        raise ValueError("init_from")


def _shown_init(init: dict | None) -> str:
    return f"{init['source']} (sha256 {init['sha256'][:12]})" if init else "none"


def _shown_seeds(config: Config) -> str:
    return show_seeds(config.seeds) if config.seeds else str(config.seed)


def _shown_axes(axes: dict | None) -> str:
    return ", ".join(f"{name} {text}" for name, text in axes.items()) if axes else "none"


def show_seeds(seeds: Sequence[int]) -> str:
    """Returns seeds as `--seeds` takes them: `0:32` where they follow one another."""
    first, last = seeds[0], seeds[-1]
    if list(seeds) == list(range(first, last + 1)):
        return f"{first}:{last + 1}"
    return ",".join(map(str, seeds))


def differences(old: Config, new: Config) -> list[str]:
    """Returns one `name: old -> new` for each setting in which two runs differ."""
    found = []
    before, after = old.to_dict(), new.to_dict()
    for group in ("recipe", "dataset"):
        for name in sorted(before[group].keys() | after[group].keys()):
            a, b = before[group].get(name), after[group].get(name)
            if a != b:
                shown = f"{a} -> {b}" if len(f"{a}{b}") < 120 else "differs"
                found.append(f"{'data set ' if group == 'dataset' else ''}{name}: {shown}")
    was, now = old.init_from or {}, new.init_from or {}
    if was.get("sha256") != now.get("sha256"):
        shown = f"{_shown_init(old.init_from)} -> {_shown_init(new.init_from)}"
        found.append(f"init_from: {shown}")
    if (old.code and old.code.sha256) != (new.code and new.code.sha256):
        found.append(f"the file of {new.recipe.model} has changed")
    if (old.seeds or old.seed) != (new.seeds or new.seed):
        found.append(f"seed: {_shown_seeds(old)} -> {_shown_seeds(new)}")
    if old.axes != new.axes:
        found.append(f"axes: {_shown_axes(old.axes)} -> {_shown_axes(new.axes)}")
    return found


def check_goes_on(path: Path, old: Config, new: Config) -> None:
    """Raises `UserError` unless the run `new` may go on from what the run `old` left in `path`:
    they are equal, or differ in epochs alone and `new` began as `old` did."""
    found, epochs = differences(old, new), new.recipe.epochs
    instead = "Name another --workdir, or give --overwrite to start anew"
    if not found:
        return
    if len(found) > 1 or epochs == old.recipe.epochs:
        raise UserError(f"{path} holds another run; {'; '.join(found)}. {instead}")
    trained, why = (latest_step(path / "checkpoints") or 0) / new.steps_per_epoch, None
    if new.seeds:
        why = "of several runs (--seeds) the state to go on from is removed as they are done"
    elif trained > epochs:
        why = f"it is trained for {trained:.4g} epochs already"
    elif new.recipe.schedule in TO_THE_END:
        why = (
            f"the rates of the {new.recipe.schedule} schedule depend on --epochs from the first "
            f"step on (--init-from {path} with another --workdir starts from its weights)"
        )
    elif new.recipe.low_resolution != "none":
        why = "--low-resolution is a share of all its steps"
    if why:
        raise UserError(
            f"{path} holds a run of {old.recipe.epochs} epochs, which cannot become one of "
            f"--epochs {epochs}: {why}. {instead}"
        )


def _check_usable(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--workdir {path}: checkpoints need a name in UTF-8; take another"
        ) from None
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"--workdir {path} is a file; name a directory")
        files.make_folder(path)
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir {path} cannot be written: {error.strerror}") from None


def _delete(target: Path) -> None:
    if target.is_symlink():
        notice(f"{target} is a link: deleted; what it points to, {os.readlink(target)}, is left")
    try:
        files.remove(target)
    except OSError as error:
        raise UserError(f"--overwrite cannot delete {target}: {error.strerror}") from None


def _check_contents(path: Path, overwrite: bool) -> None:
    """Raises `UserError` where `path` is no run directory and holds something."""
    if (path / "config.json").exists():
        return
    found = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    strangers = [
        name for name in found if name not in _OWN_NAMES and not fnmatch(name, _OWN_PATTERN)
    ]
    if strangers:
        raise UserError(
            f"--workdir {path} holds other files ({strangers[0]} ...) and is no run directory; "
            "name a new or empty one"
        )
    if found and not overwrite:
        raise UserError(
            f"--workdir {path} holds {', '.join(found)} but no config.json, so nobody knows of "
            "which run; give --overwrite to delete that and start anew"
        )


@contextlib.contextmanager
def open_workdir(path: Path | str, config: Config, *, overwrite: bool = False) -> Iterator[bool]:
    """Locks `path` for this process and makes it the directory of the run `config`.

    A run whose `--epochs` have changed goes on too where that comes to the same; what its earlier
    end left (summary, pictures) is removed.

    Yields:
      Whether an earlier part of the same run is there to go on from.

    Raises:
      UserError: the reader of what is printed has left before there is a `summary.json`; `path` is
        a file, not writable, in use, holds other files, or holds another run
        (the message lists the differences) and `overwrite` is False.
    """
    path = files.absolute(path)
    _check_usable(path)
    with _locked(path):
        for pattern in (".config.json.*", ".summary.json.*", ".write-*"):  # of killed processes
            for left in path.glob(pattern):
                left.unlink(missing_ok=True)
        _check_contents(path, overwrite)
        if overwrite:
            # The config goes last: killed half-way, the directory is still known as a run's.
            members = list(path.glob(_OWN_PATTERN))
            for target in [*members, *(path / name for name in reversed(_OWN_NAMES))]:
                _delete(target)
        resume = (path / "config.json").exists()
        old = read_config(path) if resume else None
        if resume:
            check_goes_on(path, old, config)
        if not resume or old.recipe != config.recipe:
            for name in ("summary.json", "plots"):
                files.remove(path / name)
            write_config(path, config)
        try:
            yield resume
        except ReaderLeft as error:
            if (path / "summary.json").exists():
                raise
            raise UserError(f"{error}; the run is not complete: the same command goes on") from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(files.lock(path / ".lock"))
        except OSError as error:
            raise UserError(f"--workdir {path} cannot be written: {error.strerror}") from None
        if not held:
            raise UserError(f"--workdir {path} is in use by another process")
        yield
