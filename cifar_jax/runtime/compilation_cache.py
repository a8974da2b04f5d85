"""JAX's compilation cache on disk: where it is, and what becomes of damaged entries."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import warnings
from pathlib import Path

import jax

from cifar_jax.runtime.errors import in_command, notice
from cifar_jax.runtime.files import user_cache

# What JAX warns of, once for each program (jax/_src/compiler.py of 0.10).
_FAILED = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)"
)


def enable() -> str | None:
    """Turns the cache on for this process, in the user's cache directory; returns the directory,
    None where there is no home directory to have it in.

    Small programs are kept too: a run starts with some twenty of them, a second's compiling.
    A directory the user set (`JAX_COMPILATION_CACHE_DIR`) wins. A command of the package removes
    damaged entries; in a caller's process JAX warns of them.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = user_cache()
        if base is None:
            notice("no home directory is known (HOME): compiled programs are not kept")
            return None
        jax.config.update("jax_compilation_cache_dir", str(base / "cifar_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if in_command():
        _mend()
    return jax.config.jax_compilation_cache_dir


@functools.cache  # once is enough
def _mend() -> None:
    """Has this process remove what it cannot read of the cache, and say so in one line.

    A full disk, or a kill in the middle of a write, leaves half an entry behind; JAX would then
    warn at every later start, compile, and never replace it.
    """
    former, told = warnings.showwarning, set()

    def show(message, *about, **options) -> None:
        found = _FAILED.match(str(message))
        if found is None:
            former(message, *about, **options)
            return
        doing, program, why = found.groups()
        folder, removed = Path(jax.config.jax_compilation_cache_dir), False
        for entry in folder.glob(f"{program}-*"):
            with contextlib.suppress(OSError):
                entry.unlink()
                removed = True
        mended = removed and doing == "reading"
        if mended not in told:
            told.add(mended)
            print(_said(mended, folder, why), file=sys.stderr)

    warnings.showwarning = show


def _said(mended: bool, folder: Path, why: str) -> str:
    if mended:
        return f"cifar_jax: removed damaged programs from the cache {folder}; compiling them again"
    return f"cifar_jax: cannot keep compiled programs in {folder} ({why}); the run goes on without"
