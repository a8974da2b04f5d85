"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def hardware() -> dict:
    """Returns the processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {"cpu": name, "cores": len(os.sched_getaffinity(0))}


def commit() -> str:
    """Returns the commit in use, marked `+changes` where the tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
