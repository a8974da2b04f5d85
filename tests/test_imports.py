"""What importing and training load: nothing heavy, never torch, never TensorFlow."""

import ast
import json
import os
import pathlib
import subprocess
import sys

from tiny_data import ROOT, python, tiny, words

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


def test_editors_see_the_names_that_are_loaded_lazily():
    source = pathlib.Path(cifar_jax.__file__)
    seen = {
        alias.asname: node.module.removeprefix("cifar_jax.")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("cifar_jax.")
        for alias in node.names
    }
    assert seen == cifar_jax._HOMES
    assert source.with_name("py.typed").exists()


TRAIN = """
import json, sys
from cifar_jax import train
summary = train.main(sys.argv[1:])
loaded = [name for name in ("torch", "tensorflow", "matplotlib") if name in sys.modules]
print(json.dumps({"loaded": loaded, "correct": summary["test_correct"]}))
"""


def test_training_loads_neither_torch_nor_tensorflow(tiny, tmp_path):
    options = words("--recipe adam --epochs 1 --batch-size 60 --conv gemm --no-plots")
    result = printed(TRAIN, *options, "--data-dir", tiny, "--workdir", tmp_path / "run")
    assert result["loaded"] == []
    assert 0 <= result["correct"] <= 200


COLLECTOR = """
import gc, json, sys
sys.argv = json.loads(sys.argv[1])
sys.orig_argv = ["python", "-X", "dev", "-m", *json.loads(sys.argv.pop())]
import cifar_jax
from cifar_jax.runtime.errors import run_command
found = [gc.isenabled()]
run_command(lambda: found.extend([gc.isenabled(), gc.get_freeze_count() > 0]))
print(json.dumps(found))
"""


def test_only_a_command_imports_without_the_garbage_collector_and_none_runs_without_it():
    def found(argv, module_and_arguments):
        return printed(COLLECTOR, json.dumps([*argv, json.dumps(module_and_arguments)]))

    # As `python -m` has them while it looks the module up.
    assert found(["-m"], ["cifar_jax.train"]) == [False, True, True]
    assert found(["-m", "--x", "1"], ["cifar_jax.train", "--x", "1"]) == [False, True, True]
    assert found(["research.py"], ["cifar_jax.train"]) == [True, True, False]
    assert found(["-m", "cifar_jax.train"], ["mylab.run", "cifar_jax.train"]) == [True, True, False]
    assert found(["-m"], ["mylab.cifar_jax"]) == [True, True, False]


def test_a_package_that_imports_this_one_keeps_its_collector(tmp_path):
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "__init__.py").write_text("import cifar_jax")
    (tmp_path / "mylab" / "run.py").write_text("import gc; print(gc.isenabled())")
    done = subprocess.run(
        [sys.executable, "-m", "mylab.run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"


CALLER = """
import json, logging, sys, warnings
def state():
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    return [sys.unraisablehook, warnings.showwarning, sys.stdout, sys.stderr, *map(list, (
        logger.filters for logger in loggers))]
import jax.numpy as jnp
import orbax.checkpoint
before = state()
from cifar_jax.runtime import compilation_cache
from cifar_jax.checkpoints.save_restore import Checkpoints
compilation_cache.enable()
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"w": jnp.float32(1)}, block=True)
print(json.dumps([a == b for a, b in zip(before, state())]))
"""


def test_a_callers_hooks_and_filters_stay_the_callers(tmp_path):
    assert printed(CALLER, tmp_path) == [True] * 6
