"""What several processes of one run agree on, and what they get from the leader, process 0.

Values that steer the training loop are exchanged at the same points by all, so that all take the
same turns; what only the leader knows (the state in a checkpoint, how far to run before looking
again) the others get from it. With one process every function returns what it was given.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_jax import hosts
from cifar_jax.checkpoints import Checkpoints, Restored
from cifar_jax.environment import environment
from cifar_jax.errors import UserError
from cifar_jax.hosts import store
from cifar_jax.workdir import Config, open_workdir

_asked = 0  # answers given by the leader so far; all processes count alike
_waited = 0  # calls of `wait_for_all`, likewise
SHARED_SECONDS = 10.0  # until what one process writes is seen by the others, at the latest


def several() -> bool:
    """Whether there is more than one process."""
    return hosts.count() > 1


def is_leader() -> bool:
    """Whether this process prints and writes."""
    return hosts.index() == 0


def warn(line: str) -> None:
    """Says what a process that trains runs of its own has to say beside the leader: warnings."""
    if line.startswith("warning"):
        print(f"process {hosts.index()}: {line}", file=sys.stderr)


def from_leader(value: Any = None, seconds: float = 3600) -> Any:
    """Returns the leader's `value`, anything JSON holds; the others' is not looked at. Every
    process must call it, at the same point."""
    global _asked
    if not several():
        return value
    _asked += 1
    name = f"cifar_jax/said/{_asked}"
    if is_leader():
        store().key_value_set(name, json.dumps(value))
        return json.loads(json.dumps(value))
    return json.loads(store().blocking_key_value_get(name, int(1000 * seconds)))


def by_leader(function: Callable[[], Any]) -> Any:
    """Returns, in every process, what `function()` returns in the leader, which alone calls it."""
    return from_leader(function() if is_leader() else None)


def numbers(*values: int) -> np.ndarray:
    """Returns int32 [processes, len(values)]: what each process gave. All must call it."""
    if not several():
        return np.array([values], np.int32)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(values, np.int32))


def any_of(stop: Callable[[], int | None]) -> Callable[[], int | None]:
    """Returns `stop` for all processes: a number that one of them gives is every one's."""
    return lambda: int(numbers(stop() or 0).max()) or None


def relayed(stop: Callable[[], int | None]) -> Callable[[], int | None]:
    """As `any_of`, for processes that go each its own way: a number that one of them gives reaches
    the others when they next ask."""
    told = False

    def asked() -> int | None:
        nonlocal told
        number, client = stop(), store()
        if number and not told:
            client.key_value_set(f"cifar_jax/stop/{hosts.index()}", str(number))
            told = True
        return max((int(n) for _, n in client.key_value_dir_get("cifar_jax/stop/")), default=None)

    return asked if several() else stop


def wait_for_all(stop: Callable[[], int | None]) -> int | None:
    """Returns once all processes have come here: None, or the number of a signal before that.
    `stop` is from `relayed`."""
    global _waited
    if not several():
        return None
    _waited += 1
    client, name = store(), f"cifar_jax/here/{_waited}"
    client.key_value_set(f"{name}/{hosts.index()}", "")
    number = None
    while is_leader() and len(client.key_value_dir_get(f"{name}/")) < hosts.count():
        number = stop()
        if number:
            break
        time.sleep(0.2)
    if is_leader():
        client.key_value_set(f"{name}-all/0", json.dumps(number))
    while not (said := client.key_value_dir_get(f"{name}-all/")):
        stop()
        time.sleep(0.2)
    return json.loads(said[0][1])


@contextlib.contextmanager
def open_shared(workdir: Path, config: Config, *, overwrite: bool) -> Iterator[bool | None]:
    """`open_workdir` for the leader; the others write to the same directory, unlocked, and are told
    nothing of what was there (None).

    Raises:
      UserError: as there, or a process does not see the leader's directory.
    """
    opened = contextlib.nullcontext()
    if is_leader():
        opened = open_workdir(workdir, config, overwrite=overwrite)
    with opened as resume:
        _check_shared(workdir)
        yield resume


def _check_shared(folder: Path) -> None:
    if not several():
        return
    file, token = folder / ".write-shared", uuid.uuid4().hex
    if is_leader():
        file.write_text(token)
    token, place = from_leader([token, str(folder)])
    deadline = time.monotonic() + SHARED_SECONDS
    while not _holds(file, token):
        if time.monotonic() > deadline:
            raise UserError(
                f"process {hosts.index()} does not see the run directory of process 0, {place}, at "
                f"{folder}: all write to that of --seeds, so give a --workdir that all share"
            )
        time.sleep(0.2)
    wait_for_all(lambda: None)
    if is_leader():
        file.unlink()


def _holds(file: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return file.read_text() == text
    return False


def check_same(mine: Mapping[str, Any], seconds: float = 3600) -> None:
    """Compares with the leader what makes the processes one run: settings, data, versions.

    Args:
      mine: of this process, anything JSON holds.
      seconds: to wait for the others, whose data may be still under way.

    Raises:
      UserError: a process differs; the message names it and the difference.
    """
    if not several():
        return
    this, client = hosts.index(), store()
    client.key_value_set(f"cifar_jax/settings/{this}", json.dumps(mine))
    for process in range(hosts.count()) if is_leader() else (0, this):
        text = client.blocking_key_value_get(f"cifar_jax/settings/{process}", int(1000 * seconds))
        if process == 0:
            leader = json.loads(text)
        found = differences(leader, json.loads(text))
        if found:
            raise UserError(
                f"process {process} is set up otherwise than process 0: {'; '.join(found)}"
            )


def settings(run) -> dict[str, Any]:
    """Returns what must be the same in all processes of a run (`run.Run`)."""
    config = run.config.to_dict()
    init = config.pop("init_from", None) or {}
    return {
        **config,
        "weights to start from": init.get("sha256"),
        "feed": run.place,
        "convolutions": run.options.lowering,
        "save_minutes": run.options.save_minutes,
        "devices sharing a batch": run.devices,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """Returns what must be the same in all processes of anything."""
    about = environment()
    return {
        "devices": jax.local_device_count(),
        "platform": about["device"]["platform"],
        "versions": {name: v for name, v in about["versions"].items() if name != "python"},
        "commit": about["commit"],
    }


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Returns `name: a here, b there` for every entry in which two nested mappings differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        parts = sorted(a.keys() | b.keys())
        dot = f"{name}." if name else ""
        return [
            line for key in parts for line in differences(a.get(key), b.get(key), f"{dot}{key}")
        ]
    if a == b:
        return []
    shown = f"{a} in process 0, {b} in it"
    return [f"{name}: {shown}" if len(shown) < 160 else f"{name} differs"]


def share(tree: Any) -> Any:
    """Returns the leader's arrays in every process, as NumPy arrays and typed keys; all must call
    it, with leaves of the same shapes and dtypes."""
    if not several():
        return tree
    from jax.experimental import multihost_utils

    leaves, treedef = jax.tree.flatten(tree)
    plain = [np.asarray(jax.random.key_data(x) if _is_key(x) else x) for x in leaves]
    got = multihost_utils.broadcast_one_to_all(plain)
    back = [
        jax.random.wrap_key_data(value, impl=jax.random.key_impl(x)) if _is_key(x) else value
        for value, x in zip(got, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, back)


def own_copy(tree: Any) -> Any:
    """Returns arrays that every device holds whole as arrays of this process alone."""
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


def open_checkpoints(directory: Path):
    """Returns `checkpoints.Checkpoints`; of several processes the leader's serve all."""
    leaders = Checkpoints(directory) if is_leader() else None
    return Shared(leaders) if several() else leaders


class Shared:
    """The leader's `Checkpoints`, with the part of their methods that training uses.

    Weights are the same in every process, so the leader saves its own copy and on restoring sends
    it to the others. `restore` and `committed` must be called by all.
    """

    def __init__(self, leaders):
        self._leaders = leaders

    def save(self, step: int, state: Any, extra: dict | None = None, **options) -> None:
        if self._leaders is not None:
            host = jax.tree.map(lambda x: x if _is_key(x) else np.asarray(x), own_copy(state))
            self._leaders.save(step, host, extra, **options)

    def restore(self, abstract_state: Any, *, which: str | int = "latest"):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_state)
        found = None
        if self._leaders is not None:
            found = self._leaders.restore(shapes, which=which)
        about = from_leader(found and [found.step, found.extra, found.metric, found.skipped])
        state = found.state if found else jax.tree.map(_blank, shapes)
        step, extra, metric, skipped = about
        return Restored(step, share(state), extra, metric, skipped)

    def committed(self) -> bool:
        return from_leader(self._leaders and self._leaders.committed())

    def latest_step(self) -> int | None:
        return self._leaders and self._leaders.latest_step()

    def wait(self) -> None:
        if self._leaders is not None:
            self._leaders.wait()

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *error) -> None:
        if self._leaders is not None:
            self._leaders.__exit__(*error)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _blank(shape: jax.ShapeDtypeStruct) -> Any:
    """An array of that shape for `share` to fill."""
    if _is_key(shape):
        return jax.random.key(0)
    return np.zeros(shape.shape, shape.dtype)
