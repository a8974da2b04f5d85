"""CIFAR-10 training in pure-functional JAX, for people who know the PyTorch tutorial.

The names below are what research code imports; each is loaded when it is first used, so that
`import cifar_jax` costs next to nothing.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `__getattr__` finds, for editors and type checkers
    from cifar_jax.datasets import Dataset as Dataset
    from cifar_jax.datasets import load_dataset as load_dataset
    from cifar_jax.fitting import fit as fit
    from cifar_jax.input_pipeline import batches as batches
    from cifar_jax.input_pipeline import epoch_order as epoch_order
    from cifar_jax.input_pipeline import split_indices as split_indices
    from cifar_jax.input_pipeline import take_batch as take_batch
    from cifar_jax.models import MODELS as MODELS
    from cifar_jax.models import make_model as make_model
    from cifar_jax.optimizers import make_optimizer as make_optimizer
    from cifar_jax.parallel.data_parallel import pmap_eval_step as pmap_eval_step
    from cifar_jax.parallel.data_parallel import pmap_train_step as pmap_train_step
    from cifar_jax.parallel.data_parallel import shard_map_eval_step as shard_map_eval_step
    from cifar_jax.parallel.data_parallel import shard_map_train_step as shard_map_train_step
    from cifar_jax.recipes import RECIPES as RECIPES
    from cifar_jax.result import Result as Result
    from cifar_jax.runtime.errors import UserError as UserError
    from cifar_jax.settings import Recipe as Recipe
    from cifar_jax.steps import TrainState as TrainState
    from cifar_jax.steps import create_state as create_state
    from cifar_jax.steps import eval_step as eval_step
    from cifar_jax.steps import inference_variables as inference_variables
    from cifar_jax.steps import make_preprocess as make_preprocess
    from cifar_jax.steps import predict_step as predict_step
    from cifar_jax.steps import train_step as train_step

# Whether this is `python -m cifar_jax.train` or another command of ours: while the module is looked
# up `argv` is "-m" and the arguments, and the word before these is its name.
_word = "".join(sys.orig_argv[-len(sys.argv) :][:1])
IS_COMMAND = (
    sys.argv[:1] == ["-m"] and (_word == __name__ or _word.startswith(f"{__name__}."))
) or "".join(sys.argv[:1]).endswith("/cifar-jax")
# The collector would spend a quarter of the time the imports take (0.5 of 2 s) on objects that
# stay. `errors.run_command` starts it.
if IS_COMMAND:
    gc.disable()

__version__ = "0.1.0"

_HOMES = {
    "Dataset": "datasets",
    "MODELS": "models",
    "RECIPES": "recipes",
    "Recipe": "settings",
    "Result": "result",
    "TrainState": "steps",
    "UserError": "runtime.errors",
    "batches": "input_pipeline",
    "create_state": "steps",
    "epoch_order": "input_pipeline",
    "eval_step": "steps",
    "fit": "fitting",
    "inference_variables": "steps",
    "load_dataset": "datasets",
    "make_model": "models",
    "make_optimizer": "optimizers",
    "make_preprocess": "steps",
    "pmap_eval_step": "parallel.data_parallel",
    "pmap_train_step": "parallel.data_parallel",
    "predict_step": "steps",
    "shard_map_eval_step": "parallel.data_parallel",
    "shard_map_train_step": "parallel.data_parallel",
    "split_indices": "input_pipeline",
    "take_batch": "input_pipeline",
    "train_step": "steps",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
