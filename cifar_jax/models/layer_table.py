"""A table of a model's layers: output shapes, parameters and FLOPs, found without computing.

FLOPs are those of the forward pass for one image, at 2 a multiply-add, counted over matrix
products and convolutions only; biases, activations, pooling and normalisation are left out, as
is usual. A training step costs about three times as much: the gradients by the inputs (not
needed for the images themselves) and by the weights each repeat the products.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax.models import mode


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of the summary.

    Attributes:
      name: the module's path, as in the parameter tree; "" for what the model does itself.
      kind: the module's class.
      output_shape: without the batch axis.
      parameters: numbers trained in this module itself.
      flops: of the forward pass, an image.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    flops: int


def summarise(
    module: nn.Module,
    image_shape: Sequence[int] = (32, 32, 3),
    *,
    train: bool = False,
) -> list[Layer]:
    """Returns the layers of a linen model in the order they run.

    A module has a row when it holds parameters itself, or is the outermost of a part that holds
    none (dropout, flatten). Models with an attribute `lowering` are read in their plain form,
    `lax`, since the others compute the same in other shapes.

    Args:
      module: takes float images [N, *image_shape] and `train`.
      image_shape: height, width, channels.
      train: whether the training mode is summarised.
    """
    if hasattr(module, "lowering"):
        module = module.clone(lowering="lax")
    if hasattr(module, "remat"):
        module = module.clone(remat=False)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    calls: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            shape = getattr(output, "shape", ())
            calls[context.module.path] = (type(context.module).__name__, tuple(shape[1:]))
        return output

    def init(x):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        return module.init(keys, x, **mode(module, train))

    def apply(variables, x):
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        mutable = [name for name in variables if name != "params"]
        with nn.intercept_methods(record):
            return module.apply(variables, x, **mode(module, train), rngs=rngs, mutable=mutable)

    variables = jax.eval_shape(init, image)
    # Flax names each operation's scope after its module; the names below rely on it.
    products = _flops_by_scope(jax.make_jaxpr(apply)(variables, image).jaxpr)
    own = _own_parameters(variables.get("params", {}))
    return _rows(type(module).__name__, calls, own, products)


def _own_parameters(params) -> dict[tuple[str, ...], int]:
    """Returns the number of parameters each module holds itself, by path."""
    counts: dict[tuple[str, ...], int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        owner = tuple(key.key for key in path[:-1])
        counts[owner] = counts.get(owner, 0) + math.prod(leaf.shape)
    return counts


def _rows(model: str, calls: dict, own: dict, products: dict) -> list[Layer]:
    shown: dict[tuple[str, ...], int] = {}

    def has_parameters(path) -> bool:
        return any(owner[: len(path)] == path for owner in own)

    # Paths come innermost first, as calls return; parents must be judged before children.
    order = list(calls)
    for path in sorted(order, key=len):
        parents = [path[:n] for n in range(1, len(path))]
        if path and (
            path in own or not (has_parameters(path) or any(parent in shown for parent in parents))
        ):
            shown[path] = 0
    if () in own or not shown:
        shown[()] = 0
    for scope, flops in products.items():
        path = scope[1:] if scope[:1] == (model,) else scope
        while path and path not in shown:
            path = path[:-1]
        shown[path] = shown.get(path, 0) + flops
    calls.setdefault((), (model, ()))
    return [
        Layer("/".join(path), *calls[path], own.get(path, 0), shown[path])
        for path in [*order, *({()} - set(order))]
        if path in shown
    ]


def _flops_by_scope(jaxpr, outer: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Returns the FLOPs of matrix products and convolutions, summed by scope of names."""
    totals: dict[tuple[str, ...], int] = {}
    for equation in jaxpr.eqns:
        names = str(equation.source_info.name_stack)
        scope = (*outer, *(name for name in names.split("/") if name))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        found = {scope: _product_flops(equation)}
        for value in jax.tree_util.tree_leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                for name, flops in _flops_by_scope(inner, scope).items():
                    found[name] = found.get(name, 0) + times * flops
        for name, flops in found.items():
            if flops:
                totals[name] = totals.get(name, 0) + flops
    return totals


def _product_flops(equation) -> int:
    output = equation.outvars[0].aval.shape if equation.outvars else ()
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(output) * math.prod(left[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(output) * math.prod(kernel) // features
    return 0


def format_table(layers: Sequence[Layer]) -> str:
    """Returns the rows as lines of aligned columns, with a last line of the totals."""
    head = ("layer", "kind", "output", "parameters", "FLOPs/image")
    body = [
        (
            layer.name or "(model)",
            layer.kind,
            "x".join(map(str, layer.output_shape)) or "-",
            f"{layer.parameters:,}" if layer.parameters else "-",
            f"{layer.flops:,}" if layer.flops else "-",
        )
        for layer in layers
    ]
    parameters = sum(layer.parameters for layer in layers)
    flops = sum(layer.flops for layer in layers)
    total = ("total", "", "", f"{parameters:,}", f"{flops:,}")
    widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(cells) -> str:
        left = [f"{cell:<{width}}" for cell, width in zip(cells[:3], widths[:3], strict=True)]
        right = [f"{cell:>{width}}" for cell, width in zip(cells[3:], widths[3:], strict=True)]
        return "  ".join(left + right).rstrip()

    return "\n".join([line(head), rule, *map(line, body), rule, line(total)])
