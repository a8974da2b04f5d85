"""One command for all: `cifar-jax train ...`, or `python -m cifar_jax train ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from cifar_jax.runtime.errors import UserError, lookup, run_command

# name: (module with a `main`, what it does). A new command is one entry here.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("cifar_jax.train", "train a recipe or a network of your own, and test it"),
    "evaluate": ("cifar_jax.evaluate", "test a run's weights on a split"),
    "predict": ("cifar_jax.predict", "classify image files"),
    "convert": ("cifar_jax.convert", "write a run's weights as .safetensors or .pth"),
    "export": ("cifar_jax.export", "write a run's model as StableHLO or ONNX"),
    "report": ("cifar_jax.report", "write the page of a run, or of several side by side"),
    "compare": ("cifar_jax.compare", "tell variants or finished runs apart, with error bars"),
    "sweep": ("cifar_jax.sweep", "train every combination of settings, over several seeds"),
    "find-lr": ("cifar_jax.find_lr", "suggest a learning rate, from a short ramp"),
    "datasets": ("cifar_jax.datasets.__main__", "prepare or list data sets"),
}
# These move weights only, and stay off an accelerator that may be training.
ON_CPU = ("convert", "export")


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            *("usage: cifar-jax COMMAND ...", "", *lines, ""),
            "cifar-jax COMMAND --help says more;",
            "cifar-jax --print-completion bash (zsh, tcsh) prints what lets a shell complete it",
        ]
    )


def completion(shell: str) -> str:
    """Returns the script that completes commands and options in a shell. Raises `UserError`."""
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs shtab: pip install 'cifar_jax[completion]'") from None
    from cifar_jax import _cli as cli

    lookup(dict.fromkeys(shtab.SUPPORTED_SHELLS), shell, "shell")
    whole = cli.Parser(prog="cifar-jax")
    commands = whole.add_subparsers()
    for name, (module, text) in COMMANDS.items():
        parser = importlib.import_module(module).make_parser()
        commands.add_parser(name, help=text, parents=[parser], add_help=False)
    return shtab.complete(whole, shell=shell)


def find(name: str) -> Callable:
    """Returns the `main` of a command. Raises `UserError` for an unknown one."""
    return importlib.import_module(lookup(COMMANDS, name, "command")[0]).main


def main() -> None:
    """Runs the command that `sys.argv` names, as its own module would. Raises `UserError`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage())
        if len(sys.argv) < 2:
            raise UserError("no command is given")
        return
    if sys.argv[1] == "--print-completion":
        print(completion("".join(sys.argv[2:3]) or "bash"))
        return
    name = sys.argv[1]
    command = find(name)
    if name in ON_CPU:
        from cifar_jax import _cli as cli

        cli.stay_on_cpu()
    sys.argv = [f"cifar-jax {name}", *sys.argv[2:]]
    command()


def run() -> int:
    """Returns the exit status of the command: the entry point `cifar-jax`."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(run())
