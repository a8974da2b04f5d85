"""Archives: every form read alike, foreign and damaged ones refused in one line."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from datasets_support import (
    binary_files,
    pickled_files,
    tiny_arrays,
    tiny_spec,
    write_folder,
    write_tar,
)

from cifar_jax.datasets.archives import _Unpickler, read_archive
from cifar_jax.runtime.errors import UserError


def assert_equal(read, arrays):
    for split in ("train", "test"):
        np.testing.assert_array_equal(read.images[split], arrays.images[split])
        for label, values in arrays.labels[split].items():
            np.testing.assert_array_equal(read.labels[split][label], values)
    assert read.names == arrays.names


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", [binary_files, pickled_files])
@pytest.mark.parametrize("packed", ["tar", "folder", "parent"])
def test_all_forms_hold_the_same_arrays(tmp_path, name, form, packed):
    spec = tiny_spec(name)
    arrays = tiny_arrays(spec)
    files = form(spec, arrays)
    if packed == "tar":
        path = write_tar(tmp_path / "archive.tar.gz", files)
    else:
        path = write_folder(tmp_path / "outer" / "cifar-batches", files)
        path = path.parent if packed == "parent" else path
    assert_equal(read_archive(path, spec), arrays)


def test_python_3_pickles_with_text_keys_are_read(tmp_path):
    spec = tiny_spec("cifar10")
    arrays = tiny_arrays(spec)
    files = pickled_files(spec, arrays)
    for name, content in files.items():
        old = pickle.loads(content, encoding="bytes")
        files[name] = pickle.dumps({k.decode(): v for k, v in old.items()}, protocol=4)
    assert_equal(read_archive(write_folder(tmp_path / "py3", files), spec), arrays)


def repickled(content, protocol, edit=lambda value: value):
    """A pickled file of the Python form, pickled again by other hands."""
    old = pickle.loads(content, encoding="bytes")
    return pickle.dumps({k.decode(): edit(v) for k, v in old.items()}, protocol=protocol)


def with_numpy_integers(value):
    return (
        list(map(np.int64, value)) if isinstance(value, list) and value[0] in range(10) else value
    )


def with_an_array(value):
    return np.array(value) if isinstance(value, list) and value[0] in range(10) else value


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("edit", [with_numpy_integers, with_an_array])
@pytest.mark.parametrize("numpy", ["numpy._core", "numpy.core"])
def test_batches_pickled_again_are_read(tmp_path, protocol, edit, numpy):
    spec = tiny_spec("cifar10")
    arrays = tiny_arrays(spec)
    files = pickled_files(spec, arrays)
    for name, content in files.items():
        files[name] = repickled(content, protocol, edit)
        if protocol == 2:  # where a module's name ends in a newline and can be changed
            files[name] = files[name].replace(b"cnumpy._core.", f"c{numpy}.".encode())
            assert b"data" not in files[name] or numpy.encode() in files[name]
    assert_equal(read_archive(write_folder(tmp_path / "again", files), spec), arrays)


@pytest.mark.parametrize("numpy", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize(
    "name", ["multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer"]
)
def test_what_numpy_1_and_2_write(numpy, name):
    module, _, function = name.rpartition(".")
    assert callable(_Unpickler(io.BytesIO()).find_class(f"{numpy}.{module}", function))


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "builtins.eval", "builtins.getattr", "builtins.bytearray", "numpy.load"),
        *("numpy.core.multiarray.fromfile", "numpy._core.numeric.fromfunction", "numpy.memmap"),
        *("numpy.core.records.fromfile", "numpy.core.multiarray.frombuffer", "_codecs.decode"),
        *("numpy.numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar.x"),
    ],
)
def test_every_other_global_is_refused(name):
    module, _, function = name.rpartition(".")
    with pytest.raises(pickle.UnpicklingError, match=f"wants to run {name}"):
        _Unpickler(io.BytesIO()).find_class(module, function)


def test_scalars_that_are_no_whole_numbers_are_refused():
    for value in (np.float64(1), np.array([(1, 2)], "i4,i4")[0]):
        with pytest.raises(pickle.UnpicklingError, match="unexpected number"):
            _Unpickler(io.BytesIO(pickle.dumps(value))).load()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    spec = tiny_spec("cifar10")
    files = pickled_files(spec, tiny_arrays(spec))
    ran = tmp_path / "ran"
    files["data_batch_3"] = pickle.dumps({b"data": Hostile(ran), b"labels": [0]})
    path = write_tar(tmp_path / "hostile.tar.gz", files)
    with pytest.raises(UserError, match=r"refused to load data_batch_3.*mkdir"):
        read_archive(path, spec)
    assert not ran.exists()


def damaged(kind, tmp_path):
    spec = tiny_spec("cifar10")
    files = binary_files(spec, tiny_arrays(spec))
    if kind == "absent":
        return tmp_path / "nothing.tar.gz"
    if kind == "text":
        path = tmp_path / "notes.txt"
        path.write_text("no archive")
        return path
    if kind == "cut":
        path = write_tar(tmp_path / "cut.tar.gz", files)
        path.write_bytes(path.read_bytes()[:-5000])
        return path
    if kind == "flipped":
        path = write_tar(tmp_path / "flipped.tar.gz", files)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        return path
    if kind == "other set":
        other = tiny_spec("cifar100")
        return write_tar(tmp_path / "other.tar.gz", binary_files(other, tiny_arrays(other)))
    if kind == "unrelated":
        return write_tar(tmp_path / "unrelated.tar.gz", {"readme": b"hello"})
    if kind == "empty folder":
        (tmp_path / "empty").mkdir()
        return tmp_path / "empty"
    if kind == "incomplete":
        del files["data_batch_4.bin"]
    elif kind == "short":
        files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]
    elif kind == "label":
        files["test_batch.bin"] = b"\x0a" + files["test_batch.bin"][1:]
    elif kind == "names":
        files["batches.meta.txt"] = b"cat\ndog\n"
    elif kind == "huge":
        files["test_batch.bin"] = bytes(2_000_000)
    return write_tar(tmp_path / "damaged.tar.gz", files)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "does not exist"),
        ("text", "no tar archive"),
        ("cut", "damaged"),
        ("flipped", "damaged"),
        ("other set", "is not CIFAR-10"),
        ("unrelated", "is not CIFAR-10"),
        ("empty folder", "is not CIFAR-10"),
        ("incomplete", "lacks data_batch_4.bin"),
        ("short", "data_batch_2.bin holds 30,729 bytes, expected 30,730"),
        ("label", r"label is not in 0\.\.9"),
        ("names", "names 2 classes"),
        ("huge", "far too large"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, kind, message):
    path = damaged(kind, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_archive(path, tiny_spec("cifar10"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_in_an_archive_are_not_followed(tmp_path):
    spec = tiny_spec("cifar10")
    files = binary_files(spec, tiny_arrays(spec))
    del files["test_batch.bin"]
    path = write_tar(tmp_path / "a.tar.gz", files)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        link = tarfile.TarInfo("cifar/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        with tarfile.open(path) as old:
            for member in old:
                tar.addfile(member, old.extractfile(member))
    with pytest.raises(UserError, match=r"lacks test_batch.bin"):
        read_archive(tmp_path / "b.tar", spec)
