"""Files of weights: both formats, what is refused, and what is said of what was changed."""

import builtins
import os
import pickle

import numpy as np
import pytest

from cifar_jax.runtime.errors import UserError
from cifar_jax.weights import files as weight_files

torch = pytest.importorskip("torch", reason="needs PyTorch")


def state_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv1.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "conv1.bias": rng.normal(size=4).astype(np.float32),
        "bn.num_batches_tracked": np.array(7, np.int64),
    }


def assert_same_state(got, want):
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], strict=True, err_msg=name)


class Program:
    """Creates a file where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("ending", ["safetensors", "pth", "PT"])
def test_what_is_written_is_read(tmp_path, ending):
    path = tmp_path / f"weights.{ending}"
    weight_files.write(path, state_of(), {"model": "x"})
    found = weight_files.read(path)
    assert_same_state(found.state, state_of())
    assert found.notices == []
    assert found.metadata == ({"format": "pt", "model": "x"} if ending == "safetensors" else {})
    assert path.stat().st_mode & 0o444 == 0o444, "as readable as any other file"
    assert weight_files.content_hash(found.state) == weight_files.content_hash(state_of())
    with pytest.raises(UserError, match=r"is there already; give --overwrite"):
        weight_files.write(path, state_of(1))
    assert_same_state(weight_files.read(path).state, state_of())
    weight_files.write(path, state_of(1), overwrite=True)
    assert_same_state(weight_files.read(path).state, state_of(1))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_pytorch_and_others_read_what_is_written(tmp_path):
    from safetensors.torch import load_file

    for ending, load in (("pth", torch.load), ("safetensors", load_file)):
        path = tmp_path / f"weights.{ending}"
        weight_files.write(path, state_of())
        assert_same_state({k: v.numpy() for k, v in load(path).items()}, state_of())


def test_the_hash_is_of_the_content():
    state = state_of()
    assert weight_files.content_hash(dict(reversed(state.items()))) == weight_files.content_hash(
        state
    )
    for name, change in (
        ("conv1.bias", lambda v: np.nextafter(v, 9)),
        ("conv1.weight", lambda v: v.reshape(3, 4, 3, 3)),
        ("bn.num_batches_tracked", lambda v: v.astype(np.int32)),
    ):
        other = state | {name: change(state[name])}
        assert weight_files.content_hash(other) != weight_files.content_hash(state)


@pytest.mark.parametrize(
    "kind",
    [
        *("float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_other_floats_become_float32_and_it_says_so(tmp_path, kind, ending):
    from safetensors.torch import save_file

    values = torch.tensor([1.0, 0.333984375, -2.5e-5]).to(getattr(torch, kind))
    path = tmp_path / f"weights.{ending}"
    state = {"fc1.weight": values, "fc1.bias": torch.ones(3), "n": torch.tensor(3)}
    (save_file if ending == "safetensors" else torch.save)(state, path)
    found = weight_files.read(path)
    (notice,) = found.notices
    assert f"1 of 3 entries are {kind} and were converted to float32" in notice
    np.testing.assert_array_equal(found.state["fc1.weight"], values.float().numpy(), strict=True)
    assert found.state["n"].dtype == np.int64


def bits8():
    return torch.ones(2, dtype=torch.uint8).view(torch.bits8)


ODD = {
    "quantized qint8": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "sparse float32": lambda: torch.eye(3).to_sparse(),
    "sparse float16": lambda: torch.eye(3).half().to_sparse_csr(),
    "meta float32": lambda: torch.ones(3, device="meta"),
    "meta bfloat16": lambda: torch.ones(3, device="meta").bfloat16(),
    "nested float32": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "complex32": lambda: torch.ones(3, dtype=torch.complex32),
    "float4_e2m1fn_x2": lambda: bits8().view(torch.float4_e2m1fn_x2),
    "bits8": bits8,
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's of its own prototypes
@pytest.mark.parametrize("kind", ODD)
def test_numbers_that_cannot_be_had_are_one_line(tmp_path, kind):
    path = tmp_path / "weights.pth"
    torch.save({"a.bias": ODD[kind](), "a.weight": torch.ones(2)}, path)
    with pytest.raises(UserError) as caught:
        weight_files.read(path)
    assert str(caught.value) == (
        f"{path}: the entry 'a.bias' is a {kind} tensor; save dense float32 ones"
    )
    # Beside the weights nobody minds.
    torch.save({"state_dict": {"a.bias": torch.ones(2)}, "optimizer": {"m": ODD[kind]()}}, path)
    assert_same_state(weight_files.read(path).state, {"a.bias": np.ones(2, np.float32)})


def test_other_numbers_in_safetensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    for value, expected in (
        (torch.ones(2, dtype=torch.complex64), "the entry 'a.bias' holds complex64 numbers"),
        (bits8().view(torch.float4_e2m1fn_x2), "holds a dtype that NumPy has not"),
    ):
        save_file({"a.bias": value}, path)
        with pytest.raises(UserError, match=expected):
            weight_files.read(path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "net", None])
@pytest.mark.parametrize("prefix", ["module.", "model.", "model._orig_mod.", "net.0.module."])
def test_checkpoints_and_parallel_models_are_understood(tmp_path, wrapper, prefix):
    state = {prefix + name: torch.tensor(value) for name, value in state_of().items()}
    # `AveragedModel` counts beside its `module.`, Lightning keeps plain values beside all.
    inner = prefix.rpartition("module.")[0]
    state |= {f"{inner}n_averaged": torch.tensor(3), "loss": 0.5, "arch": "cnn", "epoch": None}
    whole = state if wrapper is None else {"epoch": 3, wrapper: state, "optimizer": {"lr": 0.1}}
    torch.save(whole, tmp_path / "weights.pth")
    assert_same_state(weight_files.read(tmp_path / "weights.pth").state, state_of())


@pytest.mark.parametrize("name", ["a.ckpt", "a.pth.tar", "a.bin", "a", "a.safetensors", "a.pth"])
@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy"])
def test_the_content_says_what_a_file_is(tmp_path, name, how):
    path = tmp_path / name
    if how == "safetensors":
        weight_files.write(tmp_path / "w.safetensors", state_of())
        (tmp_path / "w.safetensors").rename(path)
    else:
        state = {key: torch.tensor(value) for key, value in state_of().items()}
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    assert_same_state(weight_files.read(path).state, state_of())
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    with pytest.raises(UserError, match=r"is damaged or no (file of weights|PyTorch|safetensors)"):
        weight_files.read(path)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["evil.pth", "evil.ckpt", "evil", "evil.safetensors"])
def test_a_program_is_refused_and_does_not_run(tmp_path, how, protocol, name):
    marker, path = tmp_path / "marker", tmp_path / name
    whole = {"conv1.weight": torch.ones(3), "x": Program(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"x": Program(marker)}, protocol=protocol))
    else:
        options = {"_use_new_zipfile_serialization": how == "zip", "pickle_protocol": protocol}
        torch.save(whole, path, **options)
    with pytest.raises(UserError, match="holds more than weights") as caught:
        weight_files.read(path)
    assert "\n" not in str(caught.value)
    assert "state_dict()" in str(caught.value)
    assert not marker.exists()
    with open(path, "rb") as file:
        pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert marker.exists(), "the file is as hostile as it should be"


def test_whole_modules_and_programs_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"it wants to run torch\.nn.*\.Linear.*state_dict"):
        weight_files.read(tmp_path / "module.pth")
    torch.save({"lr": 0.1, "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no state dict, only a dict of lr, epoch"):
        weight_files.read(tmp_path / "other.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state dict, only list"):
        weight_files.read(tmp_path / "list.pth")
    torch.save({"a.weight": torch.ones(2), "optimizer": {"lr": 1}}, tmp_path / "mixed.pth")
    with pytest.raises(UserError, match="'optimizer' is no array but dict"):
        weight_files.read(tmp_path / "mixed.pth")


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_damage_is_one_line(tmp_path, ending):
    good = tmp_path / f"good.{ending}"
    weight_files.write(good, state_of())
    data = good.read_bytes()
    broken = {
        "empty": b"",
        "text": b"these are no weights\n" * 9,
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "archive": b"PK\x03\x04" + bytes(200),
        **{f"cut{k}": data[: len(data) * k // 8] for k in range(1, 8)},
        "shorter": data[:-1],
    }
    if ending == "pth":
        inside = data.index(state_of()["conv1.weight"].tobytes())
        broken["flipped"] = data[:inside] + bytes([data[inside] ^ 1]) + data[inside + 1 :]
    for name, content in broken.items():
        path = tmp_path / f"{name}.{ending}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged|is empty|more than weights") as caught:
            weight_files.read(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value), name


def test_names_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    for path, expected in (
        ("weights.h5", "no such file of weights"),
        ("nosuch.pth", "no such file of weights"),
        ("folder.pth", "is a directory"),
    ):
        with pytest.raises(UserError, match=expected):
            weight_files.read(tmp_path / path)
    for path, expected in (
        ("weights.h5", r"ends in \.safetensors, \.pth, \.pt"),
        ("nosuch/weights.pth", "there is no directory"),
        ("folder.pth", "is a directory"),
        ("x" * 300 + ".pth", "File name too long"),
    ):
        with pytest.raises(UserError, match=expected):
            weight_files.write(tmp_path / path, state_of(), overwrite=True)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    for ending in ("safetensors", "pth"):
        path = tmp_path / f"weights.{ending}"
        weight_files.write(path, state_of())
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
            with pytest.raises(UserError, match=r"cannot write .*No space"):
                weight_files.write(path, state_of(1), overwrite=True)
        assert_same_state(weight_files.read(path).state, state_of())
    assert len(list(tmp_path.iterdir())) == 2


def test_without_pytorch_safetensors_work_and_the_rest_names_the_extra(tmp_path, monkeypatch):
    weight_files.write(tmp_path / "there.pth", state_of())
    importing = builtins.__import__

    def without_torch(name, *arguments, **options):
        if name.split(".")[0] == "torch":
            raise ImportError(name)
        return importing(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    weight_files.write(tmp_path / "a.safetensors", state_of())
    assert_same_state(weight_files.read(tmp_path / "a.safetensors").state, state_of())
    for call in (
        lambda: weight_files.read(tmp_path / "there.pth"),
        lambda: weight_files.write(tmp_path / "new.pth", state_of()),
    ):
        with pytest.raises(UserError, match=r"needs the extra `torch`.*\.safetensors"):
            call()
    assert not (tmp_path / "new.pth").exists()
