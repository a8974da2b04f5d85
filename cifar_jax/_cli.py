"""Command-line options that the entry points share."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence

from cifar_jax.models import MODELS, own
from cifar_jax.recipes import MODEL_RECIPES, RECIPES
from cifar_jax.runtime.errors import UserError, lookup, nearest
from cifar_jax.runtime.files import expanded
from cifar_jax.settings import TTA_NAMES, Recipe, option_of, parse_names

DEFAULT_RECIPE = "dropout"
MAX_SEED = 2**31 - 1


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults that say something, and none twice."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`s that name the nearest option.

    Args:
      first: the options that `--help` lists, `--help-all` then lists all; () lists all at once.
    """

    def __init__(self, *, first: Sequence[str] = (), **settings):
        settings.setdefault("formatter_class", _Formatter)
        if first:
            settings["add_help"] = False
        super().__init__(allow_abbrev=False, **settings)
        self.first = first
        if first:
            flags = {"action": "store_true", "default": argparse.SUPPRESS}
            self.add_argument("-h", "--help", help="the options that most runs need", **flags)
            self.add_argument("--help-all", help="all options", **flags)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses `arguments`, sys.argv by default. Raises `UserError`."""
        known, unknown = self.parse_known_args(arguments)
        if hasattr(known, "help") or hasattr(known, "help_all"):
            self._show_recipe(known)
            print(self.format_help() if hasattr(known, "help_all") else self._short_help())
            raise SystemExit(0)
        if unknown:
            options = {name for name in _option_names(self) if name.startswith("--")}
            wrong = unknown[0].split("=")[0]
            if not wrong.startswith("-"):
                raise UserError(f"unexpected argument {wrong!r} (see {self.prog} --help)")
            raise UserError(f"unknown option {wrong}; {nearest(_meant(wrong, options), options)}")
        return known

    def _show_recipe(self, options: argparse.Namespace) -> None:
        """Makes the values of the recipe that the options name the defaults that help shows."""
        values = recipe_from(options)[1].to_dict()
        for action in self._actions:
            if action.dest in values:
                value = values[action.dest]
                action.default = ",".join(value) or "none" if isinstance(value, list) else value

    def _short_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s [options]", (), ())
        formatter.add_text(self.description)
        shown = {name: action for action in self._actions for name in action.option_strings}
        formatter.start_section("options")
        formatter.add_arguments([shown[name] for name in self.first])
        formatter.end_section()
        rest = len({id(action) for action in self._actions}) - len(self.first)
        formatter.add_text(f"{rest} more: --help-all. The defaults are the recipe's values.")
        return formatter.format_help()


def _meant(wrong: str, options: Iterable[str]) -> str:
    """Returns the option that a wrong one abbreviates: by its initials (`--lr`), or the shortest
    that begins so (`--batch`); itself where there is none."""
    short = wrong.lstrip("-").replace("_", "-")
    by_length = sorted(options, key=lambda name: (len(name), name))
    initials = [o for o in by_length if short == "".join(w[0] for w in o[2:].split("-"))]
    begun = [o for o in by_length if len(short) > 1 and o[2:].startswith(short)]
    return next(iter(initials + begun), wrong)


def _option_names(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _option_names(inner)


def seed(text: str) -> int:
    """Parses a seed from 0 to 2**31 - 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 0 <= value <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and {MAX_SEED}")
    return value


MAX_SEEDS = 10_000


def seeds(text: str) -> tuple[int, ...]:
    """Parses `0:32` (0 to 31), `0:32:2`, single seeds, and several of these with commas."""
    found: list[int] = []
    for part in text.split(","):
        bounds = part.split(":")
        try:
            numbers = [int(bound) for bound in bounds]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 3:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no range of seeds; examples: 0:32 (0 to 31), 0:32:2, 3,5,9"
            )
        if len(numbers) == 3 and numbers[2] < 1:
            raise argparse.ArgumentTypeError(f"{part!r} must count up: its third number is a step")
        named = range(*numbers) if len(numbers) > 1 else range(numbers[0], numbers[0] + 1)
        if not named:
            raise argparse.ArgumentTypeError(f"{part!r} is empty; 0:32 is 0 to 31")
        if named[0] < 0 or named[-1] > MAX_SEED:
            raise argparse.ArgumentTypeError(f"{part!r} is not between 0 and {MAX_SEED}")
        if len(found) + len(named) > MAX_SEEDS:
            raise argparse.ArgumentTypeError(f"{text!r} names more than {MAX_SEEDS:,} seeds")
        twice = set(found) & set(named)
        if twice:
            raise argparse.ArgumentTypeError(f"{text!r} names seed {min(twice)} twice")
        found += named
    return tuple(found)


def positive(text: str) -> int:
    """Parses a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def path(text: str) -> str:
    """Parses the path of a file or folder. A shell leaves the `~` of `--option=~/a` to us."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_recipe_options(parser: Parser) -> None:
    """Adds `--recipe`, `--model` and an option for every other field of a recipe."""
    group = parser.add_argument_group("recipe", "the default of each option is the recipe's value")
    group.add_argument("--recipe", metavar=_choices(RECIPES), help="published run to start from")
    types = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        option = option_of(field.name)
        if field.name == "model_option":  # may be given several times; a value may hold commas
            group.add_argument(
                option, action="append", help=field.metadata["text"], default=argparse.SUPPRESS
            )
            continue
        shown = {"help": field.metadata["text"], "default": argparse.SUPPRESS}
        if types[field.name] is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, **shown)
        elif types[field.name] in (int, float, str):
            kind, choices = types[field.name], field.metadata["choices"]
            choices = (*MODELS, "FILE:NAME") if field.name == "model" else choices
            metavar = _choices(choices) if choices else kind.__name__.upper()
            group.add_argument(option, type=kind, metavar=metavar, **shown)
        else:
            group.add_argument(option, type=parse_names, metavar="NAMES", **shown)


def _choices(names: Iterable[str]) -> str:
    return f"{{{','.join(names)}}}"


def given_settings(options: argparse.Namespace) -> dict:
    """Returns the settings of a recipe that the options give."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Recipe)
        if hasattr(options, field.name)
    }
    if "model_option" in given:
        given["model_option"] = tuple(given["model_option"])
    return given


def recipe_from(options: argparse.Namespace) -> tuple[str, Recipe]:
    """Returns the recipe's name and the recipe with the options given. Raises `UserError`."""
    given = given_settings(options)
    model = given.get("model")
    if model is not None:
        check_model(model)
    name = options.recipe
    if name is None:
        name = MODEL_RECIPES.get(model, DEFAULT_RECIPE)
    return name, lookup(RECIPES, name, "recipe").replace(**given)


def check_model(name: str) -> None:
    """Raises `UserError` where there is no such network, or no file of that name."""
    if own.code_of(name) is None:
        lookup(MODELS, name, "model")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Adds what lets a run directory bring its own network."""
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="run the copy of the network's file that the run directory brings",
    )


def add_data_options(parser: Parser) -> None:
    """Adds where the images come from."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", type=path, help="tfds directory (else TFDS_DATA_DIR, then ~/...)"
    )
    group.add_argument(
        "--archive", type=path, help="cifar-10-*.tar.gz, or the extracted batches directory"
    )
    group.add_argument("--image-size", type=positive, help="resize images of another size to this")
    group.add_argument("--no-download", action="store_true", help="never go to the network")


def add_tta(parser: Parser) -> None:
    """Adds test-time augmentation other than the recipe's."""
    parser.add_argument(
        "--tta", help=f"views of an image: {', '.join(TTA_NAMES)} (default: as the recipe says)"
    )


def add_test_fraction(parser: Parser) -> None:
    """Adds what tests a set that has no test split."""
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=0.0,
        help="share of the training images held out as the test split of a set that has none",
    )


def add_device_options(parser: Parser) -> None:
    """Adds where and how it runs."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    group.add_argument(
        "--devices", default="auto", help="devices that share a batch: auto, all or a number"
    )
    group.add_argument(
        "--conv", default="auto", help="convolutions: auto, lax, gemm, winograd, pieces"
    )


def add_replica_options(parser: Parser) -> None:
    """Adds what makes many runs of one command."""
    group = parser.add_argument_group("many runs at once")
    group.add_argument(
        "--seeds", type=seeds, help="a run for each: 0:32 (0 to 31), 0:32:2, 3,5,9 or several"
    )
    group.add_argument(
        "--replica-form",
        default="auto",
        help="map (one after another on each device), vmap (together), or auto by device",
    )
    group.add_argument(
        "--group-size", type=positive, help="runs trained together (default: what fits in memory)"
    )


def check_replica_options(options: argparse.Namespace) -> None:
    """Raises `UserError` where `--seeds` stands beside what it does not go with, or its own
    options stand without it."""
    if options.seeds is None:
        for name, default in (("replica_form", "auto"), ("group_size", None)):
            if getattr(options, name) != default:
                raise UserError(f"--{name.replace('_', '-')} is about many runs: give --seeds too")
        return
    from cifar_jax.replicas.programs import check_form

    check_form(options.replica_form)
    if hasattr(options, "seed"):
        raise UserError("--seed is one run and --seeds are many; give one of them")
    if options.feed != "resident":
        raise UserError("--seeds needs the data set on the device: leave --feed stream away")
    if options.tensorboard or options.log:
        raise UserError("--log and --tensorboard are about one run; leave them away with --seeds")


def add_host_options(parser: Parser) -> None:
    """Adds how several processes find each other where nothing in their environment says it."""
    group = parser.add_argument_group("several processes", "automatic under SLURM, Open MPI, TPUs")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=int, help="of this run; 1 is always alone")
    group.add_argument("--process-id", type=int, help="this one, from 0")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every command that trains takes beside a recipe: data, devices, processes."""
    add_data_options(parser)
    add_test_fraction(parser)
    add_device_options(parser)
    add_host_options(parser)


def start_device(options: argparse.Namespace, recipe: Recipe | None = None) -> None:
    """Takes the device and the lowering that the options name. Raises `UserError`.

    Args:
      recipe: what this process will train, if it does nothing else: a CPU's threads are then as
        many as this recipe is fastest with.
    """
    from cifar_jax.ops.convolution import LOWERINGS
    from cifar_jax.parallel import hardware
    from cifar_jax.runtime import compilation_cache
    from cifar_jax.training import setup

    if options.conv not in LOWERINGS:
        raise UserError(f"unknown --conv {options.conv!r}; {nearest(options.conv, LOWERINGS)}")
    if recipe:  # before a network's own file is run, which may use a device
        hardware.name_platform(options.device)
    threads = setup.cpu_threads(recipe, options.devices) if recipe else None
    if getattr(options, "deterministic", False):
        hardware.deterministic()
    hardware.select_platform(options.device, threads)
    compilation_cache.enable()


def stay_on_cpu() -> None:
    """Keeps JAX off the accelerators, in a command that only moves weights: one may be training.

    Call it before anything runs on a device.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")


def checkpoint_name(text: str | None) -> str | int | None:
    """Parses `--checkpoint`: best, latest, a step, or None. Raises `UserError`."""
    if text is None or text in ("best", "latest"):
        return text
    if text.isdigit():
        return int(text)
    raise UserError(f"--checkpoint must be best, latest or a step, got {text!r}")


def load_data(
    options: argparse.Namespace,
    name: str,
    splits: Sequence[str] = ("train", "test"),
    test_fraction: float = 0.0,
):
    """Loads the data set that the options name. Raises `UserError`."""
    from cifar_jax.datasets import load_dataset

    return load_dataset(
        name,
        test_fraction=test_fraction,
        data_dir=options.data_dir,
        archive=options.archive,
        image_size=options.image_size,
        download=not options.no_download,
        splits=splits,
    )
