"""Where a run's time goes: seconds by phase, compilation apart."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

import jax

from cifar_jax.runtime.environment import peak_bytes

_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_compiled = 0.0
_listening = False


def _listen(event: str, seconds: float, **_) -> None:
    global _compiled
    if event in _COMPILING:
        _compiled += seconds


def compile_seconds() -> float:
    """Returns the seconds this process has spent tracing and compiling since the first `Clock`."""
    return _compiled


class Clock:
    """Adds up wall-clock seconds by phase; what JAX compiled meanwhile counts as `compile`.

        with clock("training"): ...

    Phases do not nest.

    Attributes:
      started: when the run was started first, ISO 8601 with its zone.
      first_step: seconds from the process's start to the first step's end, None before.
    """

    def __init__(self):
        global _listening
        if not _listening:
            jax.monitoring.register_event_duration_secs_listener(_listen)
            _listening = True
        self._seconds: dict[str, float] = {}
        self.started = datetime.now().astimezone().isoformat(timespec="seconds")
        self.first_step: float | None = None

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, compiled = time.perf_counter(), _compiled
        try:
            yield
        finally:
            wall, compiling = time.perf_counter() - start, _compiled - compiled
            self._add("compile", min(compiling, wall))
            self._add(phase, max(wall - compiling, 0.0))

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Returns {phase: seconds} so far."""
        return {phase: round(value, 4) for phase, value in self._seconds.items()}

    def saved(self) -> dict:
        """Returns what a checkpoint keeps of it: {"started", "seconds"}."""
        return {"started": self.started, "seconds": self.seconds()}

    def load(self, saved: Mapping) -> None:
        """Adds what an earlier part of the same run took (`saved`)."""
        self.started = saved.get("started", self.started)
        for phase, value in saved["seconds"].items():
            self._add(phase, value)


def seconds_since_start() -> float | None:
    """Returns the seconds since this process was started, None where /proc does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        # Field 22 of the line, `starttime`, in clock ticks after boot (proc_pid_stat(5)).
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def peak_memory() -> dict[str, int | None]:
    """Returns the peak bytes so far: `host` of this process, `device` where JAX can tell."""
    host = peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"host": host, "device": device}
