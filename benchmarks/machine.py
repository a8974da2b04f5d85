"""What a result was measured on."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cifar_jax.records import cpu_model, usable_cores

ROOT = Path(__file__).resolve().parents[1]


def hardware() -> dict:
    """Returns the processor's name and how many of its cores this process may use."""
    return {"cpu": cpu_model(), "cores": usable_cores()}


def commit() -> str:
    """Returns the commit in use, marked `+changes` where the tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
