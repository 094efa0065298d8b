"""Imports point downward only: a package imports from lower layers, and there are no import cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "sparse_prefill"
TOP = "sparse_prefill"  # __init__.py of the package, which re-exports public names
# Packages and top-level modules, from the lowest layer to the highest.
LAYERS = [
    "core",
    "reference",
    "tunable_option",
    "registry",
    "record",
    "kernel",
    "selectors",
    "estimators",
    "strategy",
    "head_table",
    "wrappers",
    "strategies",
    "plan",
    "spec",
    "cuda_graphs",
    "attention",
    "warmup",
    "packing",
    TOP,
    "models",
    "tasks",
    "evaluation",
    "calibration",
    "plotting",
    "report",
    "cli",
]
EARLIER_PATHS = {
    "block_mask",
    "evaluation.floors",
    "knob",
    "models.gguf_tokenizer",
    "models.stats",
    "models.subject",
    "models.torchtune_attention",
    "options",
}
FOR_ALL = {"__version__"}  # names of __init__.py that any module may import


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or TOP


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def layer_of(module: str) -> str:
    return module.partition(".")[0]


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports, including imports in functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            paths = [alias.name.removeprefix("sparse_prefill.") for alias in node.names if in_package(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{module} has a relative import in line {node.lineno}: name the whole path.")
        elif isinstance(node, ast.ImportFrom) and in_package(node.module or ""):
            package = (node.module or "").removeprefix("sparse_prefill").removeprefix(".")
            names = {alias.name for alias in node.names} - (set() if package else FOR_ALL)
            inside = [f"{package}.{name}".removeprefix(".") for name in names]
            paths = [path if path in MODULES else package or TOP for path in inside]
        else:
            continue
        found.update(paths)
    return found


def in_package(path: str) -> bool:
    return path == "sparse_prefill" or path.startswith("sparse_prefill.")


IMPORTS = {module: imported(module) for module in MODULES}


def test_every_module_belongs_to_a_layer():
    layers = {layer_of(module) for module in MODULES if module not in EARLIER_PATHS}
    assert layers == set(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
    if module in EARLIER_PATHS:
        pytest.skip("only re-exports names")
    height = LAYERS.index(layer_of(module))
    upward = [other for other in IMPORTS[module] if LAYERS.index(layer_of(other)) > height]
    assert not upward, f"{module} imports {', '.join(sorted(upward))}, from above it"


def test_no_module_imports_earlier_paths():
    users = {module: IMPORTS[module] & EARLIER_PATHS for module in MODULES}
    assert not {module: found for module, found in users.items() if found}


def test_there_are_no_import_cycles():
    """An ``__init__.py`` re-exports names of its modules, so these must not import from it."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            raise AssertionError("an import cycle: " + " -> ".join([*trail[trail.index(module) :], module]))
        if module not in done:
            for other in sorted(IMPORTS[module]):
                walk(other, [*trail, module])
            done.add(module)

    for module in MODULES:
        walk(module, [])
