"""Result files: what they were measured on, how they are written and shown again."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import commit, hardware
from cifar_jax.runtime.errors import UserError


def header() -> dict:
    """Returns {"machine", "commit", "date"}: what a result begins with."""
    return {
        "machine": hardware(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def processor(result: dict) -> str:
    """Returns the processor of a result in words."""
    return f"{result['machine']['cpu']}, {result['machine']['cores']} cores"


def stamp(result: dict) -> str:
    """Returns the commit and the date of a result in words."""
    return f"commit {result['commit'][:12]}, {result['date']}"


def write(path: Path | None, result: dict) -> None:
    """Writes a result as JSON, with the directory it is in; nothing where there is no path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def add_show(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `shown` looks at."""
    parser.add_argument("--show", type=Path, help="print a result file's table and stop")


def shown(args: argparse.Namespace, table: Callable[[dict], str]) -> bool:
    """Prints the table of the file that `--show` names; returns whether it named one.

    Raises:
      UserError: it is no result file.
    """
    if not args.show:
        return False
    try:
        text = table(json.loads(args.show.read_text()))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--show {args.show} is not a result file: {error}") from None
    print(text)  # outside: a closed pipe is no fault of the file
    return True
