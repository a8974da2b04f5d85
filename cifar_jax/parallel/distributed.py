"""Several processes: which one this is, how they join to one run, and how that run ends.

The devices of all processes of one run share each batch. Every process computes; process 0, the
leader, is the only one that prints and touches the run directory (`cifar_jax.parallel.agreement`).
At the points where all of them exchange values they also learn of an error of one of them, and end
with its message. Of a process that was killed JAX knows at the next collective, or after
`HEARTBEAT_SECONDS` without a sign of life, and ends the others. The run directory is then as after
a kill of one process: the same commands go on from the last checkpoint, on any number of processes
and devices.

Of many runs (`--seeds`) each process trains its share by itself
(`cifar_jax.replicas.shared_workdir`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from cifar_jax.runtime.errors import UserError

JOIN_SECONDS = 50  # to wait for the coordinator, or for the others
HEARTBEAT_SECONDS = 30  # without a sign of life, after which JAX takes a process for dead
GO_ON = "start all processes again with the same commands to go on from the last checkpoint"
_ROW = 1024  # bytes that go round in one collective: more than most of what is exchanged
# What started the processes -> the variables of this one's number, of how many, and of its number
# on its machine.
_RANKS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "SLURM": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
# By which variables a process takes itself for one of several; they may be left over.
_VARIABLES = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE",),
    "SLURM": ("SLURM_STEP_NUM_TASKS",),
    "Cloud TPU": ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"),
}


@dataclasses.dataclass(frozen=True)
class Process:
    """One of `count` processes of a command, numbered from 0, the leader."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.index == 0

    def warn(self, line: str) -> None:
        """Says what a process that trains runs of its own has to say beside the leader."""
        if line.startswith("warning"):
            print(f"process {self.index}: {line}", file=sys.stderr)


ALONE = Process()


class Ended(UserError):
    """An error of another process, which ends this one too."""


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


def numbered(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Process:
    """Returns which process this is, of those that train runs of their own, by the flags or the
    environment. Under SLURM and Open MPI it takes the GPU of its number on the machine.

    Raises:
      UserError: wrong flags, or a Cloud TPU's workers, whose devices cannot be had apart.
    """
    found, own = ALONE, os.environ.get("JAX_LOCAL_DEVICE_IDS")
    if process is not None:
        coordinator = coordinator or "any:1"  # they join nobody
    if check_flags(coordinator, processes, process):
        found = Process(process, processes)
    elif processes is None and (name := cluster()):
        if name == "Cloud TPU":
            raise UserError("many runs train on one TPU worker: give it --num-processes 1")
        index, count, local = (_number(os.environ, variable) for variable in _RANKS[name])
        found, own = Process(index, count), own or str(local)
    if own and found.count > 1:  # as `jax.distributed` would
        jax.config.update("jax_cuda_visible_devices", own)
        jax.config.update("jax_rocm_visible_devices", own)
    return found


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[None]:
    """Makes this process one of several of one run if the flags or the environment say so.

    Enter it before anything runs on a device. `processes` 1 alone stays alone whatever the
    environment says. A `UserError` that leaves this block ends the others at their next
    `exchange`; any other error ends this process at once, and the others as a kill of it would.

    Raises:
      UserError: wrong flags, or no coordinator that answers.
    """
    if check_flags(coordinator, processes, process):
        began = time.monotonic()
        if process:
            _wait_for_coordinator(coordinator)
        seconds = max(5, round(JOIN_SECONDS - (time.monotonic() - began)))
        where, leads = f"coordinator {coordinator}", process == 0
        way_out = "each with its own --process-id and the same --num-processes; check the address"
        join = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    elif processes is None and (name := cluster()):
        found = [f"{v}={os.environ[v]}" for v in _VARIABLES[name] if v in os.environ]
        where, way_out = (
            f"{name}: {', '.join(found) or 'its metadata server'}",
            "or give --num-processes 1 if this one is alone",
        )
        join, seconds = {}, JOIN_SECONDS
        rank = _RANKS[name][0] if name in _RANKS else "TPU_WORKER_ID"
        leads = _number(os.environ, rank) == 0
    else:
        yield
        return
    way_out = f"start all of them, {way_out}"
    if leads:  # before: JAX aborts a process that is left alone later
        print(
            f"Waiting up to {seconds} s for all processes ({where}); {way_out}. If JAX ends this "
            f"one later because another is lost, {GO_ON}",
            file=sys.stderr,
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours
    late = f"not all processes came together within {seconds} s ({where}): {way_out}"
    timer = threading.Timer(seconds, _exit_saying, [late])  # before JAX, which adds a stack of C++
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **join, initialization_timeout=seconds + 10, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except Exception as error:
        said = str(error).rstrip(".")
        raise UserError(f"cannot join the other processes ({where}): {said}; {way_out}") from None
    finally:
        timer.cancel()
    try:
        yield
        exchange()
    except (Ended, SystemExit):  # all of them know
        raise
    except UserError as error:
        with contextlib.suppress(Exception):
            _allgather({"error": str(error)})
        raise
    except BaseException as error:
        _leave(error)


def _exit_saying(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _wait_for_coordinator(address: str) -> None:
    """Returns once process 0 listens. Raises `UserError` after `JOIN_SECONDS`."""
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


def _leave(error: BaseException) -> None:
    """Ends this process, of an error that the others cannot be told: they may be in a program."""
    status = 1
    if isinstance(error, jax.errors.JaxRuntimeError):
        status, account = 2, " ".join(str(error).split())[:300]
        print(
            f"error: another process of this run ended or cannot be reached (JAX says: {account}); "
            f"{GO_ON}",
            file=sys.stderr,
        )
    elif isinstance(error, KeyboardInterrupt):
        status = 130
        print("Interrupted", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # An ordinary exit would first wait for the others in JAX, which aborts where one is lost.
    os._exit(status)


def exchange(value: Any = None) -> list[Any]:
    """Returns what each process gave, by their numbers: anything JSON holds. All must call it, at
    the same point.

    Raises:
      Ended: one of them has ended instead, of a `UserError`.
    """
    if jax.process_count() == 1:
        return [value]
    said = _allgather({"value": value})
    for process, found in enumerate(said):
        if "error" in found:
            raise Ended(f"process {process} of {len(said)} ended: {found['error']}")
    return [found["value"] for found in said]


def _allgather(value: Mapping[str, Any]) -> list[dict]:
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    head = np.array([len(data)], "<i4").view(np.uint8)
    room = _ROW - len(head)
    row = np.concatenate([head, data[:room]])
    rows = multihost_utils.process_allgather(np.pad(row, (0, _ROW - len(row))))
    lengths = rows[:, : len(head)].copy().view("<i4")[:, 0]
    rows = rows[:, len(head) :]
    if lengths.max() > room:
        size = 1 << int(lengths.max()).bit_length()
        rows = multihost_utils.process_allgather(np.pad(data, (0, size - len(data))))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
