"""Dropout masks from a counter and a hash.

Whether feature j of example i is kept depends on the key, on i and on j alone: not on the batch
it is in, on the layout or on the number of devices. A counter i * D + j goes through two rounds
of a multiply-xorshift finaliser ("lowbias32" of Wellons' hash prospector, the shape of
MurmurHash3's), each keyed by one word of the random key, at about a tenth of the cost of the
generators behind `jax.random.bits` on a CPU. Its statistics are tested in
`tests/test_layers_dropout.py`; it is no cryptographic generator.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# The rng stream of such masks, with one key for all parts of a batch (`layers.Dropout`).
BY_EXAMPLE = "dropout_by_example"

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive counters


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit reaches every output bit."""
    h = (h ^ (h >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return h ^ (h >> jnp.uint32(16))


def random_words(
    key: jax.Array, shape: tuple[int, int], first_example: int | jax.Array = 0
) -> jax.Array:
    """Returns uint32 [N, D], uniform, for examples first_example..first_example + N - 1.

    Args:
      key: typed PRNG key (`threefry2x32` or `rbg`) or its raw uint32 words, 2 or 4.
      shape: (N, D); N * D of the global batch must stay below 2^32.
    """
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    words = words.reshape(-1)
    # Two words of threefry's keys; four of `rbg`'s, the second pair often equal to the first.
    k0, k1 = (words[0], words[1]) if words.size == 2 else words[:2] + words[2:] * jnp.uint32(3)
    rows, columns = shape
    first = jnp.asarray(first_example).astype(jnp.uint32) * jnp.uint32(columns)
    counter = lax.iota(jnp.uint32, rows * columns).reshape(rows, columns) + first
    h = _mix(counter * jnp.uint32(_GOLDEN) + k0)
    return _mix(h ^ _mix(k1))


def dropout_mask(
    key: jax.Array, shape: tuple[int, int], rate: float, first_example: int | jax.Array = 0
) -> jax.Array:
    """Returns bool [N, D], True (keep) with probability 1 - rate to within 2^-32."""
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return random_words(key, shape, first_example) >= threshold
