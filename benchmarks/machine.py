"""What a result was measured on."""

from __future__ import annotations

from pathlib import Path

from cifar_jax.runtime import environment

ROOT = Path(__file__).resolve().parents[1]


def hardware() -> dict:
    """Returns the processor's name and how many of its cores this process may use."""
    return {"cpu": environment.cpu_model(), "cores": environment.usable_cores()}


def commit() -> str:
    """Returns the commit in use, marked `-dirty` where the tree differs from it."""
    return environment.commit(ROOT) or "unknown"
