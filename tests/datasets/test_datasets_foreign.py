"""Sets of other makers and damaged ones."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from datasets_support import empty_machine as empty_machine
from datasets_support import (
    load,
)
from datasets_support import prepared as prepared
from datasets_support import tiny as tiny
from PIL import Image

from cifar_jax.datasets import decode, locate
from cifar_jax.runtime.errors import UserError

# --- other sets


def write_set(data_dir, name, images, labels, classes=3, **image_options):
    """Prepares a foreign set with tfds itself: encoded images (bytes) and labels."""

    import tensorflow_datasets as tfds

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            image = tfds.features.Image(**{"shape": (None, None, 3)} | image_options)
            label = tfds.features.ClassLabel(num_classes=classes)
            features = tfds.features.FeaturesDict({"picture": image, "kind": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"picture": io.BytesIO(image), "kind": label}

    Foreign.name = name
    builder = Foreign(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(download_dir=str(data_dir / "unused"))
    return Path(builder.data_dir)


def encode(array, kind="PNG"):

    file = io.BytesIO()
    Image.fromarray(array).save(file, format=kind)
    return file.getvalue()


def test_a_foreign_set_is_resized_on_request_and_grey_becomes_rgb(tmp_path):
    grey = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    write_set(tmp_path, "digits", [encode(grey)] * 3, [0, 1, 2], shape=(28, 28, 1))
    with pytest.raises(UserError, match=r"28x28 pixels, not 32x32: add --image-size 32"):
        load("digits", data_dir=tmp_path)
    dataset = load("digits", data_dir=tmp_path, image_size=32)
    expected = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BILINEAR))
    images = dataset.splits["train"].images
    assert images.shape == (3, 32, 32, 3)
    for channel in range(3):
        np.testing.assert_array_equal(images[0, :, :, channel], expected)
    assert sorted(dataset.splits["train"].labels) == [0, 1, 2]
    assert dataset.class_names == ("0", "1", "2")
    assert (dataset.name, dataset.version) == ("digits", "1.2.3")
    assert load("digits", data_dir=tmp_path, image_size=8).splits["test"].images.shape[1:3] == (
        8,
        8,
    )


def test_a_truncated_image_is_named(tmp_path):
    whole = encode(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), "JPEG")
    directory = write_set(tmp_path, "cut", [whole, whole[:300]], [0, 1])
    with pytest.raises(UserError, match=r"image \d is truncated or no image") as caught:
        load("cut", data_dir=tmp_path)
    assert str(directory) in str(caught.value)
    assert not list(directory.glob("cifar_jax_cache/train*"))


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(mode):
    image = Image.new("RGB", (32, 32), (255, 0, 0)).convert(mode)

    file = io.BytesIO()
    image.save(file, format="TIFF")
    decoded = decode.decode_image(file.getvalue(), None)
    assert decoded.shape == (32, 32, 3)
    if mode != "1":
        assert decoded[5, 5, 0] > 250
        assert decoded[5, 5, 2] < 5


def chunk(kind, data, damage=0):
    crc = zlib.crc32(kind + data) ^ damage
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"tEXt", b"a\0b", damage=1),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iCCP", b"a\0\1no method"),
        chunk(b"pHYs", b"a"),
        chunk(b"eXIf", b"junk"),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 10\nzz")),
    ],
)
def test_broken_metadata_of_a_png_do_not_withhold_its_pixels(broken, before):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    good = encode(pixels)
    at = 33 if before else len(good) - 12  # behind the header, or before the end
    np.testing.assert_array_equal(decode.decode_image(good[:at] + broken + good[at:], None), pixels)
    with pytest.raises(decode.DecodeError, match="truncated"):
        decode.decode_image((good[:33] + broken + good[33:])[: len(good) // 2], None)


def test_16_bit_images_are_refused():
    deep = encode(np.full((32, 32), 40_000, np.uint16))
    with pytest.raises(decode.DecodeError, match=r"8-bit"):
        decode.decode_image(deep, None)


# --- damage


def edit_json(directory, change):
    path = directory / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def declare(split, count):
    def change(info):
        next(s for s in info["splits"] if s["name"] == split)["shardLengths"] = [str(count)]

    return change


def shard(directory, split="test"):
    return next(directory.glob(f"cifar10-{split}.array_record*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_json(d, declare("test", 12)), "fewer images than the 12 it declares"),
        (lambda d: os.truncate(shard(d), shard(d).stat().st_size // 2), "cannot read split 'test'"),
        (lambda d: os.truncate(shard(d), 0), "cannot read split 'test'"),
        (lambda d: shard(d).unlink(), "cannot read split 'test'.*No such file"),
        (lambda d: (d / "dataset_info.json").write_text("{"), "cannot read .*dataset_info.json"),
        (lambda d: (d / "features.json").write_text("{"), "cannot read the description"),
        (
            lambda d: edit_json(d, lambda info: info.update(fileFormat="tfrecord")),
            "pip install tensorflow, or use another --data-dir",
        ),
    ],
)
def test_a_damaged_set_is_one_clear_error(prepared, damage, message, monkeypatch):
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
    directory = prepared[0] / "cifar10" / "3.0.2"
    damage(directory)
    with pytest.raises(UserError, match=message) as caught:
        load(data_dir=prepared[0])
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(directory.glob("cifar_jax_cache/test*"))


def test_a_crashing_or_failing_decoder_process_is_reported(prepared):
    directory = prepared[0] / "cifar10" / "3.0.2"
    job = {"directory": str(directory), "images": "/nonexistent.npy"}
    with pytest.raises(decode.DecodeError, match=r"the decoding process ended with 1"):
        decode.decode_all(job, 10, processes=2)
