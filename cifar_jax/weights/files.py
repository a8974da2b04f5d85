"""Files of weights: `.safetensors` without PyTorch, `.pth` and `.pt` through it (an extra).

A file holds a PyTorch state dict (`weights/state_dict.py`). One that is read may have any name: its
content says what it is. What is read comes out as float32, and nothing in a file is ever run: a
pickle that asks for anything but tensors is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import new_file
from cifar_jax.weights.state_dict import unwrap

TORCH_ENDINGS = (".pth", ".pt")
ENDINGS = (".safetensors", *TORCH_ENDINGS)
MAX_HEADER = 100_000_000  # bytes, safetensors' own bound
# Floats that NumPy lacks, by safetensors' names; PyTorch's are ml_dtypes' own.
NARROW = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A state dict out of a file.

    Attributes:
      state: arrays by PyTorch's names; all floats are float32.
      notices: one line for each thing that was changed on the way.
      metadata: the texts a `.safetensors` file carries.
    """

    state: dict[str, np.ndarray]
    notices: list[str]
    metadata: dict[str, str]


def check_ending(path: str | os.PathLike) -> str:
    """Returns the lower-case ending of the name of a weight file to write. Raises `UserError`."""
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise UserError(f"{path}: a file of weights ends in {', '.join(ENDINGS)}")
    return ending


def read(path: str | os.PathLike) -> Weights:
    """Reads a file of weights.

    Raises:
      UserError: no such file, another kind of file, a damaged one, one that holds more than
        weights, or PyTorch is needed and not installed.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise UserError(f"no such file of weights: {path}")
        if path.is_dir():
            raise UserError(f"{path} is a directory, not a file of weights")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        found, metadata = _reader(path)(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        state, notices = _float32(unwrap(found))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Weights(state, [f"{path}: {line}" for line in notices], metadata)


def write(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a state dict; a reader sees no file, or the whole of it.

    Args:
      metadata: texts to put into a `.safetensors` file; other formats hold none.
      overwrite: whether a file of that name may be replaced.

    Raises:
      UserError: another ending, the file is there, it cannot be written, or PyTorch is needed
        and not installed.
    """
    ending = check_ending(path)
    writer = _write_safetensors if ending == ".safetensors" else _write_torch
    with new_file(path, overwrite=overwrite) as temporary:
        writer(temporary, state, dict(metadata or {}))


def content_hash(state: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of a state dict's names, shapes, dtypes and values, whatever file or
    order they were in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = np.asarray(state[name], order="C")
        digest.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()


def _reader(path: Path) -> Callable:
    """Returns the function that reads a file, by its first bytes: safetensors begins with the
    length of its JSON header, PyTorch's files are archives or, older ones, pickles. By its name
    where they say nothing, to be told damaged."""
    with open(path, "rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if head[8:] == b"{" and length <= MAX_HEADER:
        return _read_safetensors
    if head.startswith((b"PK\x03\x04", b"\x80")) or path.suffix.lower() in TORCH_ENDINGS:
        return _read_torch
    if path.suffix.lower() in ENDINGS:
        return _read_safetensors
    raise UserError(f"{path} is damaged or no file of weights (neither safetensors nor PyTorch's)")


def _float32(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns (the state dict with its floats as float32, what was said of it)."""
    result, changed = {}, {}
    for name, value in state.items():
        if not hasattr(value, "dtype"):
            raise UserError(f"the entry {name!r} is no array but {type(value).__name__}")
        value = _array(name, value)
        if value.dtype != np.float32 and value.dtype.kind not in "iub":
            if value.dtype.kind not in "fV":
                raise UserError(f"the entry {name!r} holds {value.dtype} numbers")
            changed.setdefault(str(value.dtype), []).append(name)
            value = value.astype(np.float32)
        result[name] = value
    notices = [
        f"{len(names)} of {len(state)} entries are {kind} and were converted to float32"
        for kind, names in changed.items()
    ]
    return result, notices


def _array(name: str, value: Any) -> np.ndarray:
    """Returns an entry as an array; bfloat16 and float8 keep their name in the dtype.

    Raises:
      UserError: a tensor whose numbers NumPy cannot hold.
    """
    if not hasattr(value, "detach"):
        return np.asarray(value)
    import ml_dtypes
    import torch

    kind = str(value.dtype).removeprefix("torch.")
    try:
        value = value.detach()
        if kind in NARROW.values():
            bits = torch.uint8 if value.itemsize == 1 else torch.int16
            return value.contiguous().view(bits).numpy().view(getattr(ml_dtypes, kind))
        return value.resolve_neg().numpy()
    except (TypeError, RuntimeError, NotImplementedError):
        forms = {"quantized": value.is_quantized, "nested": value.is_nested, "meta": value.is_meta}
        forms["sparse"] = "sparse" in str(value.layout)
        what = " ".join([form for form, holds in forms.items() if holds] + [kind])
        raise UserError(f"the entry {name!r} is a {what} tensor; save dense float32 ones") from None


def _read_safetensors(path: Path):
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            state = {
                name: _narrow(path, name, kind) if kind in NARROW else file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                for kind in [file.get_slice(name).get_dtype()]
            }
            return state, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file ({_short(error)})") from None
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{path} holds a dtype that NumPy has not ({_short(error)})") from None


def _narrow(path: Path, name: str, kind: str) -> np.ndarray:
    """An entry of a sound file, of a dtype that its reader for NumPy lacks."""
    import ml_dtypes

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        data = file.read(end - begin)
    return np.frombuffer(data, getattr(ml_dtypes, NARROW[kind])).reshape(entry["shape"])


def _write_safetensors(path: Path, state: Mapping[str, np.ndarray], metadata: dict[str, str]):
    import safetensors
    import safetensors.numpy

    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    try:
        # "pt" is what other readers want to see before they load it into PyTorch.
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt", **metadata})
    except safetensors.SafetensorError as error:
        raise OSError(_short(error)) from None


def _torch(path: Path):
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path.name} is PyTorch's own format, which needs the extra `torch` "
            "(pip install '.[torch]'); .safetensors needs nothing"
        ) from None
    return torch


def _read_torch(path: Path):
    torch = _torch(path)
    import pickle

    damaged = f"{path} is damaged or no PyTorch file"
    with open(path, "rb") as file:
        is_pickle = file.read(1) == b"\x80"
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:  # PyTorch itself checks no digest
                wrong = archive.testzip()
            if wrong:
                raise UserError(f"{damaged} (checksum of {wrong})")
        with warnings.catch_warnings(), open(path, "rb") as file:  # by its name it goes otherwise
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (is_zip or is_pickle):
            raise UserError(damaged) from None
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        asks = f"it wants to run {wanted.group(1)}" if wanted else "it is a program"
        raise UserError(
            f"{path} holds more than weights ({asks}) and was not opened; from where it was made, "
            "save the weights alone: torch.save(model.state_dict(), FILE)"
        ) from None
    except OSError:
        raise
    except UserError:
        raise
    except Exception as error:  # damage makes it raise nearly anything
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program, not weights; save the weights alone: "
                "torch.save(model.state_dict(), FILE)"
            ) from None
        raise UserError(f"{damaged} ({_short(error)})") from None
    return found, {}


def _write_torch(path: Path, state: Mapping[str, np.ndarray], metadata: dict[str, str]):
    torch = _torch(path)
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    try:
        torch.save(tensors, path)
    except RuntimeError as error:  # a full disk, for one
        raise OSError(_short(error)) from None


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:120]
