"""How the convolutions of `ops/large_tiles.py` cut a map into tiles, and the sizes' matrices.

Large tiles take few products and round more, and it is the points that decide how much. Pairs of
opposite signs nested between 0 and infinity in about equal ratios do best; errors of an output
(root mean square over that of the output; float32, 64 channels, normal data):

    F(m, 3)   points beside infinity          error     with 0, +-1, +-1/2, +-2, +-4 in their order
    2         0, +-1                          3.0e-7
    3         0, +-1, 1/2                     1.0e-6
    4         0, +-.5, +-1.5                  9.9e-7    1.6e-6 (0, +-1, +-2)
    5         +-.25, +-.9, +-2                1.6e-6    2.8e-6
    6         0, +-1, +-.5, +-2               3.3e-6    3.3e-6
    7         +-.15, +-.7, +-1.1, +-2         8.3e-6    3.0e-5
    8         0, +-.4, +-.8, +-1.2, +-2.2     1.8e-5    2.2e-4
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.ops import winograd

# Points for each n = m + k - 1, by a search for the least error (float32, F(m, 3)); others are
# those of `winograd.POINTS`.
_PAIRS = {
    6: ("0.5", "1.5"),
    7: ("0.25", "0.9", "2"),
    9: ("0.15", "0.7", "1.1", "2"),
    10: ("0.4", "0.8", "1.2", "2.2"),
}


def _points(n: int) -> tuple[Fraction | int, ...]:
    if n in (3, 5):
        return (0, 1, -1, Fraction(1, 2))[: n - 1]
    if n not in _PAIRS:
        return winograd.POINTS[n]
    pairs = [sign * Fraction(p) for p in _PAIRS[n] for sign in (1, -1)]
    return tuple(pairs) if n % 2 else (0, *pairs)


LARGEST = 8  # outputs of a tile along each direction


@functools.cache
def matrices(size: int, kernel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `winograd.matrices` of F(size, kernel) with the points of this file."""
    return winograd.matrices(size, kernel, _points(size + kernel - 1))


@dataclasses.dataclass(frozen=True)
class Span:
    """A tile along one direction: outputs start .. start + size, from inputs low .. high.

    `size` and `before` decide its matrices: `before` of the size + k - 1 inputs that it would read
    lie in the padding in front of the map.
    """

    start: int
    size: int
    kernel: int
    low: int
    high: int
    before: int

    @property
    def reads(self) -> int:
        return self.size + self.kernel - 1

    def matrices(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Returns (A^T [m, n], B^T [n, inputs inside the map])."""
        a, _, b = matrices(self.size, self.kernel)
        inside = b.T[:, self.before : self.before + self.high - self.low]
        return jnp.asarray(a.T.copy(), dtype), jnp.asarray(inside.copy(), dtype)


def _parts(length: int, even: bool) -> tuple[int, ...]:
    """Cuts a length into the fewest parts of at most `LARGEST`, about equal, the larger first."""
    unit = 2 if even else 1
    units, count = length // unit, -(-length // LARGEST)
    return tuple(unit * (units // count + (i < units % count)) for i in range(count))


def _equal_parts(length: int, even: bool) -> tuple[int, int]:
    """Returns (parts, size): equal ones that cover a length and read the least in all."""
    unit, least = (2 if even else 1), -(-length // LARGEST)

    def size(parts):
        return -(-length // (parts * unit)) * unit

    parts = min(range(least, least + 2), key=lambda parts: parts * (size(parts) + 2))
    best = parts * (size(parts) + 2)
    same = least + 1
    parts = same if same * (size(same) + 2) <= best else parts
    return parts, size(parts)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of one convolution.

    Attributes:
      height, width: of the maps it reads.
      kernel, padding: k, and zeros around the maps.
      pool: whether a 2x2 max pool of stride 2 follows; it drops an odd last row or column.
      gelu: whether the maps it reads are to go through GELU first.
    """

    height: int
    width: int
    kernel: int
    padding: int
    pool: bool
    gelu: bool

    def kept(self, size: int) -> int:
        """Rows (or columns) that are computed of the `size` read."""
        out = size + 2 * self.padding - self.kernel + 1
        return out // 2 * 2 if self.pool else out

    @property
    def out_size(self) -> tuple[int, int]:
        step = 2 if self.pool else 1
        return self.kept(self.height) // step, self.kept(self.width) // step

    @property
    def loops(self) -> bool:
        """Whether equal tiles are computed in a loop."""
        return max(self.kept(self.height), self.kept(self.width)) > 2 * LARGEST

    def spans(self, size: int) -> tuple[Span, ...]:
        """The tiles along a direction of `size` inputs, where there is no loop."""
        found, start = [], 0
        for part in _parts(self.kept(size), self.pool):
            first, last = start - self.padding, start - self.padding + part + self.kernel - 1
            low, high = max(first, 0), min(last, size)
            found.append(Span(start, part, self.kernel, low, high, low - first))
            start += part
        return tuple(found)

    def equal_spans(self, size: int) -> tuple[int, Span]:
        """How many equal tiles there are in a direction, and the first, on padded maps."""
        count, part = _equal_parts(self.kept(size), self.pool)
        return count, Span(0, part, self.kernel, 0, part + self.kernel - 1, 0)
