"""What importing and training load: nothing heavy, never torch, never TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path

from tiny_data import tiny  # noqa: F401

import cifar_jax

ROOT = Path(__file__).resolve().parents[1]


def python(code, *arguments):
    """Runs code in a fresh interpreter and returns what it prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy():
    loaded = python(
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


def test_training_loads_neither_torch_nor_tensorflow(tiny, tmp_path):  # noqa: F811
    options = ["--recipe", "adam", "--epochs", 1, "--conv", "lax", "--no-plots"]
    result = python(TRAIN, *options, "--data-dir", tiny, "--workdir", tmp_path / "run")
    assert result["loaded"] == []
    assert 0 <= result["correct"] <= 200
