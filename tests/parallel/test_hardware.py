"""The platform, how many of its devices share a batch, and how many threads compute."""

import json
import os
import subprocess
import sys

import jax
import pytest
from tiny_data import python

from cifar_jax.parallel import hardware
from cifar_jax.recipes import RECIPES
from cifar_jax.runtime.environment import usable_cores
from cifar_jax.runtime.errors import UserError
from cifar_jax.training import setup


def test_devices_are_asked_for_by_name():
    assert hardware.select_platform("auto") == jax.default_backend()
    with pytest.raises(UserError, match="did you mean 'gpu'"):
        hardware.select_platform("gpuu")
    assert hardware.describe_device().startswith(f"{jax.device_count()} x ")


# A machine with one kind of card, or none: for each, what the devices by name are. A plugin that is
# not installed is a platform that JAX does not know.
CARDS = """
import json, os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import jax
import jax.extend
from jax._src import hardware_utils, xla_bridge
from cifar_jax.parallel import hardware
from cifar_jax.runtime.errors import UserError

class Card:
    platform = "gpu"
    device_count = process_index = lambda self: 1
    local_devices = _get_all_devices = lambda self: [self]

def broken():
    raise RuntimeError("driver too old")

def found(name, factories, wanted):
    for platform in ("cuda", "rocm"):
        xla_bridge._backend_factories.pop(platform, None)
    for platform, factory in factories.items():
        xla_bridge.register_backend_factory(platform, factory)
    hardware_utils.has_visible_nvidia_gpu = lambda: "cuda" in factories
    jax.config.update("jax_platforms", wanted)
    try:
        return [hardware.select_platform(name), jax.config.jax_platforms]
    except UserError as error:
        return [str(error), jax.config.jax_platforms]
    finally:
        jax.extend.backend.clear_backends()

print(json.dumps([
    found("gpu", {"cuda": Card}, "cpu"),
    found("gpu", {"rocm": Card}, "cpu"),
    found("gpu", {"cuda": broken}, "cpu"),
    found("gpu", {}, "cpu"),
    found("auto", {}, "cuda"),
    found("auto", {"cuda": broken}, "cuda"),
    found("cpu", {}, "cuda"),
]))
"""


def test_devices_are_found_by_name_or_their_lack_is_one_line():
    install = "; install .[cuda12] or .[cuda13] and check the driver with nvidia-smi"
    other = "; unset it, or name a device with --device"
    reason = " (Unable to initialize backend 'cuda': driver too old)"
    assert json.loads(python(CARDS)) == [
        ["gpu", "cuda"],
        ["gpu", "rocm"],
        [f"--device gpu: JAX finds no such device{reason}{install}", "cpu"],
        [f"--device gpu: JAX finds no such device{install}", "cpu"],
        [f"JAX_PLATFORMS=cuda: JAX finds no such device{other}", "cuda"],
        [f"JAX_PLATFORMS=cuda: JAX finds no such device{reason}{other}", "cuda"],
        ["cpu", "cpu"],
    ]


def test_accelerators_share_batches_of_sixteen_images_each(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for batch, devices in ((4, 1), (20, 1), (64, 4), (128, 8), (1024, 8)):
        assert hardware.choose_devices("auto", batch, 134_000_000) == devices


def test_devices_that_share_a_batch():
    assert hardware.choose_devices("3", 4, 1000) == 3
    assert hardware.choose_devices("all", 4, 1000) == jax.local_device_count() == 8
    assert hardware.choose_devices("auto", 4, 1000) == 1
    assert hardware.choose_devices("auto", 20, 1000) == 2
    assert hardware.choose_devices("auto", 4096, 1000) == 8
    assert hardware.choose_devices("auto", 4096, 30_000_000) == 1
    for asked, said in (("9", "there are 8 here"), ("0", "auto, all or a number"), ("x", "auto")):
        with pytest.raises(UserError, match=said):
            hardware.choose_devices(asked, 4, 1000)
    assert hardware.data_mesh(1) is None
    assert hardware.everywhere(None) is None


def test_only_the_smallest_steps_are_computed_by_one_thread():
    def threads(name, devices="auto", **changes):
        return setup.cpu_threads(RECIPES[name].replace(**changes), devices)

    assert threads("tutorial") == 1
    assert threads("tutorial", batch_size=15) == 1
    assert threads("tutorial", batch_size=16) is None  # two devices share it
    assert threads("tutorial", devices="1") is None  # the user decides
    assert threads("tutorial", resize=64) is None  # a larger first linear layer
    assert threads("dropout", batch_size=4) is None
    assert threads("vgg16_finetune", batch_size=4) is None


# Prints (devices, threads that XLA's pool has by the system's account, what is said of them).
PROBE = """
import collections, os, sys
import jax
from cifar_jax.parallel import hardware
hardware.select_platform("cpu", threads=1)
jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))))
names = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
pool = names.count("tf_XLAEigen")
print(len(jax.devices()), pool, hardware.computing_threads(), os.environ.get("PJRT_NPROC"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_thread_is_what_a_process_gets_unless_its_user_says_otherwise():
    ours = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "-1"}
    plain = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "NPROC", "XLA_FLAGS")}

    def probe(**environment):
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**plain, **ours, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert probe() == ["1", "1", "1", "None"]
    cores = str(usable_cores())
    assert probe(PJRT_NPROC="3")[0::2] == [cores, cores]
    assert probe(JAX_NUM_CPU_DEVICES="2")[0] == "2"
