"""Weights between PyTorch's layout and ours, as NumPy arrays (torch is not needed).

Layers carry the same names on both sides, modules within modules joined by dots
(`block1.conv2.weight`), except that PyTorch's containers number theirs (`features.0`) and ours
cannot hold a dot (`features_0`). What changes is the layout:

    convolution  weight [F, C, k, k]        <->  kernel [k, k, C, F]
    linear       weight [out, in]           <->  kernel [in, out]
    both         bias [out]                 <->  bias [out]
    batch norm   weight, bias [C]           <->  scale, bias [C]
                 running_mean, running_var  <->  batch_stats: mean, var [C]
                 num_batches_tracked        <->  nothing: PyTorch counts, we have no use for it

and a linear layer that reads a convolution's output flattened: PyTorch flattens channels first
(C, H, W) and we flatten channels last (H, W, C), so its inputs are permuted. Which one does, a
model says in `torch_layers`: either `layers.NUMBERED`, or names of convolutions and linear layers
in order of use, `("conv1", "block1.conv2", Flattened("fc1"), "fc2")`. Where it says nothing no
inputs are permuted, and `layers_of` gives a notice. Any other variable keeps its name and layout.
(A transposed convolution's kernel looks like any other's and is taken for one.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax.models.layers import NUMBERED, Flattened
from cifar_jax.runtime.errors import UserError, nearest

Layers = Mapping[str, Any]  # variables of modules, and modules within them, by name
TorchLayers = str | tuple[str, ...]

# PyTorch's names of ours, in the order of its state dicts.
NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}

# Our layer names that stand for a module of a numbered PyTorch container.
CONTAINED = re.compile(r"(features|classifier|layers|layer\d+|shortcut)_(\d+)")
# Where a checkpoint that holds more than weights keeps them.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# What `DataParallel` and `torch.compile` put before every name.
PREFIXES = ("module", "_orig_mod")
COUNTER = "num_batches_tracked"
AVERAGED = "n_averaged"  # what `AveragedModel` counts, beside the weights
SHOWN = 4  # differences that an error lists


def torch_name(layer: str) -> str:
    """Returns PyTorch's name of one of our layers: `features_3` is `features.3`."""
    return CONTAINED.sub(r"\1.\2", layer) if CONTAINED.fullmatch(layer) else layer


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a PyTorch state dict: its name, its shape there, and where it lies in our
    variables, (collection, module, ..., variable). Ours, seen as `view` with its `axes` in
    PyTorch's order, is theirs."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    like: Any
    view: tuple[int, ...]
    axes: tuple[int, ...]

    def to_torch(self, value: Any) -> np.ndarray:
        value = np.asarray(value).reshape(self.view).transpose(self.axes)
        return np.array(value.reshape(self.shape), order="C")

    def from_torch(self, value: Any) -> np.ndarray:
        value = np.asarray(value).reshape([self.view[axis] for axis in self.axes])
        value = value.transpose(np.argsort(self.axes)).reshape(self.like.shape)
        return np.array(value, self.like.dtype, order="C")


def entries(variables: Mapping[str, Layers], torch_layers: TorchLayers = NUMBERED) -> list[Entry]:
    """Returns the entries of a model's PyTorch state dict, in order of use.

    Args:
      variables: {collection: tree} of arrays or `jax.ShapeDtypeStruct`.
      torch_layers: as a model states it, () where it does not.

    Raises:
      UserError: two variables have one name in PyTorch, or a flattened layer does not fit a square
        output of the last convolution, or comes before any.
    """
    leaves, known = flatten_dict(dict(variables)), list(NAMES)
    stated = [] if torch_layers == NUMBERED else list(torch_layers)
    flattened = [name for name in stated if isinstance(name, Flattened)]

    def order(path: tuple[str, ...]):
        layer, kind = ".".join(path[1:-1]), (path[0], path[-1])
        place = stated.index(layer) if layer in stated else len(stated)
        if torch_layers == NUMBERED:
            kernel = leaves.get(("params", *path[1:-1], "kernel"))
            number = int(re.search(r"\d*$", layer).group() or 0)
            place = kernel is not None and len(kernel.shape) == 2, number
        return place, layer, known.index(kind) if kind in known else len(known)

    result, channels = {}, 0
    for path in sorted(leaves, key=order):
        layer, kind, shape = ".".join(path[1:-1]), (path[0], path[-1]), tuple(leaves[path].shape)
        name, view, axes = NAMES.get(kind, path[-1]), shape, tuple(range(len(shape)))
        if kind == ("params", "kernel"):
            if len(shape) == 4:
                axes, channels = (3, 2, 0, 1), shape[3]
            elif len(shape) == 2:
                axes = (1, 0)
                if layer in flattened or (channels and torch_layers == NUMBERED):
                    view, axes = (*_side(layer, shape[0], channels), channels, -1), (3, 2, 0, 1)
                channels = 0
            else:
                name = path[-1]
        torch_shape = tuple(shape[axis] for axis in axes) if view is shape else shape[::-1]
        modules = [torch_name(name) for name in path[1:-1]]
        name = ".".join([*modules, name])
        if name in result:
            raise UserError(f"two of the model's variables would be {name} in a PyTorch state dict")
        result[name] = Entry(name, torch_shape, path, leaves[path], view, axes)
    return list(result.values())


def _side(layer: str, inputs: int, channels: int) -> tuple[int, int]:
    if not channels:
        raise UserError(f"torch_layers: no convolution stands before {layer}")
    side = math.isqrt(inputs // channels)
    if side * side * channels != inputs:
        raise UserError(f"{layer} reads {inputs} inputs, not {channels} channels of a square")
    return side, side


def layers_of(model: nn.Module, variables: Mapping[str, Layers]) -> tuple[TorchLayers, list[str]]:
    """Returns (the model's `torch_layers`, () where it states none, and then a notice if a linear
    layer may read a flattened feature map). Raises `UserError` for a layer it does not have."""
    stated, what = getattr(model, "torch_layers", ()), type(model).__name__
    if stated == NUMBERED:
        return stated, []
    found = {
        ".".join(e.path[1:-1]): e for e in entries(variables, stated) if e.path[-1] == "kernel"
    }
    for name in stated:
        if name not in found:
            raise UserError(f"torch_layers of {what}: no layer {name!r}; {nearest(name, found)}")
    features = {e.shape[0] for e in found.values() if e.axes == (3, 2, 0, 1)}
    linear = {e.name: e.shape[1] for e in found.values() if e.axes == (1, 0) and not stated}
    unknown = [k for k, n in linear.items() if any(n > c and n % c == 0 for c in features)]
    said = (
        f"{what} states no torch_layers: the inputs of {', '.join(unknown)} are left in this "
        "model's order, which is not PyTorch's where they are a flattened feature map"
    )
    return stated, [said] if unknown else []


def to_torch(
    params: Layers,
    batch_stats: Layers | None = None,
    torch_layers: TorchLayers = NUMBERED,
    **collections: Layers,
) -> dict[str, np.ndarray]:
    """Returns the PyTorch state dict of our weights, as NumPy arrays of the same dtype.

    Args:
      params, batch_stats, collections: the model's variables; the images it reads are square.
      torch_layers: see `entries`.

    Raises:
      UserError: a flattened layer does not fit a square output of the last convolution.
    """
    variables = {"params": params, "batch_stats": batch_stats or {}, **collections}
    state = {}
    for entry in entries(variables, torch_layers):
        state[entry.name] = entry.to_torch(entry.like)
        if entry.name.endswith("running_var"):
            state[entry.name.removesuffix("running_var") + COUNTER] = np.zeros((), np.int64)
    return state


def from_torch(state: Mapping[str, Any], params: Layers) -> dict[str, dict[str, np.ndarray]]:
    """Returns our weights from a PyTorch state dict: the inverse of `to_torch`.

    For models without batch normalisation; see `variables_from_torch`.
    """
    return variables_from_torch(state, {"params": params})["params"]


def variables_from_torch(
    state: Mapping[str, Any],
    variables: Mapping[str, Layers],
    torch_layers: TorchLayers = NUMBERED,
) -> dict[str, dict[str, Any]]:
    """Returns our variables from a PyTorch state dict.

    Args:
      state: arrays by PyTorch's names (`conv1.weight`): whatever `numpy.asarray` takes.
      variables: the model's own (arrays or `jax.ShapeDtypeStruct`), {"params", "batch_stats", ...}:
        for names, shapes and dtypes.
      torch_layers: see `entries`.

    Raises:
      UserError: entries are missing, unknown or of another shape; the message names the first,
        or the prefix under which all lie beside others.
    """
    wanted = entries(variables, torch_layers)
    shapes = {entry.name: entry.shape for entry in wanted}
    problems = misfits(state, shapes)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        shown = _under_prefixes(state, shapes) or "; ".join([*problems[:SHOWN], *more])
        raise UserError(f"the PyTorch weights do not fit the model: {shown}")
    by_path = {entry.path: entry for entry in wanted}
    paths = flatten_dict(dict(variables))  # in the order of the model's own
    found = {path: by_path[path].from_torch(state[by_path[path].name]) for path in paths}
    return {"params": {}, "batch_stats": {}, **unflatten_dict(found)}


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
