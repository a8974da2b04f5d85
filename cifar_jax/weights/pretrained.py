"""Published weights to start from (`--pretrained`): where they are, how they get here.

Files are kept where `torch.hub` keeps them, so that one that PyTorch has downloaded is found, and
the other way round. PyTorch's rule for such names is `<name>-<first digits of SHA-256>.pth`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cifar_jax.runtime.download import Unreachable, download, matches
from cifar_jax.runtime.errors import UserError
from cifar_jax.runtime.files import absolute, user_cache
from cifar_jax.weights.files import ENDINGS

# model -> name of the weights -> address.
PUBLISHED: dict[str, dict[str, str]] = {
    # torchvision's VGG16_Weights.IMAGENET1K_V1: 138,357,544 numbers, 1000 classes, 528 MiB.
    "vgg16": {"imagenet": "https://download.pytorch.org/models/vgg16-397923af.pth"},
}


def cache_dir() -> Path:
    """Returns `torch.hub`'s folder of weights: under `$TORCH_HOME`, else `$XDG_CACHE_HOME/torch`,
    else `~/.cache/torch`. Raises `UserError` where there is no home directory and it takes one."""
    home = os.environ.get("TORCH_HOME")
    home = absolute(home) if home else (user_cache() or absolute("~/.cache")) / "torch"
    return home / "hub" / "checkpoints"


def find(model: str, weights: str, *, may_download: bool = True, progress: bool = True) -> Path:
    """Returns the file of the weights a model is to start from.

    Args:
      model: a name in `cifar_jax.models.MODELS`.
      weights: a name in `PUBLISHED[model]`, or a file of one's own.
      may_download: whether a published file that is not here may be downloaded.
      progress: whether to show progress.

    Raises:
      UserError: no such weights for this model, no such file, a damaged one, or it is not here
        and cannot be downloaded (said within 10 s); the message gives the address and the place.
    """
    names = {name for known in PUBLISHED.values() for name in known}
    if weights not in names:
        if not (Path(weights).suffix or Path(weights).is_file()):  # a name, and none that is known
            raise UserError(
                f"--pretrained takes {', '.join(sorted(names))} or a file of weights "
                f"({', '.join(ENDINGS)}), got {weights!r}"
            )
        return Path(weights)
    if weights not in PUBLISHED.get(model, {}):
        having = ", ".join(known for known in sorted(PUBLISHED) if weights in PUBLISHED[known])
        raise UserError(f"there are no {weights} weights of {model}, only of {having}")
    url = PUBLISHED[model][weights]
    name = url.rpartition("/")[2]
    sha256 = re.search(r"-([0-9a-f]{8,})\.\w+$", name)[1]
    path = cache_dir() / name
    remedy = f"put the file at {path} or give one with --pretrained FILE"
    if path.exists():
        if not matches(path, sha256):
            raise UserError(
                f"{path} is damaged: its SHA-256 does not begin with {sha256}; delete it to have "
                "it downloaded again"
            )
        return path
    if not may_download:
        raise UserError(f"{url} is not here and must not be downloaded: {remedy}")
    try:
        return download(url, path, size=None, sha256=sha256, remedy=remedy, progress=progress)
    except Unreachable as error:
        raise UserError(
            f"{name} is not here and cannot be downloaded ({error}): {remedy}"
        ) from error
