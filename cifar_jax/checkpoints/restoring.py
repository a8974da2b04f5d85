"""Reading checkpoints: every file against its digest, damaged ones passed over."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from cifar_jax.checkpoints import leaves, manifests
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import absolute


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


def checkpointer():
    """An Orbax checkpointer that waits for no other process: one of them keeps the checkpoints."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def _stored(path: leaves.Path, saved: dict[str, str]) -> leaves.Path:
    """Where a checkpoint holds a leaf. Older ones kept no average of the statistics and were
    evaluated with the running ones, which are restored as both."""
    if "/".join(path) in saved:
        return path
    return tuple("batch_stats" if name == "ema_batch_stats" else name for name in path)


def _load(folder: Path, manifest: dict[str, Any], wanted: dict, treedef: Any) -> Any:
    manifests.verify(folder, manifest)
    places = {path: _stored(path, manifest["leaves"]) for path in wanted}
    target = leaves.nest(
        {
            places[path]: leaves.target(leaf)
            for path, leaf in wanted.items()
            if not leaves.is_empty(leaf)
        }
    )
    try:
        with checkpointer() as reader:
            tree = reader.restore(folder / "state", target)
    except Exception as error:  # Orbax and TensorStore raise many types, none of them documented
        raise manifests.Damaged(f"Orbax cannot read it ({cause_of(error)})") from error
    values = leaves.named(tree)[0]
    # One array restored as two leaves must not be shared: a state is donated.
    values |= {path: values[place].copy() for path, place in places.items() if path != place}
    return jax.tree_util.tree_unflatten(
        treedef,
        [
            leaves.restored(leaf, values.get(path), manifest["keys"].get("/".join(path)))
            for path, leaf in wanted.items()
        ],
    )


def restore(
    directory: str | os.PathLike, abstract_state: Any, *, which: str | int = "latest"
) -> Restored:
    """Reads a checkpoint; writes nothing.

    Args:
      directory: a checkpoints directory (see `locate`).
      abstract_state: a pytree of the wanted structure. Leaves: `jax.ShapeDtypeStruct` or arrays,
        typed PRNG keys included, restored to their shardings (so a run can move to other devices)
        or uncommitted where there is none; NumPy arrays and Python scalars come back as such.
      which: "latest", "best" (lowest metric) or a step. The first two pass over damaged
        checkpoints, to the next newest or next best.

    Raises:
      UserError: no checkpoint, none intact (each with what is wrong), none with a metric for
        "best", or one of another structure, shape or dtype.
    """
    return restore_noting(absolute(directory), abstract_state, which)[0]


def restore_noting(
    directory: Path, abstract_state: Any, which: str | int
) -> tuple[Restored, set[Path]]:
    """`restore`, and the folders it found damaged."""
    entries, broken = manifests.candidates(directory, which)
    wanted, treedef = leaves.named(abstract_state)
    damaged: list[manifests.Broken] = []
    for folder, manifest in entries:
        saved = manifest["leaves"]
        specs = {"/".join(_stored(p, saved)): leaves.spec(leaf) for p, leaf in wanted.items()}
        manifests.check_fit(directory, manifest, specs)
        try:
            state = _load(folder, manifest, wanted, treedef)
        except manifests.Damaged as damage:
            damaged.append((manifest["step"], folder, str(damage)))
            continue
        # A folder left over from a kill is news only if it is newer than what was found.
        passed = [b for b in broken if which != "latest" or b[0] > manifest["step"]] + damaged
        skipped = [f"checkpoint {f.name}: {why}" for _, f, why in sorted(passed, reverse=True)]
        found = Restored(manifest["step"], state, manifest["extra"], manifest["metric"], skipped)
        return found, {folder for _, folder, _ in damaged}
    reasons = "; ".join(
        f"{folder.name}: {why}" for _, folder, why in sorted(broken + damaged, reverse=True)
    )
    raise UserError(f"no usable checkpoint in {directory}: {reasons}")


def cause_of(error: BaseException) -> str:
    """The cause of a failed read or write in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    for known in ("No space left on device", "File too large", "Permission denied"):
        if known in text:
            return known
    return f"{type(error).__name__}: {text[:200]}"
