"""Trains a recipe and tests it: `python -m cifar_jax.train --model dropout_cnn`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cifar_jax import cli
from cifar_jax.errors import UserError, nearest, run_command

DEFAULT_SEED = 42


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m cifar_jax.train", description=__doc__)
    parser.add_argument(
        "--seed",
        type=cli.seed,
        default=argparse.SUPPRESS,  # to know whether it was given beside --seeds
        help=f"of everything random (default: {DEFAULT_SEED})",
    )
    cli.add_replica_options(parser)
    parser.add_argument("--workdir", help="run directory; resumes by itself (default: runs/...)")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a used workdir")
    parser.add_argument(
        "--init-from",
        metavar="FILE|WORKDIR",
        help="start from these weights: .safetensors, .pth, .pt, or another run's",
    )
    parser.add_argument(
        "--pretrained",
        metavar="imagenet|FILE",
        help="start from published weights, downloaded once, or from such a file",
    )
    parser.add_argument(
        "--save-minutes", type=float, default=5.0, help="between two saves inside an epoch"
    )
    parser.add_argument("--feed", default="resident", help="resident (on the devices) or stream")
    parser.add_argument("--no-plots", action="store_true", help="draw no pictures at the end")
    parser.add_argument(
        "--tensorboard", action="store_true", help="write event files too (extra: tensorboard)"
    )
    parser.add_argument(
        "--fallback-shapes10",
        action="store_true",
        help="where the data set cannot be had, train on the built-in shapes10 and say so",
    )
    cli.add_recipe_options(parser)
    cli.add_data_options(parser)
    cli.add_device_options(parser)
    cli.add_host_options(parser)
    return parser


@contextmanager
def stop_requests() -> Iterator:
    """Catches SIGINT and SIGTERM; yields a function that returns the signal's number or None.

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

    former = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, old in former.items():
            signal.signal(number, old)


def _load(options, recipe, say):
    try:
        return cli.load_data(options, recipe.dataset), recipe
    except UserError as error:
        if not options.fallback_shapes10 or recipe.dataset == "shapes10":
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
    from cifar_jax import pretrained

    return pretrained.find(recipe.model, options.pretrained, may_download=not options.no_download)


def main(arguments: Sequence[str] | None = None, say=print) -> dict:
    """Parses, trains, tests, reports. Returns what `summary.json` holds. Raises `UserError`."""
    options = make_parser().parse(arguments)
    recipe_name, recipe = cli.recipe_from(options)
    from cifar_jax import feed, hosts

    if options.feed not in feed.FEEDS:
        raise UserError(f"unknown --feed {options.feed!r}; {nearest(options.feed, feed.FEEDS)}")
    if not options.save_minutes > 0:
        raise UserError(f"--save-minutes must be above 0, got {options.save_minutes:g}")
    cli.check_replica_options(options)
    where = (options.coordinator, options.num_processes, options.process_id)
    with hosts.joined(*where, apart=bool(options.seeds)):
        alone = arguments is None and not options.seeds  # nothing else is trained in this process
        cli.start_device(options, recipe if alone else None)
        words = sys.argv[1:] if arguments is None else arguments
        return _as_one(options, recipe_name, recipe, words, say)


def _as_one(options, recipe_name, recipe, words: Sequence[str], say) -> dict:
    """`_main` in each of several processes; the leader alone prints and has the run directory."""
    from cifar_jax import together

    if together.is_leader():
        return _main(options, recipe_name, recipe, words, say)
    options.no_plots, options.tensorboard, options.overwrite = True, False, False
    if options.seeds:  # every process writes the directories of its own runs
        return _main(options, recipe_name, recipe, words, together.warn)
    with tempfile.TemporaryDirectory() as scratch:
        options.workdir = f"{scratch}/run"
        return _main(options, recipe_name, recipe, words, lambda _: None)


def _main(options, recipe_name, recipe, words: Sequence[str], say) -> dict:
    from cifar_jax import finish, initial, many, many_finish, replicas, together, training
    from cifar_jax.clock import Clock
    from cifar_jax.from_recipe import input_shape
    from cifar_jax.run import Options, make_run
    from cifar_jax.workdir import Config, describe_data, open_workdir

    clock = Clock()
    with clock("data"):
        dataset, recipe = _load(options, recipe, say)
    seeds = options.seeds or ()
    seed = seeds[0] if seeds else getattr(options, "seed", DEFAULT_SEED)
    config = Config(recipe_name, recipe, seed, describe_data(dataset), seeds=seeds)
    workdir = Path(options.workdir or _default_workdir(config)).absolute()
    run_options = Options(
        feed=options.feed,
        lowering=options.conv,
        devices=options.devices,
        save_minutes=options.save_minutes,
        plots=not options.no_plots,
        tensorboard=options.tensorboard,
    )
    if seeds:
        form = replicas.choose_form(options.replica_form)
        lowering = replicas.choose_lowering(form, options.conv)
        run_options = dataclasses.replace(run_options, lowering=lowering, devices="1")
    run = make_run(config, dataset, run_options, clock)
    # All that may refuse comes before there is a directory.
    source, notices = _source(options, recipe), []
    if source is not None:
        start = initial.load(source, run.model, input_shape(recipe, config.dataset["image_shape"]))
        run.start_from(start.variables, start.record)
        notices = [*start.notices, ""]
    how = {"replica form": form, "group size": options.group_size} if seeds else {}
    together.check_same(together.settings(run) | how)
    opening = [*finish.opening_lines(run, workdir), *notices]
    if seeds:
        plan = many.make_plan(run, len(seeds), form, options.devices, options.group_size)
        opening = [*many.opening_lines(run, plan), *opening]
    shown = many_finish.results_text if seeds else finish.results_text
    opened = together.open_shared if seeds else open_workdir
    with opened(workdir, run.config, overwrite=options.overwrite) as resume:
        resume = together.from_leader(resume)
        summary = together.by_leader(lambda: _complete(workdir, shown, say) if resume else None)
        if summary is not None:
            return summary
        for line in opening if together.is_leader() else ():
            say(line)
        with stop_requests() as stop:
            try:
                if seeds:
                    return many.train_and_test(run, plan, workdir, together.relayed(stop), say)
                state, trained = training.train(run, workdir, together.any_of(stop), say, resume)
            except training.Interrupted as interrupted:
                number, step = interrupted.args
                again = shlex.join(_again(words, workdir))
                say(f"Stopped by {signal.Signals(number).name} after step {step}; all is saved.")
                say(f"Go on with: python -m cifar_jax.train {again}")
                raise SystemExit(128 + number) from None
        return finish.finish(run, workdir, state, trained, say)


def _default_workdir(config) -> str:
    seeds = config.seeds
    if not seeds:
        return f"runs/{config.recipe_name}-seed{config.seed}"
    return f"runs/{config.recipe_name}-seeds{min(seeds)}-{max(seeds)}"


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


def _again(arguments: Sequence[str], workdir: Path) -> list[str]:
    kept = [word for word in arguments if word != "--overwrite"]
    named = any(word.split("=")[0] == "--workdir" for word in kept)
    return kept if named else [*kept, "--workdir", str(workdir)]


if __name__ == "__main__":
    sys.exit(run_command(main))
