"""Imports point one way: a room takes from those before it in docs/layout.md's line, never back."""

import ast
import pathlib

import pytest

import cifar_jax

PACKAGE = pathlib.Path(cifar_jax.__file__).parent
ORDER = (
    *(
        "runtime",
        "settings",
        "recipes",
        "datasets",
        "ops",
        "models",
        "augment",
        "optimizers",
        "microbatches",
        "steps",
    ),
    *("input_pipeline", "parallel", "checkpoints", "reporting", "training", "weights", "replicas"),
    "commands",
)
COMMANDS = (
    *("_cli", "_config", "__main__", "train", "compare", "fitting", "result", "evaluate"),
    *("predict", "convert", "export", "report", "sweep", "find_lr"),
    "datasets.__main__",
)


def room(module):
    """The place in `ORDER` of a module, named without the package."""
    return ORDER.index("commands" if module in COMMANDS else module.split(".")[0])


def imported(tree):
    """The package's modules that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            for alias in node.names:
                path = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_file_imports_from_its_room_and_those_before_it(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    used = [
        m.partition(".")[2] for m in imported(ast.parse(path.read_text())) if m[:9] == "cifar_jax"
    ]
    back = {f"{name} -> {module}" for module in used if module and room(module) > room(name)}
    assert not back, "move the function down, or hand it in as an argument"
