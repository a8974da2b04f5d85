"""What a result was computed with and on: versions, source, device, processor."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from cifar_jax import __version__


def environment() -> dict:
    """Returns what a result was computed with and on; no name of the machine or its user.

    {"versions": of Python and the packages (None where absent), "commit": of this source where
    it is a git checkout ("-dirty" when tracked files differ), "device": {"platform", "kind",
    "count", "processes"}, "cpu": {"model", "cores": in the machine, "usable": by this process},
    "system", "xla_flags"}. Starts JAX's backend if nothing has yet.
    """
    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            "cifar_jax": __version__,
            **{name: _version(name) for name in packages},
        },
        "commit": commit(Path(__file__).resolve().parents[2]),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "usable": usable_cores()},
        "system": f"{platform.system()} {platform.machine()}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path) -> str | None:
    """Returns the commit checked out at `root`, marked `-dirty` where files differ from it; None
    where there is none."""
    if not (root / ".git").exists():  # an installed package, perhaps inside somebody's checkout
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


def cpu_model() -> str:
    """Returns the processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_bytes(usage: Any) -> int:
    """Returns a process's peak memory in bytes from its `struct_rusage`."""
    # getrusage(2): kilobytes, but bytes on macOS.
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
