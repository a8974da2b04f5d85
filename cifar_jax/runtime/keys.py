"""Typed PRNG keys among the leaves of a tree: told from arrays of numbers, and stored as such."""

from __future__ import annotations

from typing import Any

import jax


def is_key(leaf: Any) -> bool:
    """Whether it is an array of typed PRNG keys (or stands for one)."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """Returns the words of typed keys, uint32 [..., words of a key]; any other leaf as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def typed_as(leaf: Any, value: Any) -> Any:
    """Returns what `plain` made `value` of: keys of the kind of `leaf`, if that is one."""
    if not is_key(leaf):
        return value
    return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
