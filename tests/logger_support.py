"""Stand-ins for packages that are optional."""

import importlib.machinery
import sys
import types


def stand_in(monkeypatch, name, **members):
    """A module of this name that can be imported."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)


class Remembered:
    """What `wandb.init` and `trackio.init` return."""

    def __init__(self, **given):
        self.given, self.rows, self.ended = given, [], False

    def log(self, numbers, step):
        self.rows.append((numbers, step))

    def finish(self):
        self.ended = True
