"""Checkpoints that survive kills, full disks and bit rot.

Orbax stores the arrays; a manifest (`checkpoints/manifests.py`) says what to trust. A restore
checks every file against it before Orbax sees a byte, because parsers of array formats answer to
damage with anything from an exception to wrong numbers. Orbax's own `CheckpointManager` is not
used: it ranks NaN metrics best, keeps failed saves in its step cache, refuses to save a step below
a damaged one, and knows no digests.

Saves are asynchronous at every size: `save` returns when the arrays are in host memory (or, on the
CPU, are held against donation), and one background thread writes, digests, commits and prunes.
Measured for Orbax on two idle CPU cores: a 0.5 MB state blocks for 10 ms and is written after 60;
1.6 GB (VGG16 with Adam) blocks for 15 ms and is written after 2.8 s, where a synchronous save takes
60 ms and 4.8 s. The digests add a pass over the files at about 4 GB/s.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax.checkpoints import manifests
from cifar_jax.checkpoints.manifests import Damaged, best_step, latest_step, steps
from cifar_jax.parallel import agreement
from cifar_jax.runtime import keys
from cifar_jax.runtime.errors import UserError, in_command
from cifar_jax.runtime.files import absolute

_PYTHON = (bool, int, float)  # leaves that come back as Python numbers
_Path = tuple[str, ...]  # of a leaf: ("params", "conv1", "kernel")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` found.

    `state` has the structure, dtypes, shapes and shardings that were asked for. `skipped` has one
    line, "checkpoint 1200: what is wrong", for each damaged or unfinished checkpoint passed over.
    """

    step: int
    state: Any
    extra: dict[str, Any]
    metric: float | None
    skipped: list[str]


class Checkpoints:
    """Writes a run's checkpoints, and keeps the newest `keep_latest` and the best.

    A context manager; leaving it waits for the save under way, and so does every method that
    reads. One process at a time may write to a directory. Of the processes of a run, whose state is
    the same, the leader saves its own copy, and on restoring sends it to the others; `restore` and
    `committed` must be called by all.

    Raises:
      UserError: the directory cannot be made or written to.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_latest: int = 2):
        if keep_latest < 1:
            raise UserError(f"keep_latest is {keep_latest}; at least one checkpoint must be kept")
        self.directory = absolute(directory)  # Orbax takes absolute paths only
        self.keep_latest = keep_latest
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._bad: set[Path] = set()  # found damaged, or of failed saves
        if not agreement.is_leader():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = "it is a file" if self.directory.is_file() else error.strerror
            raise UserError(f"cannot make directory {self.directory}: {reason}") from error
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to directory {self.directory}: Permission denied")

    def save(
        self,
        step: int,
        state: Any,
        extra: dict[str, Any] | None = None,
        *,
        metric: float | None = None,
        block: bool = False,
    ) -> None:
        """Starts to save `state`; waits first for the save before, and to the end if `block`.

        Args:
          step: the number of steps done. A step may be saved again; the later save counts.
          state: a pytree of arrays (typed PRNG keys included), Python numbers and None. It may be
            donated as soon as this returns.
          extra: anything JSON holds; tuples come back as lists.
          metric: the lowest is best, the earliest of equals. NaN and infinities are never best.

        Raises:
          UserError: this save, or the one before, could not be written (full disk, permissions).
            Earlier checkpoints are intact, and saving again is allowed.
        """
        if not agreement.is_leader():
            return
        self.wait()
        named, _ = _named(state)
        key_leaves = {path: leaf for path, leaf in named.items() if keys.is_key(leaf)}
        body = {
            "step": int(step),
            "metric": None if metric is None else float(metric),
            "extra": json.loads(json.dumps(extra or {})),  # a copy, and fails here if not JSON
            "leaves": {"/".join(path): _spec(leaf) for path, leaf in named.items()},
            "keys": {"/".join(path): str(jax.random.key_impl(k)) for path, k in key_leaves.items()},
        }
        arrays = {path: _storable(leaf) for path, leaf in named.items()}
        arrays = {path: a for path, a in arrays.items() if a.size}  # Orbax refuses empty ones
        jax.block_until_ready(arrays)  # a failed computation is no failed save
        folder = self._new_folder(int(step))
        with self._reporting(step, folder), contextlib.ExitStack() as stack:
            # Looked at first: TensorStore's threads print tracebacks when a write finds no room.
            needed = sum(array.nbytes for array in arrays.values())
            if shutil.disk_usage(self.directory).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            writer = stack.enter_context(_checkpointer())
            writer.save(folder / "state", unflatten_dict(arrays))
            closing = stack.pop_all()

        def finish() -> None:
            with self._reporting(step, folder), closing:
                writer.wait_until_finished()
                manifests.write(folder, body)
                manifests.prune(self.directory, self.keep_latest, self._bad)

        self._pending = self._thread.submit(finish)
        if block:
            self.wait()

    def _new_folder(self, step: int) -> Path:
        """The step's next folder, not one of a failed save: Orbax may still be writing there."""
        n = max((n for s, n, _ in manifests.folders(self.directory) if s == step), default=-1) + 1
        while (folder := self.directory / (f"{step}.{n}" if n else str(step))) in self._bad:
            n += 1
        return folder

    @contextlib.contextmanager
    def _reporting(self, step: int, folder: Path) -> Iterator[None]:
        """Makes one UserError of whatever a failed save raises, and removes what it wrote."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._bad.add(folder)
            manifests.remove(folder)
            raise UserError(
                f"could not save checkpoint {step} in {self.directory}: {_cause_of(error)}; "
                "earlier checkpoints are intact"
            ) from error

    def wait(self) -> None:
        """Returns when the save under way is committed.

        Raises:
          UserError: that save failed; raised once.
        """
        if self._pending is not None:
            error = self._pending.exception()
            self._pending = None
            if error is not None:
                raise error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except UserError as failed_save:
            if error is None:
                raise
            error.add_note(str(failed_save))  # the error under way is the one to see
        finally:
            self._thread.shutdown()

    def committed(self) -> bool:
        """Whether a save was ever completed here that is still there, damaged perhaps."""
        self.wait()
        return agreement.by_leader(lambda: manifests.any_committed(self.directory))

    def steps(self) -> list[int]:
        """See `manifests.steps`."""
        self.wait()
        return steps(self.directory)

    def latest_step(self) -> int | None:
        """See `manifests.latest_step`."""
        self.wait()
        return latest_step(self.directory)

    def best_step(self) -> int | None:
        """See `manifests.best_step`."""
        self.wait()
        return best_step(self.directory)

    def restore(self, abstract_state: Any, *, which: str | int = "latest") -> Restored:
        """See `restore`. What it finds damaged is deleted once the next save is committed."""
        self.wait()
        if not agreement.several():
            return restore(self.directory, abstract_state, which=which, damaged=self._bad)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_state)
        if agreement.is_leader():
            found = restore(self.directory, shapes, which=which, damaged=self._bad)
        else:
            found = Restored(0, jax.tree.map(_to_fill, shapes), {}, None, [])
        about = [found.step, found.extra, found.metric, found.skipped]
        step, extra, metric, skipped = agreement.broadcast(about)
        return Restored(step, agreement.broadcast_arrays(found.state), extra, metric, skipped)


def restore(
    directory: str | os.PathLike,
    abstract_state: Any,
    *,
    which: str | int = "latest",
    damaged: set[Path] | None = None,
) -> Restored:
    """Reads a checkpoint; writes nothing.

    Args:
      directory: a checkpoints directory (see `manifests.locate`).
      abstract_state: a pytree of the wanted structure. Leaves: `jax.ShapeDtypeStruct` or arrays,
        typed PRNG keys included, restored to their shardings (so a run can move to other devices)
        or uncommitted where there is none; NumPy arrays and Python scalars come back as such.
      which: "latest", "best" (lowest metric) or a step. The first two pass over damaged
        checkpoints, to the next newest or next best.
      damaged: gets the folders that were passed over.

    Raises:
      UserError: no checkpoint, none intact (each with what is wrong), none with a metric for
        "best", or one of another structure, shape or dtype.
    """
    directory = absolute(directory)
    wanted, treedef = _named(abstract_state)
    passed = {}
    for folder in manifests.candidates(directory, which):
        try:
            body = manifests.read(folder)
            places = {path: _place(path, body["leaves"]) for path in wanted}
            _check_fit(directory, body, {places[path]: wanted[path] for path in wanted})
            manifests.verify(folder, body)
            values = _read(folder, {places[path]: wanted[path] for path in wanted})
            # One array restored as two leaves must not be shared: a state is donated.
            values |= {path: values[p].copy() for path, p in places.items() if p != path}
        except Damaged as damage:
            passed[folder] = f"{folder.name}: {damage}"
            continue
        state = [
            _as_wanted(leaf, values[path], body["keys"].get("/".join(path)))
            for path, leaf in wanted.items()
        ]
        if damaged is not None:
            damaged.update(passed)
        return Restored(
            body["step"],
            jax.tree_util.tree_unflatten(treedef, state),
            body["extra"],
            body["metric"],
            [f"checkpoint {line}" for line in passed.values()],
        )
    raise UserError(f"no usable checkpoint in {directory}: {'; '.join(passed.values())}")


def _check_fit(directory: Path, body: dict[str, Any], wanted: dict[_Path, Any]) -> None:
    """Raises UserError, listing what differs, unless the saved leaves are those wanted."""
    there, here = body["leaves"], {"/".join(path): _spec(leaf) for path, leaf in wanted.items()}
    lines = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if lines:
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise UserError(
            f"checkpoint {body['step']} in {directory} is of another model or optimizer: "
            f"{len(lines)} of {len(there.keys() | here.keys())} entries differ: "
            f"{'; '.join(lines[:4])}{more}"
        )


# Leaves by name: what is stored of each, and how it comes back.


def _named(tree: Any) -> tuple[dict[_Path, Any], Any]:
    """(path -> leaf, treedef), in the order of the flattened tree."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    result = {
        tuple(jax.tree_util.keystr((k,), simple=True) for k in path) or ("value",): leaf
        for path, leaf in leaves
    }
    if len(result) != len(leaves):
        raise ValueError("two leaves of the state have the same name")
    return result, treedef


def _place(path: _Path, saved: dict[str, str]) -> _Path:
    """Where a checkpoint holds a leaf. Older ones kept no average of the statistics and were
    evaluated with the running ones, which are restored as both."""
    if "/".join(path) in saved:
        return path
    return tuple("batch_stats" if name == "ema_batch_stats" else name for name in path)


def _spec(leaf: Any) -> str:
    """What must agree between the saved and the wanted leaf, e.g. `float32[5, 5, 3, 6]`."""
    if type(leaf) in _PYTHON:
        return f"Python {type(leaf).__name__}"
    return f"{leaf.dtype}{list(leaf.shape)}"


def _storable(leaf: Any) -> Any:
    """What Orbax is given: an array of plain numbers."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        # Of equal copies Orbax would slice a part from each: a program for every leaf and device.
        leaf = leaf.addressable_data(0)
    leaf = keys.plain(leaf)
    # Orbax refuses arrays on the devices of one of several processes; NumPy ones it copies.
    return leaf if isinstance(leaf, jax.Array) and jax.process_count() == 1 else np.asarray(leaf)


def _blank(leaf: Any) -> np.ndarray:
    """A NumPy array, all of one zero, like what is stored of a wanted leaf."""
    if keys.is_key(leaf):
        leaf = jax.eval_shape(keys.plain, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    elif type(leaf) in _PYTHON:
        leaf = np.asarray(leaf)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _to_fill(shape: jax.ShapeDtypeStruct) -> Any:
    """An array, or keys, of that shape for `agreement.broadcast_arrays` to fill."""
    return jax.random.key(0) if keys.is_key(shape) else np.zeros(shape.shape, shape.dtype)


def _read(folder: Path, wanted: dict[_Path, Any]) -> dict[_Path, np.ndarray]:
    """What is stored of the wanted leaves. Raises `Damaged`."""
    values = {path: _blank(leaf) for path, leaf in wanted.items()}
    target = unflatten_dict({path: value for path, value in values.items() if value.size})
    try:
        with _checkpointer() as reader:
            return values | flatten_dict(reader.restore(folder / "state", target))
    except Exception as error:  # Orbax and TensorStore raise many types, none of them documented
        raise Damaged(f"Orbax cannot read it ({_cause_of(error)})") from error


def _as_wanted(wanted: Any, value: np.ndarray, key_impl: str | None) -> Any:
    """The stored `value` as the kind of leaf, and on the devices, that `wanted` says."""
    if type(wanted) in _PYTHON:
        return type(wanted)(value.item())
    if isinstance(wanted, np.generic):
        return value[()]
    if isinstance(wanted, np.ndarray):
        return value
    if key_impl:
        value = jax.random.wrap_key_data(value, impl=key_impl)
    # Uncommitted, like a fresh state, where no device is named: jit may move it anywhere.
    named = wanted.committed if isinstance(wanted, jax.Array) else True
    return jax.device_put(value, wanted.sharding if named else None)


# Orbax


def _checkpointer():
    """An Orbax checkpointer that waits for no other process: one of them keeps the checkpoints."""
    import orbax.checkpoint as ocp

    if in_command():
        _quieten()
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


@functools.cache
def _quieten() -> None:
    """Keeps from the screen, from here on in this process, the tracebacks of failed saves, which
    reach the user as one UserError. For commands only; what Orbax raises is not touched.

    Orbax logs some, from threads that outlive the save. And when a write fails it gives the save up
    and closes its event loop; TensorStore's other writes end later, find it closed, and each would
    print so.
    """
    for name in ("absl", "asyncio"):  # after Orbax's import: absl makes a logger of its own class
        logging.getLogger(name).addFilter(_not_of_orbax)
    former = sys.unraisablehook

    def hook(unraisable) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            former(unraisable)

    sys.unraisablehook = hook


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """A log filter for what Orbax logs, and for what is logged of its exceptions."""
    trace = record.exc_info[2] if record.exc_info else None
    places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return not any(os.path.join("orbax", "checkpoint") in p for p in [record.pathname, *places])


def _cause_of(error: BaseException) -> str:
    """The cause of a failed read or write in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    for known in ("No space left on device", "File too large", "Permission denied"):
        if known in text:
            return known
    return f"{type(error).__name__}: {text[:200]}"
