"""Networks of a user's own: `--model mynet.py:Net`, `--model package.module:Net`.

The name after the colon is a `flax.linen` or `flax.nnx` module's class, or a function that returns
a module. A run keeps a copy of the file and its hash (`Code`), so that it can be evaluated when the
file has changed or is gone. Loading such a file is running it: what a run directory brings is run
only where the user says so (`resolve`).
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from cifar_jax.runtime.errors import UserError, nearest, one_line
from cifar_jax.runtime.files import absolute, expanded

COPIES = "code"  # the folder of a run directory that holds the copy


@dataclasses.dataclass(frozen=True)
class Code:
    """The file of a run's own network.

    Attributes:
      file: where it lay, absolute.
      sha256: of its content.
    """

    file: str
    sha256: str

    @property
    def copy(self) -> str:
        """Its copy's place in the run directory."""
        return f"{COPIES}/{Path(self.file).name}"


def is_own(model: str) -> bool:
    """Whether a recipe's `model` names a user's own network."""
    return ":" in model


def code_of(model: str) -> Code | None:
    """Returns the file that `model` names, None for a network of the package. Runs no code of a
    `file.py:Name`. Raises `UserError` where there is no such file or module."""
    if not is_own(model):
        return None
    file = _file_of(model)
    return Code(str(file), hashlib.sha256(_content(file, model)).hexdigest())


def load(model: str) -> Callable[..., nn.Module]:
    """Returns what makes the network: a class or function that `model` names, called with
    `num_classes` if it takes that and the options of `--model-option`.

    Raises:
      UserError: no such file or module, one that fails, or that has no such name.
    """
    name = _parts(model)[1]
    module = _module_of(model)
    made = getattr(module, name, None)
    if made is None:
        found = [key for key, value in vars(module).items() if _makes(value, module)]
        hint = f"; {nearest(name, found)}" if found else "; it defines no module"
        raise UserError(f"--model {model}: {module.__file__} has no {name!r}{hint}")
    if not callable(made):
        raise UserError(
            f"--model {model}: {name} is of type {type(made).__name__}; "
            "name a module's class or a function that returns a module"
        )
    return made


def make(model: str, options: Mapping[str, Any]) -> nn.Module:
    """Returns the linen module that `model` names, made with `options`.

    Args:
      options: `num_classes` and others that `takes` accepts, and those the user gave.

    Raises:
      UserError: its constructor fails, or what it returns is no module of Flax.
    """
    from flax import nnx

    maker = load(model)
    try:
        if (inspect.isclass(maker) and issubclass(maker, nnx.Module)) or takes(maker, "rngs"):
            return _of_nnx(maker, dict(options))
        made = maker(**options)
    except Exception as error:
        raise UserError(
            f"--model {model}: making it with {_shown(options)} fails: "
            f"{type(error).__name__}: {one_line(error)}{_place(error, model)}"
        ) from error
    if not isinstance(made, nn.Module):
        hint = "; an nnx module needs a parameter rngs" if isinstance(made, nnx.Module) else ""
        raise UserError(
            f"--model {model} gives an object of type {type(made).__name__}, "
            f"not a flax.linen or flax.nnx module{hint}"
        )
    return made


def takes(function: Callable, name: str) -> bool:
    """Whether a function, or a class's constructor, has a parameter of that name."""
    return name in parameters_of(function)


def parameters_of(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function, or of a class's constructor (of nnx's classes
    `inspect.signature` sees the metaclass's)."""
    function = function.__init__ if inspect.isclass(function) else function
    return inspect.signature(function).parameters


def parse_options(entries: tuple[str, ...]) -> dict[str, Any]:
    """Returns `("width=64", "act=relu")` as {"width": 64, "act": "relu"}: values are Python's
    literals where they can be, else text. Raises `UserError`."""
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--model-option takes name=value, as width=64; got {entry!r}")
        if name in found:
            raise UserError(f"--model-option names {name} twice")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = {"true": True, "false": False}.get(text, text)
    return found


def check_options(maker: Callable, model: str, options: Mapping[str, Any]) -> None:
    """Raises `UserError` where `maker` does not take one of the user's `options`."""
    parameters = parameters_of(maker)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    given = {"self", "parent", "name", "rngs", "num_classes", "lowering", "remat", "fold"}
    known = [name for name in parameters if name not in given]
    for name in options:
        if name not in known:
            valid = nearest(name, known) if known else "it takes none"
            raise UserError(f"--model-option {name}: {model} takes no {name!r}; {valid}")


def resolve(model: str, code: Code, run: Path, trust: bool) -> tuple[str, str | None]:
    """Returns what to load for a trained run's `model`, and a line that says which file is used
    where that is not the one at its recorded place.

    The file at its recorded place is used if it is as it was, the user's own, outside the run
    directory and no part of the Python installation. Anything else came with the directory.

    Args:
      trust: the user said `--trust-code`.

    Raises:
      UserError: other code would be run, and `trust` is False, or there is no copy as recorded.
    """
    name, file, copy = _parts(model)[1], Path(code.file), run / code.copy
    there = _digest(file)
    if there == code.sha256 and _is_users_own(file, run):
        return (f"{file}:{name}" if _parts(model)[0].endswith(".py") else model), None
    if there is None:
        why = f"{file} is gone"
    elif there != code.sha256:
        why = f"{file} has changed since"
    else:
        why = f"{file} is not a file of your own"
    if not trust:
        raise UserError(
            f"this run brings its own network: {why}, so the copy {copy} would be run; look at it, "
            "and give --trust-code if you trust it"
        )
    if _digest(copy) != code.sha256:
        raise UserError(f"{why}, and {copy} is not the copy that the run recorded")
    return f"{copy}:{name}", f"network from {copy}: {why}"


def keep_copy(code: Code | None, folder: Path) -> None:
    """Writes the copy into a run directory. Raises `UserError` where the file has changed since
    the run began."""
    if code is None:
        return
    target = folder / code.copy
    if _digest(target) == code.sha256:
        return
    content = _content(Path(code.file), code.file)
    if hashlib.sha256(content).hexdigest() != code.sha256:
        raise UserError(f"{code.file} changed while the run was starting; start it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def _parts(model: str) -> tuple[str, str]:
    where, _, name = model.rpartition(":")
    if not where or not name.isidentifier():
        raise UserError(f"--model {model}: a network of your own is FILE.py:NAME or MODULE:NAME")
    return where, name


def _file_of(model: str) -> Path:
    where = _parts(model)[0]
    if where.endswith(".py") or os.sep in where:
        return absolute(expanded(where))
    try:
        with _importing_from(Path.cwd()):
            spec = importlib.util.find_spec(where)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise UserError(f"--model {model}: there is no module {where} of Python source; or a file?")
    return Path(spec.origin).absolute()


def _content(file: Path, model: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--model {model}: cannot read {file}: {error.strerror}") from None


def _digest(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def _module_of(model: str) -> types.ModuleType:
    where, file = _parts(model)[0], _file_of(model)
    try:
        if not (where.endswith(".py") or os.sep in where):
            with _importing_from(Path.cwd()):
                return importlib.import_module(where)
        return _run(file, _content(file, model))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--model {model}: {file} fails: {type(error).__name__}: {one_line(error)}"
            f"{_place(error, model)}"
        ) from error


@functools.cache  # one class for one content: programs are compiled once
def _run(file: Path, content: bytes) -> types.ModuleType:
    name = f"cifar_jax_own_{hashlib.sha256(os.fsencode(file) + content).hexdigest()[:16]}"
    module = types.ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses and flax look a class's module up
    try:
        with _importing_from(file.parent):
            exec(compile(content, str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """What lies beside a file may be imported by it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _makes(value: Any, module: types.ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", "") == module.__name__


def _is_users_own(file: Path, run: Path) -> bool:
    real = file.resolve()
    if real.is_relative_to(run.resolve()):
        return False
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")}
    if any(real.is_relative_to(Path(folder).resolve()) for folder in installed):
        return False
    return not hasattr(os, "getuid") or real.stat().st_uid == os.getuid()


def _place(error: BaseException, model: str) -> str:
    """Returns ` (mynet.py line 12)`: the last line of the user's own file in an error's traceback,
    "" where there is none."""
    file = str(_file_of(model))
    if isinstance(error, SyntaxError) and error.filename == file:
        return f" ({Path(file).name} line {error.lineno})"
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == file:
            line = at.tb_lineno
        at = at.tb_next
    return f" ({Path(file).name} line {line})" if line else ""


def call_failed(model: str, image_shape, where: str, error: Exception) -> UserError:
    """Returns the error of a network whose call fails on images of `image_shape` (H, W, C);
    `where` says in which layer."""
    shape = "x".join(map(str, image_shape))
    return UserError(
        f"--model {model} fails on images of {shape}{where}: {type(error).__name__}: "
        f"{one_line(error)[:300]}{_place(error, model)}"
    )


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no options"


def _of_nnx(maker: Callable, options: dict) -> nn.Module:
    """Returns an nnx module as a linen one. Its `__call__` is given `train` if it takes that; its
    dropout and batch norm are switched by `train()` and `eval()` in either case."""
    from flax.core import FrozenDict

    return _FromNNX(maker, FrozenDict(options))


class _FromNNX(nn.Module):
    """An nnx module behind linen's interface (`flax.nnx.bridge`). Input [N, H, W, C], output what
    the module gives; its variables are collections under the name `net`."""

    maker: Callable
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, images, train):
        from flax.nnx import bridge

        build = _Switched(self.maker, tuple(self.options.items()))
        return bridge.ToLinen(build, metadata_fn=None, name="net")(images, train=train)


@dataclasses.dataclass(frozen=True)
class _Switched:
    """Makes an nnx module that is switched to training or inference by `train`; as a value, so
    that two of the same are equal."""

    maker: Callable
    options: tuple

    def __call__(self, rngs):
        from flax import nnx

        class Switched(nnx.Module):
            def __init__(self, net):
                self.net = net

            def __call__(self, images, train):
                (self.net.train if train else self.net.eval)()
                given = {"train": train} if takes(self.net.__call__, "train") else {}
                return self.net(images, **given)

        # At first linen has one stream, `params`; a module may ask for any, as for `dropout`.
        default = rngs.params() if "params" in rngs else rngs.default()
        others = {name: rngs[name]() for name in rngs if name not in ("params", "default")}
        return Switched(self.maker(**dict(self.options), rngs=nnx.Rngs(default, **others)))
