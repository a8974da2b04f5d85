"""What the processes of one run agree on, and what they get from the leader, process 0.

Values that steer the training loop are exchanged at the same points by all, so that all take the
same turns; what only the leader knows (the state in a checkpoint, how far to run before looking
again) the others get from it. With one process every function returns what it was given.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cifar_jax.parallel.distributed import Ended, exchange
from cifar_jax.runtime import keys
from cifar_jax.runtime.environment import environment
from cifar_jax.runtime.errors import UserError


def several() -> bool:
    """Whether several processes make this run."""
    return jax.process_count() > 1


def is_leader() -> bool:
    """Whether this process of a run prints and has its directory."""
    return jax.process_index() == 0


def broadcast(value: Any = None) -> Any:
    """Returns the leader's `value`, anything JSON holds, in every process; all must call it."""
    return exchange(value if is_leader() else None)[0]


def by_leader(function: Callable[[], Any]) -> Any:
    """Returns, in every process, what `function()` returns in the leader, which alone calls it."""
    return broadcast(function() if is_leader() else None)


def allgather(*values: int) -> np.ndarray:
    """Returns int32 [processes, len(values)]: what each process gave. All must call it."""
    return np.array(exchange([int(value) for value in values]), np.int32)


def any_of(stop: Callable[[], int | None]) -> Callable[[], int | None]:
    """Returns `stop` for all processes: a number that one of them gives is every one's."""
    return lambda: int(allgather(stop() or 0).max()) or None


def check_same(mine: Mapping[str, Any]) -> None:
    """Compares with the leader what makes the processes one run: settings, data, versions.

    Args:
      mine: of this process, anything JSON holds.

    Raises:
      UserError: a process differs; the message names it and the difference.
    """
    devices = collections.Counter(device.process_index for device in jax.devices())
    for process, count in sorted(devices.items()):
        if count != devices[0]:  # nothing could be exchanged
            raise Ended(f"process {process} has {count} devices, process 0 has {devices[0]}")
    for process, theirs in enumerate(said := exchange(mine)):
        check_settings(said[0], theirs, process)


def check_settings(leaders: Mapping[str, Any], theirs: Mapping[str, Any], process: int) -> None:
    """Raises `UserError` where the settings of a process are not the leader's."""
    found = differences(leaders, theirs)
    if found:
        raise UserError(f"process {process} is set up otherwise than process 0: {'; '.join(found)}")


def settings(run) -> dict[str, Any]:
    """Returns what must be the same in all processes of a run (`setup.Run`)."""
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


def broadcast_arrays(tree: Any) -> Any:
    """Returns the leader's arrays in every process, as NumPy arrays and typed keys; all must call
    it, with leaves of the same shapes and dtypes."""
    if not several():
        return tree
    from jax.experimental import multihost_utils

    leaves, treedef = jax.tree.flatten(tree)
    got = multihost_utils.broadcast_one_to_all([np.asarray(keys.plain(x)) for x in leaves])
    return jax.tree.unflatten(treedef, map(keys.typed_as, leaves, got))
