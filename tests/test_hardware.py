"""The platform, and how many of its devices share a batch."""

import jax
import pytest

from cifar_jax import hardware
from cifar_jax.errors import UserError


def test_devices_are_asked_for_by_name():
    assert hardware.select_platform("auto") == jax.default_backend()
    with pytest.raises(UserError, match="did you mean 'gpu'"):
        hardware.select_platform("gpuu")
    assert hardware.describe_device().startswith(f"{jax.device_count()} x ")


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
