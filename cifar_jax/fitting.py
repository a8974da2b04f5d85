"""Training from Python, in a notebook for instance: `cifar_jax.fit`. It is what the train command
does, without its command line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn

from cifar_jax.checkpoints import manifests, save_restore
from cifar_jax.datasets import Dataset, load_dataset
from cifar_jax.models import find, own, takes
from cifar_jax.parallel import hardware
from cifar_jax.recipes import MODEL_RECIPES, RECIPES
from cifar_jax.replicas import programs as replica_programs
from cifar_jax.replicas import scheduler
from cifar_jax.reporting.metrics_log import read_metrics
from cifar_jax.result import History, Result
from cifar_jax.runtime import compilation_cache
from cifar_jax.runtime.errors import UserError, lookup
from cifar_jax.runtime.files import absolute
from cifar_jax.runtime.timing import Clock
from cifar_jax.settings import Recipe
from cifar_jax.train import stop_requests
from cifar_jax.training import loop, setup, summary
from cifar_jax.training.loop import Interrupted
from cifar_jax.training.setup import Options, Run
from cifar_jax.training.workdir import Config, describe_data, open_workdir

Callback = Callable[[dict], Any]


def fit(
    recipe: str | Recipe | None = None,
    *,
    model: str | nn.Module | Callable[..., nn.Module] | None = None,
    data: Any = None,
    seed: int = 42,
    seeds: Iterable[int] = (),
    callbacks: Sequence[Callback] = (),
    workdir: str | Path | None = None,
    overwrite: bool = False,
    plots: bool = False,
    verbose: bool = True,
    device: str = "auto",
    conv: str = "auto",
    **settings: Any,
) -> Result:
    """Trains and tests, as `python -m cifar_jax.train` does, and returns what came of it.

        result = cifar_jax.fit("dropout", epochs=2, learning_rate=0.05)
        result = cifar_jax.fit(model=Net(), data=((x, y), (x_test, y_test)), epochs=5)
        result = cifar_jax.fit("adam", seeds=range(16))

    Ctrl-C, or a callback that returns True, ends training after the steps under way, and what there
    is by then is tested and returned. In another thread than the main one Ctrl-C reaches nobody.

    Args:
      recipe: a name of `RECIPES`, or a Recipe; by default the model's own, or `dropout`.
      model: a name of `MODELS`, `mynet.py:Net`, a linen module, or a class or function that makes
        one; it gets `num_classes` if it takes that.
      data: a `Dataset`; the name of one; arrays ((images, labels), (test images, test labels)),
        uint8 [N, S, S, 3] and whole numbers [N]; or these in a mapping, as `numpy.load` gives,
        under `x_train, y_train, x_test, y_test`. By default the recipe's.
      seed: of everything random.
      seeds: a run of each of these, all in one program; `seed` is then of no account.
      callbacks: each called with every row of the log, a dict, after each window and epoch.
      workdir: the run directory, in which the same call goes on. None keeps nothing on disk.
      overwrite: start anew in a used workdir.
      plots: draw a run directory's pictures and write its `report.html`; `Result.plot` draws
        pictures without.
      verbose: print what the command prints of training and test.
      device: auto, cpu, gpu or tpu.
      conv: how convolutions are computed: auto, lax, gemm, winograd or pieces.
      **settings: fields of `Recipe`, in place of the recipe's own.

    Returns:
      A `Result`.

    Raises:
      UserError: whatever the command refuses.
    """
    name, chosen, module = _recipe(recipe, model, settings)
    hardware.select_platform(device)
    compilation_cache.enable()
    clock = Clock()
    with clock("data"):
        dataset = dataset_of(chosen.dataset if data is None else data)
    chosen = chosen.replace(dataset=dataset.name)
    if isinstance(module, type) or (callable(module) and not isinstance(module, nn.Module)):
        classes = {"num_classes": len(dataset.class_names)}
        module = module(**(classes if takes(module, "num_classes") else {}))
    if module is not None and not isinstance(module, nn.Module):
        raise UserError(f"model must be a flax.linen module or its name, this is {type(module)}")
    seeds = tuple(map(int, seeds))
    config = Config(name, chosen, seeds[0] if seeds else int(seed), describe_data(dataset))
    code = own.code_of(chosen.model) if module is None else None
    config = dataclasses.replace(config, seeds=seeds, code=code)
    options, form = Options(lowering=conv, plots=plots, report=plots), "map"
    if seeds:
        form = replica_programs.choose_form()
        known = chosen.model if module is None else None
        lowering = replica_programs.choose_lowering(form, conv, known) if known else conv
        options = dataclasses.replace(options, lowering=lowering)
    run = setup.make_run(config, dataset, options, clock, module)
    say = print if verbose else _silent
    with contextlib.ExitStack() as stack:
        directory = workdir and absolute(workdir)
        if not directory:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        resume = stack.enter_context(open_workdir(directory, run.config, overwrite=overwrite))
        watch = stack.enter_context(_Watch.of(callbacks, bool(seeds)))
        told = say if workdir or not verbose else functools.partial(_without, str(directory))
        if seeds:
            result = _fit_many(run, form, directory, watch, told)
        else:
            result = _fit_one(run, directory, watch, say, told, resume)
        if workdir:
            return dataclasses.replace(result, directory=directory)
        return dataclasses.replace(result, _contents=_contents(directory))


def _silent(line: str) -> None:
    """Says nothing."""


def _without(hidden: str, line: str) -> None:
    """Prints a line that does not name a directory which is about to go."""
    if hidden not in line:
        print(line)


def _recipe(recipe, model, settings: Mapping) -> tuple[str, Recipe, Any]:
    """Returns the recipe's name, the recipe with the settings, and the module where one is given.
    Raises `UserError`."""
    module = None if model is None or isinstance(model, str) else model
    if isinstance(model, str):
        find(model)
        settings = {"model": model, **settings}
    elif module is not None:
        kind = module if inspect.isroutine(module) or isinstance(module, type) else type(module)
        settings = {"model": f"{kind.__module__}:{kind.__qualname__}", **settings}
    if isinstance(recipe, Recipe):
        return "recipe", recipe.replace(**settings), module
    name = recipe or MODEL_RECIPES.get(settings.get("model"), "dropout")
    chosen = lookup(RECIPES, name, "recipe").replace(**_as_fields(settings))
    if module is None:
        find(chosen.model)
    return name, chosen, module


def _as_fields(settings: Mapping) -> dict:
    """Lists of names may be given as lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


@dataclasses.dataclass
class _Watch:
    """Calls callbacks with rows, and knows when to stop: at Ctrl-C, or when one of them says so."""

    callbacks: Sequence[Callback]
    many: bool
    asked: Callable[[], int | None]
    rows: list[dict] = dataclasses.field(default_factory=list)
    ended: bool = False

    @classmethod
    @contextlib.contextmanager
    def of(cls, callbacks: Sequence[Callback], many: bool) -> Iterator[_Watch]:
        with stop_requests((signal.SIGINT,)) as asked:
            yield cls(callbacks, many, asked)

    def __call__(self, config: Config, row: dict) -> None:
        if self.many:
            shown = {name: value for name, value in row.items() if name != "member"}
            row = {"seed": config.seed, **shown}
        self.rows.append(row)
        for callback in self.callbacks:
            self.ended |= callback(dict(row)) is True

    def stop(self) -> int | None:
        return signal.SIGINT if self.ended else self.asked()


def _fit_one(run: Run, directory: Path, watch: _Watch, say, told, resume: bool) -> Result:
    state, trained = loop.train(run, directory, watch.stop, say, resume, watch, keep=True)
    found = summary.finish(run, directory, state, trained, told)
    return Result(found, History(read_metrics(directory / "metrics.jsonl")), state, run)


def _fit_many(run: Run, form: str, directory: Path, watch: _Watch, say) -> Result:
    plan = scheduler.make_plan(run, len(run.config.seeds), form, "auto", None)
    try:
        found = scheduler.train_and_test(run, plan, directory, watch.stop, say, watch)
    except Interrupted:
        say("Stopped; the runs that are complete are returned")
        found = {"stopped": True}
    results = tuple(_members(run, directory))
    history = History(
        [{"seed": one.run.config.seed, **row} for one in results for row in one.history]
        if "stopped" not in found
        else watch.rows
    )
    return Result(found, history, None, run, results)


def _members(run: Run, directory: Path) -> Iterator[Result]:
    """Yields the Result of every run of several that is complete."""
    abstract = setup.abstract_payload(run.shapes, run.steps_per_epoch)
    for seed in run.config.seeds:
        folder = directory / f"seed-{seed}"
        if not (folder / "summary.json").exists():
            continue
        member = run.with_config(dataclasses.replace(run.config, seed=seed, seeds=()))
        checkpoints = folder / "checkpoints"
        best = run.config.recipe.select_best and manifests.best_step(checkpoints) is not None
        restored = save_restore.restore(checkpoints, abstract, which="best" if best else "latest")
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        history = History(read_metrics(folder / "metrics.jsonl"))
        contents = _contents(folder)
        yield Result(found, history, restored.state["state"], member, (), None, contents)


def _contents(directory: Path) -> dict[Path, bytes]:
    """Returns what a directory's files hold, by path in it."""
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# Data of any kind as a data set.


def dataset_of(data: Any) -> Dataset:
    """Returns the `Dataset` that `fit`'s `data` means. Raises `UserError`."""
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str):
        return load_dataset(data)
    try:
        if hasattr(data, "keys"):
            data = tuple((data[f"x_{part}"], data[f"y_{part}"]) for part in ("train", "test"))
        train, test = data
        return Dataset.from_arrays(*train, *test)
    except (KeyError, ValueError, TypeError):
        raise UserError(
            "data must be a Dataset, the name of one, ((images, labels), (test images, test "
            "labels)), or a mapping with x_train, y_train, x_test and y_test"
        ) from None
