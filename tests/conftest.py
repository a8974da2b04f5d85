"""Every test runs under strict rules and on several CPU devices."""

import atexit
import os
import pathlib
import shutil
import tempfile
import warnings

os.environ["JAX_PLATFORMS"] = os.environ.get("CIFAR_JAX_TEST_PLATFORM", "cpu")
_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tensorflow_datasets"
if "TFDS_DATA_DIR" not in os.environ and _SHARED.is_dir():
    os.environ["TFDS_DATA_DIR"] = str(_SHARED)

# Compiling is most of the suite's time. What is compiled is kept for the tests after it and for the
# commands they start; each process of pytest-xdist keeps its own, as JAX writes without a lock.
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE = tempfile.mkdtemp(prefix="cifar_jax-xla-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def cifar10():
    """Real CIFAR-10, or a skip that says where it was looked for."""
    from cifar_jax.datasets import load_dataset
    from cifar_jax.runtime.errors import UserError

    try:
        return load_dataset("cifar10", download=False, progress=False)
    except UserError as error:
        pytest.skip(f"needs real CIFAR-10: {error}")


@pytest.fixture(autouse=True)
def _no_leaked_warning_filters():
    with warnings.catch_warnings():
        yield


# What `-m` left out, said in the last lines: {how to run it: tests}.
_LEFT_OUT = {"extended": "make test-all", "slow": "make test-slow"}
_counts = {}


def pytest_deselected(items):
    for item in items:
        marker = next((name for name in reversed(_LEFT_OUT) if item.get_closest_marker(name)), None)
        if marker:
            _counts[marker] = _counts.get(marker, 0) + 1


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: each collects all
        session.config.workeroutput["left_out"] = _counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _counts.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter):
    for marker, count in _counts.items():
        terminalreporter.write_line(f"left out: {count} {marker} tests ({_LEFT_OUT[marker]})")
