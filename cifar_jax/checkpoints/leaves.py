"""A state's leaves by name: what is stored of each, and how it comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.runtime.keys import is_key

_PYTHON = (bool, int, float)  # leaves that come back as Python numbers

Path = tuple[str, ...]  # ("params", "conv1", "kernel")


def named(tree: Any) -> tuple[dict[Path, Any], Any]:
    """(path -> leaf, treedef), in the order of the flattened tree."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    result = {
        tuple(jax.tree_util.keystr((k,), simple=True) for k in path) or ("value",): leaf
        for path, leaf in leaves
    }
    if len(result) != len(leaves):
        raise ValueError("two leaves of the state have the same name")
    return result, treedef


def nest(flat: dict[Path, Any]) -> dict[str, Any]:
    """Nested dicts, so that a checkpoint reads well in other Orbax tools."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def spec(leaf: Any) -> str:
    """What must agree between the saved and the wanted leaf, e.g. `float32[5, 5, 3, 6]`."""
    if type(leaf) in _PYTHON:
        return f"Python {type(leaf).__name__}"
    return f"{leaf.dtype}{list(leaf.shape)}"


def storable(leaf: Any) -> Any:
    """What Orbax is given: an array of plain numbers."""
    if is_key(leaf):
        return np.asarray(jax.random.key_data(leaf))
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)  # may change under the background thread
    # Of equal copies Orbax would slice a part from each: a program for every leaf and device.
    several = leaf.is_fully_replicated and len(leaf.sharding.device_set) > 1
    return leaf.addressable_data(0) if several else leaf


def is_empty(leaf: Any) -> bool:
    """Whether it has no elements; Orbax refuses such arrays, so they are only in the manifest."""
    return 0 in getattr(leaf, "shape", ())


def _placed(leaf: Any) -> bool:
    """Whether the wanted leaf names the devices it must be on."""
    if isinstance(leaf, jax.Array):
        return leaf.committed
    return getattr(leaf, "sharding", None) is not None


def target(leaf: Any) -> Any:
    """What Orbax is asked for: a sharded array, or a NumPy array where no device is named."""
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    else:
        data = np.asarray(leaf) if type(leaf) in _PYTHON else leaf
    if _placed(leaf):
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
    return np.broadcast_to(np.zeros((), data.dtype), data.shape)


def restored(wanted: Any, value: Any, key_impl: str | None) -> Any:
    """What `wanted` asked for, from what Orbax returned for `target(wanted)`, None if empty."""
    if value is None:
        value = target(wanted)
        if _placed(wanted):
            value = jax.device_put(np.zeros(value.shape, value.dtype), value.sharding)
    if type(wanted) in _PYTHON:
        return type(wanted)(value.item())
    if isinstance(wanted, np.generic):
        return wanted.dtype.type(value.item())
    if isinstance(wanted, np.ndarray):
        return np.asarray(value)
    if not _placed(wanted):
        value = jnp.asarray(value)  # uncommitted, like a fresh state: jit may move it anywhere
    return jax.random.wrap_key_data(value, impl=key_impl) if key_impl else value
