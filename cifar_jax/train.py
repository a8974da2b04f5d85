"""Trains a recipe and tests it: `python -m cifar_jax.train --model dropout_cnn`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import re
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cifar_jax import _cli as cli
from cifar_jax import _config
from cifar_jax.recipes import RECIPES
from cifar_jax.runtime.errors import UserError, nearest, run_command
from cifar_jax.runtime.files import absolute
from cifar_jax.settings import parse_names

DEFAULT_SEED = 42
NAME_LENGTH = 120  # of a run directory that nobody named; file systems allow 255 bytes


# What `--help` lists.
FIRST = (
    *("--recipe", "--model", "--dataset", "--epochs", "--batch-size", "--optimizer"),
    *("--learning-rate", "--seed", "--seeds", "--workdir"),
)


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.train", description=__doc__, first=FIRST)
    parser.add_argument(
        "--seed",
        type=cli.seed,
        default=argparse.SUPPRESS,  # to know whether it was given beside --seeds
        help=f"of everything random (default: {DEFAULT_SEED})",
    )
    cli.add_replica_options(parser)
    parser.add_argument(
        "--config", type=cli.path, metavar="FILE", help="settings: TOML, or a run's config.json"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings as TOML, and train nothing"
    )
    parser.add_argument(
        "--workdir", type=cli.path, help="run directory; resumes by itself (default: runs/...)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in a used workdir")
    parser.add_argument(
        "--init-from",
        type=cli.path,
        metavar="FILE|WORKDIR",
        help="start from these weights: .safetensors, .pth, .pt, or another run's",
    )
    parser.add_argument(
        "--pretrained",
        type=cli.path,
        metavar="imagenet|FILE",
        help="start from published weights, downloaded once, or from such a file",
    )
    parser.add_argument(
        "--save-minutes", type=float, default=5.0, help="between two saves inside an epoch"
    )
    parser.add_argument("--feed", default="resident", help="resident (on the devices) or stream")
    parser.add_argument(
        "--no-plots", action="store_true", help="draw no pictures at the end, nor report.html"
    )
    parser.add_argument("--no-report", action="store_true", help="write no report.html at the end")
    parser.add_argument(
        "--csv", action="store_true", help="write predictions.csv beside predictions.npz"
    )
    parser.add_argument(
        "--log",
        type=parse_names,
        default=(),
        metavar="NAMES",
        help="where the rows go too, each an extra: tensorboard, mlflow, wandb, trackio",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="write event files too: --log tensorboard"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on a GPU, slower; a CPU's always are",
    )
    parser.add_argument(
        "--fallback-shapes10",
        action="store_true",
        help="where the data set cannot be had, train on the built-in shapes10 and say so",
    )
    cli.add_trust_option(parser)
    cli.add_recipe_options(parser)
    cli.add_training_options(parser)
    return parser


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_requests(numbers: Sequence[int] = SIGNALS) -> Iterator:
    """Catches these signals; yields a function that returns the number of one that came or
    None. SIGUSR1 is what SLURM warns with that time is nearly up (`--signal=USR1@60`).

    A second signal acts at once, as it would have without this. Signals are the main thread's: in
    another none is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def handler(number, _frame):
        received.append(number)
        signal.signal(number, former[number])

    former = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, old in former.items():
            signal.signal(number, old)


@contextmanager
def interruptible(command: str, words: Sequence[str], say) -> Iterator:
    """`stop_requests` around training: where that is interrupted, says how to go on and exits.

    Args:
      command, words: what goes on, as a module's name and its arguments.
    """
    from cifar_jax.training.loop import Interrupted

    with stop_requests() as stop:
        try:
            yield stop
        except Interrupted as interrupted:
            number, step = interrupted.args
            again = shlex.join([word for word in words if word != "--overwrite"])
            say(f"Stopped by {signal.Signals(number).name} after step {step}; all is saved.")
            say(f"Go on with: python -m {command} {again}")
            raise SystemExit(128 + number) from None


def _load(options, recipe, say):
    try:
        return cli.load_data(options, recipe.dataset, test_fraction=options.test_fraction), recipe
    except UserError as error:
        if not options.fallback_shapes10 or recipe.dataset == "shapes10" or options.archive:
            raise
        say(f"NOTICE: {recipe.dataset} cannot be had ({error})")
        say("NOTICE: training on the built-in set shapes10 instead: drawn shapes, not photographs;")
        say("NOTICE: every figure below is for shapes10 and says nothing about CIFAR-10.")
        return cli.load_data(options, "shapes10"), recipe.replace(dataset="shapes10")


def _source(options, recipe) -> str | Path | None:
    """Returns where the weights to start from lie, None for drawn ones."""
    if options.pretrained is None:
        return options.init_from
    if options.init_from is not None:
        raise UserError("--pretrained and --init-from both name weights to start from; give one")
    from cifar_jax.weights import pretrained

    return pretrained.find(recipe.model, options.pretrained, may_download=not options.no_download)


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, trains, tests, reports. Returns what `summary.json` holds. Raises `UserError`."""
    options = make_parser().parse(arguments)
    _config.apply(options)
    name, recipe = cli.recipe_from(options)
    if options.print_config:
        say(_config.text_of(name, recipe, options, getattr(options, "seed", DEFAULT_SEED)))
        return {}
    from cifar_jax.input_pipeline import FEEDS
    from cifar_jax.parallel import distributed

    if options.feed not in FEEDS:
        raise UserError(f"unknown --feed {options.feed!r}; {nearest(options.feed, FEEDS)}")
    if not options.save_minutes > 0:
        raise UserError(f"--save-minutes must be above 0, got {options.save_minutes:g}")
    cli.check_replica_options(options)
    if options.log or options.tensorboard:
        from cifar_jax.reporting import loggers

        loggers.check(_loggers(options))
    words = sys.argv[1:] if arguments is None else arguments
    where = (options.coordinator, options.num_processes, options.process_id)
    if options.seeds:
        process = distributed.numbered(*where)
        cli.start_device(options)
        return train_many(options, words, say if process.leads else process.warn, process)
    with distributed.joined(*where):
        alone = arguments is None  # nothing else is trained in this process
        cli.start_device(options, recipe if alone else None)
        return train_one(options, words, say)


def _loggers(options) -> tuple[str, ...]:
    asked = (*options.log, *(("tensorboard",) if options.tensorboard else ()))
    return tuple(dict.fromkeys(asked))


def prepare(options, say, **changes) -> tuple:
    """Returns the run that the options ask for, its directory, which is not looked at yet, and
    lines about the weights it starts from.

    Args:
      **changes: of `setup.Options`, in place of what the command line says.

    Raises:
      UserError: all that may be refused before there is a directory.
    """
    from cifar_jax.models import own
    from cifar_jax.runtime.timing import Clock
    from cifar_jax.training.setup import Options, input_shape, make_run
    from cifar_jax.training.workdir import Config, describe_data
    from cifar_jax.weights import init_from

    recipe_name, asked = cli.recipe_from(options)
    clock = Clock()
    with clock("data"):
        dataset, recipe = _load(options, asked, say)
    seeds = options.seeds or ()
    seed = seeds[0] if seeds else getattr(options, "seed", DEFAULT_SEED)
    code = own.code_of(recipe.model)
    config = Config(recipe_name, recipe, seed, describe_data(dataset), seeds=seeds, code=code)
    run_options = Options(
        feed=options.feed,
        lowering=options.conv,
        devices=options.devices,
        save_minutes=options.save_minutes,
        plots=not options.no_plots,
        log=_loggers(options),
        report=not (options.no_report or options.no_plots),
        csv=options.csv,
    )
    run = make_run(config, dataset, dataclasses.replace(run_options, **changes), clock)
    source, notices = _source(options, recipe), []
    if source is not None:
        shape = input_shape(recipe, config.dataset["image_shape"])
        start = init_from.load(source, run.model, shape, options.trust_code)
        run.start_from(start.variables, start.record)
        notices = [*start.notices, ""]
    name = default_name(dataclasses.replace(run.config, recipe=asked), options.image_size)
    return run, absolute(options.workdir or f"runs/{name}"), notices


def train_one(options, words: Sequence[str], say) -> dict:
    """One run, of one process or several, of which the leader alone prints and has the run
    directory. Returns what `summary.json` holds."""
    from cifar_jax.parallel import agreement
    from cifar_jax.reporting import loggers
    from cifar_jax.training import loop, summary
    from cifar_jax.training.workdir import open_workdir

    leads, changes = agreement.is_leader(), {}
    if not leads:
        say, changes = _silent, dict.fromkeys(("plots", "report", "csv"), False) | {"log": ()}
    run, workdir, notices = prepare(options, say, **changes)
    agreement.check_same(agreement.settings(run))
    opening = [*summary.opening_lines(run, workdir), *notices]
    with ExitStack() as stack:
        if not leads:
            workdir = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        overwrite = options.overwrite and leads
        resume = stack.enter_context(open_workdir(workdir, run.config, overwrite=overwrite))
        resume = agreement.broadcast(resume)
        shown = summary.results_text
        done = agreement.by_leader(lambda: _complete(workdir, shown, say) if resume else None)
        if done is not None:
            return done
        for line in opening:
            say(line)
        with interruptible("cifar_jax.train", _again(words, workdir), say) as stop:
            given = run.options.log, workdir, run.config.to_dict(), resume, say
            run.log = stack.enter_context(loggers.opened(*given))
            state, trained = loop.train(run, workdir, agreement.any_of(stop), say, resume)
        return summary.finish(run, workdir, state, trained, say)


def train_many(options, words: Sequence[str], say, process) -> dict:
    """A run for each of `--seeds`, in one of several processes perhaps, which share the directory.
    Returns what `summary.json` holds, in the leader."""
    from cifar_jax.parallel import agreement
    from cifar_jax.replicas import programs, results, scheduler, shared_workdir
    from cifar_jax.training.summary import opening_lines

    form = programs.choose_form(options.replica_form)
    model = cli.recipe_from(options)[1].model
    lowering = programs.choose_lowering(form, options.conv, model)
    run, workdir, notices = prepare(options, say, lowering=lowering, devices="1")
    count, size = len(options.seeds), options.group_size
    plan = scheduler.make_plan(run, count, form, options.devices, size, process=process)
    opening = [*scheduler.opening_lines(run, plan), *opening_lines(run, workdir), *notices]
    settings = agreement.settings(run) | {"replica form": form, "group size": size}
    opened = functools.partial(shared_workdir.open_shared, overwrite=options.overwrite)
    with opened(workdir, run.config, process, settings) as resume:
        done = _complete(workdir, results.results_text, say) if resume else None
        if done is not None:
            return done
        for line in opening if process.leads else ():
            say(line)
        with interruptible("cifar_jax.train", _again(words, workdir), say) as stop:
            stop = shared_workdir.relayed(stop, workdir, process)
            return scheduler.train_and_test(run, plan, workdir, stop, say)


def _silent(line: str) -> None:
    """Says nothing: another process does."""


def default_name(config, image_size: int | None = None) -> str:
    """Returns the name of a run's directory: its recipe, what differs from that, its seeds.

    `--epochs` is not in it: a longer run goes on in the same directory. What a file's name should
    not hold becomes `_`, and a hash then tells such names apart, and long ones that are cut.
    """
    from cifar_jax.training.workdir import show_seeds

    usual = RECIPES[config.recipe_name].to_dict() | {"epochs": config.recipe.epochs}
    given = config.recipe.to_dict().items()
    parts = [config.recipe_name, *(_shown(n, v) for n, v in given if v != usual[n])]
    parts += [f"image_size{image_size}"] if image_size else []
    parts += [f"init_from_{config.init_from['sha256'][:8]}"] if config.init_from else []
    parts += [f"code_{config.code.sha256[:8]}"] if config.code else []
    seeds = f"seed{config.seed}"
    if config.seeds:
        first, colon, end = show_seeds(config.seeds).partition(":")
        seeds = f"seeds{first}-{int(end) - 1}" if colon else f"seeds{first}"
    return safe_name("-".join([*parts, seeds]))


def safe_name(whole: str) -> str:
    """Returns the name of a directory for what `whole` says, of at most `NAME_LENGTH` bytes."""
    safe = re.sub(r"[^a-zA-Z0-9_.,=+-]", "_", whole)
    if safe == whole and len(whole) <= NAME_LENGTH:
        return whole
    return f"{safe[: NAME_LENGTH - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _shown(name: str, value) -> str:
    if isinstance(value, bool) or value == []:
        return name if value else f"no_{name}"
    if isinstance(value, list):
        return "_".join([name, *value])
    return f"{name}_{value}" if isinstance(value, str) else f"{name}{value}"


def _complete(workdir: Path, results_text, say) -> dict | None:
    """Shows and returns the summary of a run that is complete, None where it is not."""
    path = workdir / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        shown = results_text(summary)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        say(f"warning: {path} is damaged; the run is tested again")
        return None
    say(f"{workdir} holds this run, complete; --overwrite trains it anew")
    say(shown)
    return summary


def _again(words: Sequence[str], workdir: Path) -> list[str]:
    named = any(word.split("=")[0] == "--workdir" for word in words)
    return [*words] if named else [*words, "--workdir", str(workdir)]


if __name__ == "__main__":
    sys.exit(run_command(main))
