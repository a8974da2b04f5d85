"""Several processes of a command on this machine."""

import re
import socket
import subprocess
import sys
import time

from tiny_data import ROOT, command_environment


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """A command in several processes of two CPU devices each; `workdir` and `arguments` are of all,
    or {process: its own}."""

    def __init__(
        self,
        folder,
        workdir,
        arguments,
        count=2,
        environments=None,
        flags=True,
        command="cifar_jax.train",
    ):
        self.port = free_port()
        environment = command_environment(folder / "xla") | {"JAX_NUM_CPU_DEVICES": "2"}
        self.outputs = [folder / f"out{i}.txt" for i in range(count)]
        self.running = []
        for i, output in enumerate(self.outputs):
            join = [
                *("--coordinator", f"127.0.0.1:{self.port}"),
                *("--num-processes", str(count), "--process-id", str(i)),
            ]
            place = workdir[i] if isinstance(workdir, dict) else workdir
            common = ["--devices", "2", "--workdir", str(place), *(join if flags else [])]
            extra = (environments or {}).get(i, {})
            own = arguments[i] if isinstance(arguments, dict) else arguments
            with output.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", command, *own, *common],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment | extra,
                    cwd=ROOT,
                )
            self.running.append(process)

    def wait(self, seconds=300):
        """Returns each one's exit status, and what it printed without the transport's greetings."""
        try:
            status = [process.wait(seconds) for process in self.running]
        finally:
            for process in self.running:
                process.kill()
        texts = [output.read_text() for output in self.outputs]
        # Gloo's threads write "[Gloo] Rank 0 is connected to 3 peer ranks. Expected number of
        # connected peer ranks is : 3" over each other, at times its number on a line of its own.
        greeting = re.compile(r"\[Gloo\]|peer ranks|^\s*\d+\s*$")
        keep = [[line for line in t.splitlines() if not greeting.search(line)] for t in texts]
        return status, keep


def until_saved(folder, processes, seconds=240):
    """Waits until the folder of a run, or of a group of runs, holds a complete checkpoint."""
    deadline = time.monotonic() + seconds
    while not list(folder.glob("checkpoints/*/checkpoint.json")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes.running)
        time.sleep(0.05)
