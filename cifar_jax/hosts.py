"""Several processes as one run: how they join, and how they end together.

The devices of all processes share each batch. Every process computes; process 0, the leader, is
the only one that prints and touches the run directory (`cifar_jax.together`). Of many runs
(`--seeds`) each process trains its share by itself, and writes it to the directory.

What ends one process ends all: a user's error within a few seconds, with its message; one that was
killed or cannot be reached within `HEARTBEAT_SECONDS` and a few more. The run directory is then as
after a kill of one process: the same commands go on from the last checkpoint, on any number of
processes and devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping

import jax

from cifar_jax.errors import UserError

JOIN_SECONDS = 50  # to wait for the coordinator, or for the others; JAX takes 5 more to give up
HEARTBEAT_SECONDS = 30  # without a sign of life, after which JAX takes a process for dead
_PREFIX = "cifar_jax"
_last_words = ""
_abort_handler = None  # held here: C calls it
_apart: tuple | None = None  # of processes that are apart: the store, this one's number, how many


def cluster(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the name of what started this process as one of several, None for a lone one.

    SLURM counts where `srun` started the step (in a batch script itself it does not), Open MPI
    under `mpirun`, a Cloud TPU where it has several workers or slices.
    """
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        return "SLURM"
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in workers or _number(environ, "MEGASCALE_NUM_SLICES") > 1 or _tpu_workers(environ) > 1:
        return "Cloud TPU"
    return None


def _tpu_workers(environ: Mapping[str, str]) -> int:
    """How many workers the metadata server of a Cloud TPU machine knows; 0 on other machines."""
    chips = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    skip = "TPU_SKIP_MDS_QUERY" in environ or "cpu" in environ.get("JAX_PLATFORMS", "")
    if skip or not chips or importlib.util.find_spec("libtpu") is None:
        return 0
    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return len(answer.read().decode().split(","))
    except (OSError, ValueError):
        return 0


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def check_flags(coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Returns whether the three were given. Raises `UserError` for one or two, or wrong ones."""
    given = {"--coordinator": coordinator, "--num-processes": processes, "--process-id": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 or (processes == 1 and len(missing) == 2):
        return False
    if missing:
        have = " and ".join(name for name in given if name not in missing)
        raise UserError(f"{have} given without {' and '.join(missing)}: it takes all three or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if processes < 1:
        raise UserError(f"--num-processes must be at least 1, got {processes}")
    if not 0 <= process < processes:
        raise UserError(
            f"--process-id {process} is not one of 0 to {processes - 1} (--num-processes "
            f"{processes})"
        )
    return processes > 1


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    apart: bool = False,
) -> Iterator[None]:
    """Makes this process one of several if the flags or the environment say so.

    Enter it before anything runs on a device. `processes` 1 alone stays alone whatever the
    environment says. Where several processes are joined, an error that
    leaves this block ends the process here, after the others have been told.

    Args:
      coordinator, processes, process: the flags.
      apart: the processes know of each other and end together, but JAX takes each for a lone one:
        its devices are this process's, and no program runs on those of several.

    Raises:
      UserError: wrong flags, no coordinator that answers, or a Cloud TPU's workers, whose devices
        cannot be had apart.
    """
    began = time.monotonic()
    if check_flags(coordinator, processes, process):
        _wait_for_coordinator(coordinator, process)
        where = f"coordinator {coordinator}"
        join = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    elif processes is None and (name := cluster()):
        if apart and name == "Cloud TPU":
            raise UserError("many runs train on one TPU worker: give it --num-processes 1")
        where, join = name, {}
    else:
        yield
        return
    if not apart:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours
    _on_abort(
        f"not all processes came together within {JOIN_SECONDS} s ({where}): start all of them, "
        "each with its own --process-id and the same --num-processes, and check the address"
    )
    try:
        jax.distributed.initialize(
            **join,
            initialization_timeout=max(5, int(JOIN_SECONDS - (time.monotonic() - began))),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        raise UserError(f"cannot join the other processes ({where}): {error}") from None
    _on_abort(
        "another process of this run ended or cannot be reached (above is JAX's account); start "
        "all processes again with the same commands to go on from the last checkpoint"
    )
    if apart:
        _set_apart()
    threading.Thread(target=_watch, daemon=True).start()
    try:
        yield
        store().wait_at_barrier(f"{_PREFIX}/done", 600_000)
    except SystemExit:
        raise
    except BaseException as error:
        _end(error)
    finally:
        _end_apart()


def _set_apart() -> None:
    """Hides the other processes from JAX, which has made no devices yet."""
    global _apart
    state = _jax_state()
    _apart = state.client, state.process_id, state.num_processes
    state.client, state.process_id, state.num_processes = None, 0, 1


def _end_apart() -> None:
    """Gives JAX back what it shuts down when the process ends."""
    global _apart
    if _apart:
        _jax_state().client, _apart = _apart[0], None


def _wait_for_coordinator(address: str, process: int) -> None:
    """Returns once process 0 listens. Raises `UserError` after `JOIN_SECONDS`."""
    if process == 0:
        return
    host, _, port = address.rpartition(":")
    deadline, reason = time.monotonic() + JOIN_SECONDS, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise UserError(
        f"no coordinator answers at {address}: tried for {JOIN_SECONDS:g} s ({reason}); start "
        "process 0 on that host first, and check that the port is open"
    )


def _on_abort(message: str) -> None:
    """Ends with `message` and status 2 where JAX would abort the process.

    JAX does so from a thread of its own when it loses the coordinator or a process, and offers no
    other way to have a word.
    """
    global _last_words, _abort_handler
    _last_words = message
    if _abort_handler is not None:
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _abort_handler = kind(lambda _: _exit_saying(_last_words))
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, kind]
    library.signal(signal.SIGABRT, _abort_handler)


def _exit_saying(message: str, status: int = 2) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {' '.join(message.split())}\n".encode(errors="backslashreplace"))
    os._exit(status)


def _jax_state():
    from jax._src import distributed  # the only door to the key-value store

    return distributed.global_state


def store():
    """Returns the key-value store that the processes share."""
    return _apart[0] if _apart else _jax_state().client


def index() -> int:
    """Returns this process's number, from 0."""
    return _apart[1] if _apart else jax.process_index()


def count() -> int:
    """Returns how many processes there are."""
    return _apart[2] if _apart else jax.process_count()


def _watch() -> None:
    """Ends this process when another has said that it ends, of an error."""
    client = store()
    while True:
        time.sleep(1)
        try:
            for name, message in client.key_value_dir_get(f"{_PREFIX}/ended/"):
                if name.rsplit("/", 1)[1] != str(index()):
                    client.key_value_set(f"{_PREFIX}/told/{index()}", "")
                    _exit_saying(message)
        except jax.errors.JaxRuntimeError:
            return  # the coordinator is gone; JAX ends this process


def _end(error: BaseException) -> None:
    """Tells the others of an error, waits until they know, and ends this process."""
    this, others = index(), count() - 1
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Most likely another process has died, which JAX finds out soon: then this never returns.
        time.sleep(HEARTBEAT_SECONDS + 10)
    elif this:
        time.sleep(3)  # the leader has most likely the same error, and says it better
    known = isinstance(error, (UserError, KeyboardInterrupt))
    message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    message = message.encode(errors="backslashreplace").decode()  # the store takes UTF-8 alone
    with contextlib.suppress(Exception):
        store().key_value_set(
            f"{_PREFIX}/ended/{this}", f"process {this} of {others + 1} ended: {message}"
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and this == 0:  # it holds what the others read
            if len(store().key_value_dir_get(f"{_PREFIX}/told/")) == others:
                break
            time.sleep(0.1)
    with contextlib.suppress(Exception):  # there may be none, or it may be what failed
        sys.stdout.flush()
    if not known:
        sys.excepthook(type(error), error, error.__traceback__)
        os._exit(1)
    _exit_saying(message)
