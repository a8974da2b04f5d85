"""Weights between PyTorch's layout and ours, as NumPy arrays (torch is not needed).

Layers carry the same names on both sides, except that PyTorch's containers number theirs
(`features.0`) and ours cannot hold a dot (`features_0`). What changes is the layout:

    convolution  weight [F, C, k, k]        <->  kernel [k, k, C, F]
    linear       weight [out, in]           <->  kernel [in, out]
    both         bias [out]                 <->  bias [out]
    batch norm   weight, bias [C]           <->  scale, bias [C]
                 running_mean, running_var  <->  batch_stats: mean, var [C]
                 num_batches_tracked        <->  nothing: PyTorch counts, we have no use for it

and the first linear layer reads the last convolution's output, which PyTorch flattens channels
first (C, H, W) and we flatten channels last (H, W, C): its inputs are permuted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cifar_jax.runtime.errors import UserError

Layers = Mapping[str, Mapping[str, Any]]

# Prefixes of our layer names that stand for a numbered PyTorch container.
CONTAINERS = ("features_", "classifier_")
# Where a checkpoint that holds more than weights keeps them.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# What `DataParallel` and `torch.compile` put before every name.
PREFIXES = ("module", "_orig_mod")
COUNTER = "num_batches_tracked"
AVERAGED = "n_averaged"  # what `AveragedModel` counts, beside the weights
SHOWN = 4  # differences that an error lists


def torch_name(layer: str) -> str:
    """Returns PyTorch's name of one of our layers: `features_3` is `features.3`."""
    for prefix in CONTAINERS:
        if layer.startswith(prefix):
            return prefix[:-1] + "." + layer.removeprefix(prefix)
    return layer


def to_torch(params: Layers, batch_stats: Layers | None = None) -> dict[str, np.ndarray]:
    """Returns the PyTorch state dict of our weights, as NumPy arrays of the same dtype.

    Args:
      params: {layer: {"kernel", "bias"}}, or {"scale", "bias"} for batch normalisation, as a
        model's `params`; the images the model reads are square.
      batch_stats: {layer: {"mean", "var"}} of the batch normalisations, if there are any.

    Raises:
      UserError: the first linear layer does not fit a square output of the last convolution.
    """
    state = {}
    for layer, flattened in _layers(params):
        name = torch_name(layer)
        if "scale" in params[layer]:
            state[f"{name}.weight"] = np.array(params[layer]["scale"])
            state[f"{name}.bias"] = np.array(params[layer]["bias"])
            statistics = (batch_stats or {}).get(layer)
            if statistics is not None:
                state[f"{name}.running_mean"] = np.array(statistics["mean"])
                state[f"{name}.running_var"] = np.array(statistics["var"])
                state[f"{name}.{COUNTER}"] = np.zeros((), np.int64)
            continue
        kernel = np.asarray(params[layer]["kernel"])
        if kernel.ndim == 4:
            weight = kernel.transpose(3, 2, 0, 1)
        elif flattened:
            side = _side(layer, kernel.shape[0], flattened)
            weight = kernel.reshape(side, side, flattened, -1).transpose(3, 2, 0, 1)
            weight = weight.reshape(kernel.shape[1], kernel.shape[0])
        else:
            weight = kernel.T
        state[f"{name}.weight"] = np.ascontiguousarray(weight)
        if "bias" in params[layer]:
            state[f"{name}.bias"] = np.array(params[layer]["bias"])
    return state


def from_torch(state: Mapping[str, Any], params: Layers) -> dict[str, dict[str, np.ndarray]]:
    """Returns our weights from a PyTorch state dict: the inverse of `to_torch`.

    For models without batch normalisation; see `variables_from_torch`.
    """
    return variables_from_torch(state, {"params": params})["params"]


def variables_from_torch(
    state: Mapping[str, Any], variables: Mapping[str, Layers]
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Returns our variables from a PyTorch state dict.

    Args:
      state: arrays by PyTorch's names (`conv1.weight`): whatever `numpy.asarray` takes.
      variables: the model's own (arrays or `jax.ShapeDtypeStruct`), {"params"} and, with batch
        normalisation, "batch_stats": for names, shapes and dtypes.

    Raises:
      UserError: entries are missing, unknown or of another shape; the message names the first,
        or the prefix under which all lie beside others.
    """
    params, stats = variables["params"], variables.get("batch_stats", {})
    wanted = torch_shapes(params, stats)
    problems = misfits(state, wanted)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        shown = _under_prefixes(state, wanted) or "; ".join([*problems[:SHOWN], *more])
        raise UserError(f"the PyTorch weights do not fit the model: {shown}")

    found: dict[str, dict] = {layer: {} for layer in params}
    for layer, flattened in _layers(params):
        for part, like in params[layer].items():
            name = f"{torch_name(layer)}.{'bias' if part == 'bias' else 'weight'}"
            value = np.asarray(state[name])
            if part == "kernel":
                value = _kernel(layer, value, flattened)
            found[layer][part] = np.array(value, like.dtype, order="C")
    found_stats = {
        layer: {
            part: np.array(state[f"{torch_name(layer)}.running_{part}"], like.dtype)
            for part, like in stats[layer].items()
        }
        for layer in stats
    }
    return {"params": found, "batch_stats": found_stats}


def torch_shapes(params: Layers, batch_stats: Layers | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every entry of a model's PyTorch state dict, in order of use.

    Takes what `to_torch` takes, or the same as `jax.ShapeDtypeStruct`.
    """
    wanted = {}
    for layer, _ in _layers(params):
        name = torch_name(layer)
        for part, value in sorted(params[layer].items(), key=lambda item: item[0] == "bias"):
            shape = tuple(value.shape)
            if part == "kernel":
                shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
            wanted[f"{name}.{'bias' if part == 'bias' else 'weight'}"] = shape
        for part, value in (batch_stats or {}).get(layer, {}).items():
            wanted[f"{name}.running_{part}"] = tuple(value.shape)
    return wanted


def misfits(state: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns one phrase for each entry of a state dict that is missing, unknown or of a shape
    other than `wanted`; a batch normalisation's counter may be there or not, and so may single
    numbers of no layer (`loss`)."""
    counters = {
        f"{name.removesuffix('running_mean')}{COUNTER}"
        for name in wanted
        if name.endswith(".running_mean")
    }
    problems = [
        f"{name} is missing (shape {list(shape)})"
        for name, shape in wanted.items()
        if name not in state
    ]
    problems += [
        f"{name} is not of this model (shape {list(np.shape(value))})"
        for name, value in state.items()
        if name not in wanted and name not in counters and _is_of_layer(name, value)
    ]
    problems += [
        f"{name} has shape {list(np.shape(state[name]))}, the model needs {list(shape)}"
        for name, shape in wanted.items()
        if name in state and tuple(np.shape(state[name])) != tuple(shape)
    ]
    return problems


def unwrap(found: Any) -> dict[str, Any]:
    """Returns the state dict inside what a PyTorch file holds.

    It may be the state dict itself, with plain numbers and texts beside the weights, or a
    checkpoint that keeps it under one of `WRAPPERS`. What all its names begin with is left out
    (`module.`, `model._orig_mod.`), unless a name would keep no layer or the layers are numbered
    (`features.0.weight`).

    Raises:
      UserError: there is no such thing in it.
    """
    for name in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            return unwrap(found[name])
    arrays = isinstance(found, Mapping) and any(
        isinstance(name, str) and hasattr(value, "dtype") for name, value in found.items()
    )
    if not arrays:
        what = type(found).__name__
        if isinstance(found, Mapping):
            what = f"a dict of {', '.join(map(str, list(found)[:5])) or 'nothing'}"
        raise UserError(
            f"it holds no state dict, only {what}; looked for layers by name, also under "
            f"{', '.join(WRAPPERS)}"
        )
    plain = (bool, int, float, str, type(None))
    state = {
        str(name): value
        for name, value in found.items()
        if not isinstance(value, plain) and str(name).split(".")[-1] != AVERAGED
    }
    prefix = _common_prefix([name for name, value in state.items() if _is_of_layer(name, value)])
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _common_prefix(names: list[str]) -> str:
    """Returns what all names begin with, up to a dot, and leaves `layer.weight` of each."""
    parts = names[0].split(".")[:-1] if names else []
    while parts:
        prefix = "".join(f"{part}." for part in parts)
        rest = [name.removeprefix(prefix).split(".") for name in names]
        named = all(len(left) > 1 and not left[0].isdigit() for left in rest)
        if (named or parts[-1] in PREFIXES) and all(name.startswith(prefix) for name in names):
            return prefix
        parts.pop()
    return ""


def _is_of_layer(name: str, value: Any) -> bool:
    return "." in name or getattr(value, "ndim", 0) > 0


def _under_prefixes(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Returns where in a state dict of more than one network the weights lie, "" if nowhere."""
    first = next(iter(wanted))
    ends = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    found = [end for end in ends if all(end + name in state for name in wanted)]
    if not found:
        return ""
    others = [name for name in state if not name.startswith(found[0])]
    return (
        f"its weights lie under {' and '.join(map(repr, found))}, beside others "
        f"({', '.join(others[:2])}); save the state dict of that part alone"
    )


def last_layer(params: Layers) -> str:
    """Returns the layer that gives the logits: the linear one used last."""
    return _layers(params)[-1][0]


def _kernel(layer: str, weight: np.ndarray, flattened: int) -> np.ndarray:
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)
    if not flattened:
        return weight.T
    side = _side(layer, weight.shape[1], flattened)
    kernel = weight.reshape(-1, flattened, side, side).transpose(2, 3, 1, 0)
    return kernel.reshape(weight.shape[::-1])


def _layers(params: Layers) -> list[tuple[str, int]]:
    """Returns (layer, channels) in order of use; channels are those that the layer reads
    flattened from the last convolution, 0 for all layers but the first linear one."""

    def order(layer: str):
        kernel = params[layer].get("kernel")
        number = re.search(r"\d*$", layer).group()
        return kernel is not None and len(kernel.shape) == 2, int(number or 0)

    result, channels = [], 0
    for layer in sorted(params, key=order):
        if "kernel" not in params[layer]:
            result.append((layer, 0))
            continue
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
