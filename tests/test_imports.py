"""What importing and training load: nothing heavy, never torch, never TensorFlow."""

import json

from tiny_data import python, tiny

import cifar_jax

__all__ = ["tiny"]


def printed(code, *arguments):
    """What code prints last in a fresh interpreter, as JSON."""
    return json.loads(python(code, *arguments).splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy():
    loaded = printed(
        "import json, sys, cifar_jax\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    heavy = {"flax", "grain", "jax", "matplotlib", "optax", "orbax", "PIL", "tensorflow"}
    heavy |= {"numpy", "tensorflow_datasets", "torch"}
    assert "cifar_jax" in loaded
    assert not heavy & set(loaded)


def test_public_names_resolve():
    names = [name for name in cifar_jax.__all__ if name != "__version__"]
    for name in names:
        assert getattr(cifar_jax, name) is not None
        assert name in dir(cifar_jax)
    assert {"MODELS", "RECIPES", "create_state", "train_step", "eval_step", "predict_step"} <= set(
        names
    )


TRAIN = """
import json, sys
from cifar_jax import train
summary = train.main(sys.argv[1:])
loaded = [name for name in ("torch", "tensorflow", "matplotlib") if name in sys.modules]
print(json.dumps({"loaded": loaded, "correct": summary["test_correct"]}))
"""


def test_training_loads_neither_torch_nor_tensorflow(tiny, tmp_path):
    options = ["--recipe", "adam", "--epochs", 1, "--conv", "lax", "--no-plots"]
    result = printed(TRAIN, *options, "--data-dir", tiny, "--workdir", tmp_path / "run")
    assert result["loaded"] == []
    assert 0 <= result["correct"] <= 200


COLLECTOR = """
import gc, json, sys
sys.argv = json.loads(sys.argv[1])
import cifar_jax
from cifar_jax.errors import run_command
found = [gc.isenabled()]
run_command(lambda: found.extend([gc.isenabled(), gc.get_freeze_count() > 0]))
print(json.dumps(found))
"""


def test_only_a_command_imports_without_the_garbage_collector_and_none_runs_without_it():
    assert printed(COLLECTOR, '["-m"]') == [False, True, True]  # as `python -m` has it
    assert printed(COLLECTOR, '["research.py"]') == [True, True, False]
