"""A prepared CIFAR-10 of 600 and 200 images, and runs of the train command on it in seconds."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from cifar_jax import evaluate, train
from cifar_jax.checkpoints import save_restore
from cifar_jax.models import MODELS, make_model
from cifar_jax.models.layers import ConvRelu, Dense, Dropout, Flatten
from cifar_jax.reporting.metrics_log import read_metrics
from cifar_jax.training import evaluation
from cifar_jax.training.workdir import read_config

ROOT = Path(__file__).resolve().parent.parent
words = str.split

NAMES = words("airplane automobile bird cat deer dog frog horse ship truck")
SIZES = {"train": 600, "test": 200}

# Everything that carries state from step to step: Adam's moments, an averaged copy of the weights,
# a schedule, random augmentation, a partly filled last batch, a window that straddles saves.
RICH = [
    *words("--recipe adam --conv gemm --devices 1 --epochs 4 --batch-size 14"),
    *words("--learning-rate 0.003 --schedule cosine --warmup-epochs 1 --ema-decay 0.8"),
    *words("--augment flip,translate --select-best --log-every 8"),
]
# The same with dropout as well, in a network of less to compile.
RICH_SMALL = [*RICH, *words("--model small")]
STEPS = 35  # an epoch of 480 images in batches of 14; the last holds 4


class Small(nn.Module):
    """A network with a convolution and dropout that compiles and trains in a moment."""

    num_classes: int = 10
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x, train=False):
        x = ConvRelu(4, 5, pool=True, lowering=self.lowering, name="conv1")(x)
        x = Dropout(0.25, name="dropout1")(Flatten(name="flatten")(x), train)
        return Dense(self.num_classes, name="fc1")(x)


@pytest.fixture(scope="module")
def small():
    """Registers `Small` as the model `small`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS, "small", Small)
        yield "small"


_made: dict[str, Path] = {}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tfds directory of the tiny set."""
    if "tiny" not in _made:
        _made["tiny"] = prepare_tiny(tmp_path_factory.mktemp("tiny"))
    return _made["tiny"]


@pytest.fixture(scope="session")
def complete(tiny, tmp_path_factory) -> Path:
    """The directory of a complete run of `RICH`, with pictures; what it said is in `said.txt`."""
    if "complete" not in _made:
        folder = tmp_path_factory.mktemp("complete")
        lines: list[str] = []
        arguments = [*RICH, "--data-dir", str(tiny), "--workdir", str(folder / "run")]
        train.main(arguments, say=lines.append)
        (folder / "said.txt").write_text("\n".join(lines))
        _made["complete"] = folder / "run"
    return _made["complete"]


@pytest.fixture(scope="session")
def test_images(tiny):
    """The tiny set's test split."""
    from cifar_jax.datasets import load_dataset

    return load_dataset("cifar10", data_dir=tiny, progress=False).splits["test"]


def evaluated(run: Path, data: Path, *arguments: str) -> tuple[dict, list[str]]:
    """What the evaluate command returns, and the lines it says."""
    lines: list[str] = []
    return evaluate.main([str(run), "--data-dir", str(data), *arguments], lines.append), lines


def copy_run(source: Path, target: Path) -> Path:
    """A copy of a run directory that a test may change."""
    shutil.copytree(source, target)
    return target


def tiny_arrays(seed=0):
    """Images that a CNN learns in a few epochs: a coloured patch for each class, in noise."""
    from cifar_jax.datasets.archives import Arrays

    rng = np.random.default_rng(seed)
    images, labels = {}, {}
    for split, size in SIZES.items():
        label = np.arange(size) % len(NAMES)
        pixels = rng.integers(0, 120, (size, 32, 32, 3))
        for k in range(len(NAMES)):
            column = 4 + 5 * (k % 5)
            pixels[label == k, 6:26, column : column + 5, k // 5] += 130
        images[split] = pixels.astype(np.uint8)
        labels[split] = {"label": label}
    return Arrays(images, labels, {"label": list(NAMES)})


def prepare_tiny(folder: Path, seed=0) -> Path:
    """Writes the tiny set as `cifar10` into a tfds directory; returns that directory."""
    from cifar_jax.datasets import load_dataset
    from cifar_jax.datasets.prepare import _write

    folder.mkdir(parents=True, exist_ok=True)
    _write("cifar10", folder, tiny_arrays(seed), progress=False)
    load_dataset("cifar10", data_dir=folder, progress=False)  # decodes, once
    return folder


def rows_of(workdir: Path, kind: str | None = None) -> list[dict]:
    return read_metrics(workdir / "metrics.jsonl", kind, timing=False)


def states_of(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the latest and of the best checkpoint, and what else they hold."""
    config = read_config(workdir)
    model = make_model(config.recipe.model, len(config.dataset["class_names"]))
    abstract = evaluation.abstract_payload(config, model)
    found = {}
    for which in ("latest", "best"):
        restored = save_restore.restore(workdir / "checkpoints", abstract, which=which)
        position = [restored.extra["epoch"], restored.extra["step"], restored.metric]
        found[which] = np.array([restored.step, *position], float)
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            found[which + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def assert_same_run(workdir: Path, reference: Path):
    """Both runs are complete and equal to the last bit, apart from what the clock shows."""
    got, want = states_of(workdir), states_of(reference)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], strict=True, err_msg=name)
    assert rows_of(workdir) == rows_of(reference)
    assert summary_of(workdir) == summary_of(reference)


def summary_of(workdir: Path) -> dict:
    """What `summary.json` holds, without what depends on the clock or the machine's state."""
    clock = {"started", "seconds", "total_seconds", "images_per_second", "seconds_to_first_step"}
    clock |= {"peak_memory_bytes"}
    summary = json.loads((workdir / "summary.json").read_text())
    return {k: v for k, v in summary.items() if k not in clock | {"commit", "feed"}}


def snapshot(folder: Path) -> dict[str, bytes]:
    """The content of every file under `folder`, the lock apart."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def command_environment(cache: Path) -> dict[str, str]:
    """The environment of a command as a user would start it, with a compile cache in `cache`."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONUNBUFFERED": "1",
    }


def python(code: str, *arguments, folder: Path = ROOT, flags=()) -> str:
    """Runs code in a fresh interpreter in `folder`; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_LAUNCHER = """
import json, os, sys
import cifar_jax.train, cifar_jax.reporting.plots
import cifar_jax.training.summary, cifar_jax.training.loop
import matplotlib.pyplot, orbax.checkpoint, optax, PIL.Image, tqdm
import tiny_data
from cifar_jax.runtime.errors import run_command
tiny_data.MODELS["small"] = tiny_data.Small
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
        continue
    os.setsid()
    out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["train", *job["arguments"]]
    try:
        code = run_command(cifar_jax.train.main)
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    os._exit(code)
"""


class Launcher:
    """Starts train commands as processes of their own that need no second for their imports.

    A server imports everything and forks for each run, before JAX has started a device; such a
    run can be killed like any other.
    """

    def __init__(self, cache: Path):
        self._server = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=command_environment(cache),
            cwd=ROOT,
        )
        self._out = cache / "out.txt"
        cache.mkdir(exist_ok=True)

    def start(self, arguments) -> int:
        """Starts `train arguments` and returns its process id."""
        job = {"arguments": [str(a) for a in arguments], "out": str(self._out)}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Returns the exit status (negative: the signal it died of) and what it printed."""
        status = int(self._server.stdout.readline())
        return os.waitstatus_to_exitcode(status), self._out.read_text()

    def run(self, arguments, signal_number=None, when=None) -> tuple[int, str]:
        """Runs to the end, or until `when()` holds, and then sends the signal."""
        pid = self.start(arguments)
        if signal_number is not None:
            while Path(f"/proc/{pid}").exists() and not self._over(pid) and not when():
                time.sleep(0.002)
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal_number)
        return self.wait()

    @staticmethod
    def _over(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    def output(self) -> str:
        return self._out.read_text()

    def close(self):
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()
