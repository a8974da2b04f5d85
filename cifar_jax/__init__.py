"""CIFAR-10 training in pure-functional JAX, for people who know the PyTorch tutorial.

The names below are what research code imports; each is loaded when it is first used, so that
`import cifar_jax` costs next to nothing.
"""

from __future__ import annotations

import gc
import importlib
import sys

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
    "MODELS": "models",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "TrainState": "steps",
    "UserError": "runtime.errors",
    "batches": "input_pipeline",
    "create_state": "steps",
    "epoch_order": "input_pipeline",
    "eval_step": "steps",
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
