"""The progress bar of a long run, and printing beside it."""

from __future__ import annotations

import sys
from typing import TextIO

from cifar_jax.runtime.streams import printable

_FORMAT = "{desc}{percentage:3.0f}% |{bar}| {rate_fmt}, {remaining} left{postfix}"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether there is such a stream, open, and a terminal."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _bar_class() -> tuple[type, bool]:
    """Returns tqdm's bar, and whether it is a notebook's, which is drawn whatever stderr is."""
    if "ipykernel" in sys.modules and "ipywidgets" in sys.modules:
        import tqdm.auto
        import tqdm.notebook

        return tqdm.auto.tqdm, issubclass(tqdm.auto.tqdm, tqdm.notebook.tqdm)
    from tqdm import tqdm

    return tqdm, False


class Progress:
    """A bar over the images of a whole run: loss, images/s and time left; a context manager.

    It is drawn in a notebook's cell (`tqdm.auto`), or on stderr, and there only where that is a
    terminal; `print` writes to stdout above it.

    Args:
      total: images the run trains on, all epochs together.
      done: images trained on before (a resumed run); they do not count in images/s.
      stream: where the bar goes, stderr by default.
      shown: False draws nothing at all.
      doing: what the bar says until it is first moved.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        shown: bool = True,
        doing: str = "compiling",
    ):
        self._validated = ""
        make, in_notebook = _bar_class()
        stream = sys.stderr if stream is None else stream
        self._bar = make(
            total=total,
            initial=done,
            file=stream,
            disable=not (shown and (in_notebook or is_terminal(stream))),
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            miniters=1,
            mininterval=0.2,
            leave=False,
            desc=f"{doing} ",
            bar_format="{desc}...",
        )

    def update(self, images: int, *, epoch: int | str = 0, loss: float | None = None) -> None:
        """Moves the bar on by `images`; `loss` is the latest mean loss, `epoch` such as `2/30`."""
        self._bar.bar_format = _FORMAT
        if loss is not None:
            self._bar.set_description_str(f"epoch {epoch} ", refresh=False)
            self._bar.set_postfix_str(f"loss {loss:.3f}{self._validated}", refresh=False)
        self._bar.update(images)

    def validated(self, accuracy: float | None) -> None:
        """Shows from now on what the last validation found, in [0, 1]."""
        self._validated = "" if accuracy is None else f", validation {100 * accuracy:.1f} %"

    def skip(self, images: int) -> None:
        """Moves the bar on by images that were trained on before; they do not count in images/s."""
        if not self._bar.disable:
            self._bar.initial += images
            self._bar.n += images
            self._bar.refresh()

    def print(self, text: str) -> None:
        """Prints `text` to stdout, if there is one, without breaking the bar."""
        if sys.stdout is not None:
            self._bar.write(printable(text, sys.stdout), file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Takes the bar away. A closed bar still prints."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()
