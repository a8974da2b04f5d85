"""Weights between PyTorch's layout and ours, as NumPy arrays (torch is not needed).

Layers carry the same names on both sides, except that PyTorch's containers number theirs
(`features.0`) and ours cannot hold a dot (`features_0`). What changes is the layout:

    convolution  weight [F, C, k, k]  <->  kernel [k, k, C, F]
    linear       weight [out, in]     <->  kernel [in, out]
    both         bias [out]           <->  bias [out]

and the first linear layer reads the last convolution's output, which PyTorch flattens channels
first (C, H, W) and we flatten channels last (H, W, C): its inputs are permuted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cifar_jax.errors import UserError

# Prefixes of our layer names that stand for a numbered PyTorch container.
CONTAINERS = ("features_", "classifier_")


def torch_name(layer: str) -> str:
    """Returns PyTorch's name of one of our layers: `features_3` is `features.3`."""
    for prefix in CONTAINERS:
        if layer.startswith(prefix):
            return prefix[:-1] + "." + layer.removeprefix(prefix)
    return layer


def to_torch(params: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the PyTorch state dict of our weights, as NumPy arrays of the same dtype.

    Args:
      params: {layer: {"kernel", "bias"}}, as a model's `params`; the images the model reads
        are square.

    Raises:
      UserError: the first linear layer does not fit a square output of the last convolution.
    """
    state = {}
    for layer, flattened in _layers(params):
        kernel = np.asarray(params[layer]["kernel"])
        if kernel.ndim == 4:
            weight = kernel.transpose(3, 2, 0, 1)
        elif flattened:
            side = _side(layer, kernel.shape[0], flattened)
            weight = kernel.reshape(side, side, flattened, -1).transpose(3, 2, 0, 1)
            weight = weight.reshape(kernel.shape[1], kernel.shape[0])
        else:
            weight = kernel.T
        name = torch_name(layer)
        state[f"{name}.weight"] = np.ascontiguousarray(weight)
        state[f"{name}.bias"] = np.array(params[layer]["bias"])
    return state


def from_torch(
    state: Mapping[str, Any], params: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns our weights from a PyTorch state dict: the inverse of `to_torch`.

    Args:
      state: arrays by PyTorch's names (`conv1.weight`): whatever `numpy.asarray` takes.
      params: the model's own `params` (arrays or `jax.ShapeDtypeStruct`), for names, shapes
        and dtypes.

    Raises:
      UserError: entries are missing, unknown or of another shape; the message lists them all.
    """
    wanted = {}
    for layer, _ in _layers(params):
        shape = params[layer]["kernel"].shape
        turned = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        wanted[f"{torch_name(layer)}.weight"] = turned
        wanted[f"{torch_name(layer)}.bias"] = params[layer]["bias"].shape
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is not of this model" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {list(np.shape(state[name]))}, the model needs {list(shape)}"
        for name, shape in wanted.items()
        if name in state and tuple(np.shape(state[name])) != tuple(shape)
    ]
    if problems:
        raise UserError(f"the PyTorch weights do not fit the model: {'; '.join(problems)}")

    result = {}
    for layer, flattened in _layers(params):
        weight = np.asarray(state[f"{torch_name(layer)}.weight"])
        if weight.ndim == 4:
            kernel = weight.transpose(2, 3, 1, 0)
        elif flattened:
            side = _side(layer, weight.shape[1], flattened)
            kernel = weight.reshape(-1, flattened, side, side).transpose(2, 3, 1, 0)
            kernel = kernel.reshape(weight.shape[::-1])
        else:
            kernel = weight.T
        result[layer] = {
            "kernel": np.ascontiguousarray(kernel, params[layer]["kernel"].dtype),
            "bias": np.array(state[f"{torch_name(layer)}.bias"], params[layer]["bias"].dtype),
        }
    return {layer: result[layer] for layer in params}


def _layers(params: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Returns (layer, channels) in order of use; channels are those that the layer reads
    flattened from the last convolution, 0 for all layers but the first linear one."""

    def order(layer: str):
        number = re.search(r"\d*$", layer).group()
        return len(params[layer]["kernel"].shape) == 2, int(number or 0)

    result, channels = [], 0
    for layer in sorted(params, key=order):
        shape = params[layer]["kernel"].shape
        is_linear = len(shape) == 2
        result.append((layer, channels if is_linear else 0))
        channels = 0 if is_linear else shape[3]
    return result


def _side(layer: str, inputs: int, channels: int) -> int:
    side = math.isqrt(inputs // channels)
    if side * side * channels != inputs:
        raise UserError(f"{layer} reads {inputs} inputs, not {channels} channels of a square")
    return side
