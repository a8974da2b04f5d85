"""The directory of many runs, which several processes train: `--seeds` over processes.

Nothing passes between them but its files. Process 0 opens it and says in `groups/settings.json`,
which it locks for as long as it lives, what all must have in common. The runs are divided into
groups; who trains one has its lock, which the system frees when a process dies. Each process takes
every n-th group, and then those that nobody has. `groups/stop` holds the number of a signal that
one of them got, for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_jax.parallel.agreement import check_settings
from cifar_jax.parallel.distributed import Process
from cifar_jax.runtime import files
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import write_json
from cifar_jax.training.workdir import Config, check_goes_on, open_workdir, read_config

SEEN_SECONDS = 60.0  # for process 0 to load its data and open the directory, and others to see it


@contextlib.contextmanager
def open_shared(
    workdir: Path,
    config: Config,
    process: Process,
    settings: Mapping[str, Any],
    *,
    overwrite: bool,
    seconds: float = SEEN_SECONDS,
) -> Iterator[bool]:
    """`open_workdir` for process 0; the others wait until it has done that.

    Args:
      settings: what must be the same in all processes, anything JSON holds.
      seconds: to wait.

    Yields:
      Whether an earlier part of these runs is there, or in other processes than 0 all of them.

    Raises:
      UserError: as `open_workdir`; process 0 is not seen there; or it is set up otherwise.
    """
    if process.leads:
        with open_workdir(workdir, config, overwrite=overwrite) as resume:
            if process.count == 1:  # nobody else looks
                yield resume
                return
            folder = workdir / "groups"
            folder.mkdir(exist_ok=True)
            write_json(folder / "stop", 0)
            with _published(folder, settings, process):
                yield resume
        return
    file, deadline = workdir / "groups" / "settings.json", time.monotonic() + seconds
    while (leaders := _seen(file)) is None:
        if not overwrite and (workdir / "summary.json").exists():  # process 0 may be through
            check_goes_on(workdir, read_config(workdir), config)
            break
        if time.monotonic() > deadline:
            raise UserError(
                f"process {process.index} does not see process 0 in the run directory {workdir} "
                f"after {seconds:g} s: it has ended (it says why), has another --workdir, or the "
                "file system keeps locks to one machine; all write to a --workdir that they share"
            )
        time.sleep(0.2)
    if leaders is not None:
        check_settings(leaders, json.loads(json.dumps(settings)), process.index)
    yield leaders is None


@contextlib.contextmanager
def _published(folder: Path, settings: Mapping[str, Any], process: Process) -> Iterator[None]:
    """Others find the whole file `settings.json`, locked; one left by a dead process is not."""
    mine = folder / ".settings.json"
    write_json(mine, settings)
    with group_lock(mine, process):
        os.replace(mine, folder / "settings.json")
        yield


def _seen(path: Path) -> dict | None:
    """What a process that lives has `_published`, None where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return json.load(file)
    except OSError:
        pass
    return None


def relayed(
    stop: Callable[[], int | None], workdir: Path, process: Process
) -> Callable[[], int | None]:
    """Returns `stop` for all processes: a number that one gives reaches the others when they next
    ask."""
    file, number = workdir / "groups" / "stop", None

    def asked() -> int | None:
        nonlocal number
        with contextlib.suppress(OSError, UserError):
            if number is None and (number := stop()):
                write_json(file, number)
            elif number is None:
                # Read, not looked for: a network file system goes on saying what was not there.
                number = json.loads(file.read_text()) or None
        return number

    return asked if process.count > 1 else stop


def turns(
    locks: Sequence[Path],
    process: Process,
    stop: Callable[[], int | None],
    say: Callable[[str], None],
) -> Iterator[int]:
    """Yields the number of every lock when this process has it, until the next is asked for: its
    share first, then the others'. Waits for those that other processes have, or returns before all
    have been yielded where `stop` gives a number."""
    left = sorted(range(len(locks)), key=lambda n: (n % process.count != process.index, n))
    told = False
    while left:
        for number in list(left):
            locks[number].parent.mkdir(parents=True, exist_ok=True)
            with group_lock(locks[number], process) as mine:
                if mine:
                    left.remove(number)
                    yield number
        if left and stop():
            return
        if left and not told:
            names = ", ".join(str(number + 1) for number in sorted(left))
            say(f"Waiting for other processes, which train group {names} of {len(locks)}")
            told = True
        time.sleep(1 if left else 0)


@contextlib.contextmanager
def group_lock(
    path: Path, process: Process, waiting: Callable[[], None] | None = None
) -> Iterator[bool]:
    """`files.lock`. Raises `UserError` where there are no locks and several processes need them."""
    with contextlib.ExitStack() as stack:
        try:
            needed = process.count > 1
            held = stack.enter_context(files.lock(path, waiting=waiting, needed=needed))
        except OSError as error:
            raise UserError(
                f"cannot lock {path}: {error.strerror}; name a --workdir that can be written, on a "
                "file system with locks"
            ) from None
        yield held
