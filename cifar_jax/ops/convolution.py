"""How a convolution is computed: the choice of lowering, and the one function behind all.

- `lax`: `lax.conv_general_dilated`, NHWC/HWIO. The choice on TPU, and on a GPU but for small steps.
- `patches`: one matrix product of all neighbourhoods, NHWC (`ops/windows.py`). The choice for small
  steps on a GPU.
- `gemm`: patches and one matrix product over blocks (`ops/im2col.py`).
- `winograd`: Winograd's minimal filtering as batched matrix products (`ops/winograd.py`) for
  kernels of 3 and 5; other kernels take the `gemm` form.
- `pieces`: Winograd's with tiles as large as the map, the batch in pieces (`ops/pieces.py`,
  `ops/large_tiles.py`), for kernels of 3. The choice for large batches of airbench on a CPU.
- `auto`: by backend and shape, from `choose`; `mixed` is its own, `winograd` where no gradient is
  taken and `gemm` where one is.

All of them take the same parameters, any image size, batch and padding, and agree to rounding.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.ops import large_tiles, layout, windows, winograd
from cifar_jax.ops import pieces as in_pieces
from cifar_jax.ops import pool as pool_ops
from cifar_jax.ops.im2col import Geometry, im2col_conv
from cifar_jax.ops.layout import Blocked
from cifar_jax.ops.pieces import Pieces
from cifar_jax.ops.windows import Window
from cifar_jax.ops.winograd import winograd_conv
from cifar_jax.runtime.errors import UserError, check_batched, nearest

LOWERINGS = ("auto", "lax", "patches", "gemm", "winograd", "pieces")
# Below so many input channels the transforms of Winograd's form may cost more than its smaller
# products save. Two AVX-512 cores, whole programs in turn, `winograd` against `gemm`:
#   3x3 on 3 channels (dropout_cnn): training b20 0.95x, b128 0.87x, evaluation 0.94 to 1.12x;
#   5x5 on 3 channels: training tutorial b4 1.1x, adam b128 1.2x, deep 1.07x, evaluation of
#     tutorial_cnn 1.2 to 1.4x, of deep_cnn 1.2x (with sums in place of products,
# `ops/winograd.py`);
#   5x5 on 6 channels: training tutorial b4 0.84x, adam b128 1.0x, evaluation 1.15x.
# From 10 channels on `winograd` is faster throughout.
WINOGRAD_FROM_CHANNELS = 8
# A GPU computes so small steps of so few channels as `patches`: without a call of cuDNN a step is
# one CUDA graph. H100, jax 0.11.2, training steps/s against `lax`: tutorial_cnn b4 16,500 and
# 9,600, dropout_cnn b20 10,100 and 5,900, adam b128 5,600 and 5,200. Larger ones are not measured.
GPU_PATCHES_IMAGES, GPU_PATCHES_CHANNELS = 128, 32
# From so many images on a device, a CPU computes networks that call `laid_out` in `pieces`. Others,
# whose layers would go to and fro between pieces and images, were not measured.
PIECES_IMAGES = 256
YNN_OPTION = "xla_cpu_experimental_ynn_fusion_type"


def cpu_compiler_options(in_pieces: bool = False) -> dict[str, str]:
    """Options for `jax.jit(..., compiler_options=...)` of a program with these convolutions.

    jaxlib 0.10.2 wraps convolutions and whole chains of operations around products in YNNPACK
    fusions by default; leaving only single products to it is up to ten times faster for these
    shapes. The products of `in_pieces` are as large as Eigen likes them, which gets them all: a
    step of airbench94 takes 0.85 times as long. Returns {} off the CPU, and where XLA_FLAGS already
    sets the option.
    """
    if jax.default_backend() != "cpu" or YNN_OPTION in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {YNN_OPTION: "" if in_pieces else "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def choose(
    lowering: str,
    kernel: int,
    channels: int,
    out_size: tuple[int, int],
    pool: bool = False,
    images: int = 1,
) -> tuple[str, int]:
    """Returns (`lax` | `patches` | `gemm` | `winograd` | `pieces` | `mixed`, outputs of a block
    along each direction).

    Args:
      lowering: one of `LOWERINGS`.
      kernel, channels: size of the kernel and channels it reads.
      out_size: (rows, columns) of the convolution's output, before the pool.
      pool: whether a 2x2 pool follows.
      images: in the batch.

    Raises:
      UserError: `lowering` is not one of `LOWERINGS`.
    """
    if lowering not in LOWERINGS:
        raise UserError(f"unknown lowering {lowering!r}; {nearest(lowering, LOWERINGS)}")
    if lowering == "auto":
        backend = jax.default_backend()
        small = images <= GPU_PATCHES_IMAGES and channels <= GPU_PATCHES_CHANNELS
        off_cpu = "patches" if backend == "gpu" and small else "lax"
        lowering = _fastest(kernel, channels) if backend == "cpu" else off_cpu
    if lowering == "pieces" and not large_tiles.supports(kernel):
        lowering = "gemm"
    if lowering in _ON_IMAGES:
        return lowering, 1
    if lowering == "winograd":
        block = 2 if max(out_size) <= 2 else 4
        if winograd.supports(block, kernel):
            return "winograd", block
    # Blocks of 4 where the next layer will want them; a pool halves the blocks anyway.
    block = 4 if kernel >= 5 and not pool and min(out_size) >= 8 else 2
    return "mixed" if lowering == "mixed" else "gemm", block


def _fastest(kernel: int, channels: int) -> str:
    if channels >= WINOGRAD_FROM_CHANNELS:
        return "winograd"
    if kernel != 5:
        return "gemm"
    return "winograd" if channels <= 3 else "mixed"


def convolve(
    x: jax.Array | Blocked | Pieces,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    padding: int = 0,
    pool: bool = False,
    lowering: str = "auto",
) -> jax.Array | Blocked | Pieces:
    """Convolution of stride 1, then bias, relu and a 2x2 max pool of stride 2.

    Args:
      x: float [N, H, W, C], or the same as `Blocked`, or, without a bias, as `Pieces`.
      kernel: [k, k, C, F]; cast to the dtype of `x`.
      bias: [F], or None for the bare convolution: no bias, relu or pool.
      padding: zeros around the images.
      pool: rows and columns left over by an odd size are dropped.
      lowering: one of `LOWERINGS`.

    Returns:
      `Pieces` of `Pieces`, else [N, H', W', F] with a form over images and `Blocked` with one over
      blocks; in the dtype of `x`. The block forms compute
      bfloat16 and float16 in float32 and round the result.

    Raises:
      UserError: unknown lowering, images without a batch axis, or smaller than the kernel or the
        pool.
    """
    if isinstance(x, Blocked | Pieces):
        size = (x.height, x.width)
    else:
        check_batched(x)
        size = x.shape[1:3]
    k, _, channels, _ = kernel.shape
    out = tuple(s + 2 * padding - k + 1 for s in size)
    if min(out) < (2 if pool else 1):
        raise too_small(size, f"a {k}x{k} convolution{' with a 2x2 pool' if pool else ''}")
    if isinstance(x, Pieces):
        if large_tiles.supports(k):
            return large_tiles.convolve(x, kernel, padding, pool)
        return in_pieces.convolve_direct(x, kernel, padding)
    images = x.batch if isinstance(x, Blocked) else x.shape[0]
    form, block = choose(lowering, k, channels, out, pool, images)
    if form in _ON_IMAGES:
        return _images(x, kernel, bias, padding, pool, _ON_IMAGES[form])
    return _blocks(x, kernel, bias, padding, pool, form, block)


def too_small(size: tuple[int, ...], what: str) -> UserError:
    """Returns the error for images (or features) of `size` (H, W), too small for `what`."""
    return UserError(
        f"images of {size[0]}x{size[1]} are too small here for {what}: use larger images"
    )


def to_images(x: jax.Array | Blocked | Pieces) -> jax.Array:
    """[N, H, W, C] of any form."""
    if isinstance(x, Pieces):
        return in_pieces.to_images(x)
    return layout.to_images(x) if isinstance(x, Blocked) else x


def laid_out(x: jax.Array, lowering: str, mask: jax.Array | None = None) -> jax.Array | Pieces:
    """Images [N, H, W, C] as a network of 3x3 convolutions, pools and batch normalisations should
    take them: as `Pieces` where `lowering` says so, else as they are.

    Args:
      mask: [N], 1 for images that count in statistics; None for all.
    """
    return in_pieces.to_pieces(x, mask) if takes_pieces(lowering, x.shape[0]) else x


def takes_pieces(lowering: str, images: int) -> bool:
    """Whether so many images on a device become `Pieces` in a network that calls `laid_out`."""
    large = jax.default_backend() == "cpu" and images >= PIECES_IMAGES
    return lowering == "pieces" or (lowering == "auto" and large)


def strided(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int, lowering: str = "auto"
) -> jax.Array:
    """Bare convolution of [N, H, W, C] with [k, k, C, F] and a stride: on a CPU by `windows`, but
    for the lowering `lax`."""
    if lowering != "lax" and jax.default_backend() == "cpu":
        return _windows(x, kernel.astype(x.dtype), padding, stride)
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _images(x, kernel, bias, padding, pool, conv):
    x = to_images(x)
    y = conv(x, kernel.astype(x.dtype), padding)
    if bias is None:
        return y
    bias = bias.astype(x.dtype)
    if pool:
        return pool_ops.bias_relu_pool_images(y, layout.like(bias, y))
    return jax.nn.relu(y + bias.reshape(1, 1, 1, -1))


def _lax(x, kernel, padding):
    return strided(x, kernel, 1, padding, "lax")


def _windows(x, kernel, padding, stride=1):
    window = Window(kernel.shape[:2], (stride, stride), ((padding, padding),) * 2)
    return windows.convolve(x, kernel, window)


def _pieces(x, kernel, padding):
    y = large_tiles.convolve(in_pieces.to_pieces(x), kernel, padding, pool=False)
    return in_pieces.to_images(y).astype(x.dtype)


_ON_IMAGES = {"lax": _lax, "patches": _windows, "pieces": _pieces}


def _blocks(x, kernel, bias, padding, pool, form, block):
    fresh = not isinstance(x, Blocked)
    x = layout.to_blocked(x, block) if fresh else layout.reblock(x, block)
    if padding:
        x = layout.clear_overhang(x)
    g = Geometry(block, kernel.shape[0], padding, x.batch, x.height, x.width, x.tiles, fresh)
    given = x.phases.dtype
    phases = x.phases.astype(jnp.float32 if given.itemsize < 4 else given)
    kernel = layout.like(kernel.astype(given).astype(phases.dtype), phases)
    y = _CONVS[form](phases, kernel, g)
    height, width = g.out_size
    if bias is not None:
        bias = layout.like(bias.astype(given).astype(phases.dtype), phases)
        if pool:
            y, height, width = pool_ops.bias_relu_pool(y, bias), height // 2, width // 2
        else:
            y = pool_ops.bias_relu(y, bias)
    return Blocked(y.astype(given), x.batch, height, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mixed_conv(x: jax.Array, kernel: jax.Array, g: Geometry) -> jax.Array:
    """`winograd_conv` where no gradient is taken, `im2col_conv` and its gradients where one is."""
    return winograd_conv(x, kernel, g)


def _mixed_forward(x, kernel, g):
    return jax.vjp(lambda x, kernel: im2col_conv(x, kernel, g), x, kernel)


mixed_conv.defvjp(_mixed_forward, lambda g, gradients, dy: gradients(dy))

_CONVS = {"gemm": im2col_conv, "winograd": winograd_conv, "mixed": mixed_conv}
