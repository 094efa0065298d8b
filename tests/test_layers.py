"""Imports run in one direction: a room takes from the rooms below it, and no module imports itself through others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "sparse_prefill"
FACE = "sparse_prefill"  # the package's own file, which hands on what is public
# From the ground up: packages, and modules that stand beside them.
ROOMS = [
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
    FACE,
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
FOR_ALL = {"__version__"}  # names of the package's own file that any module may import


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or FACE


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imported(module: str) -> set[str]:
    """Modules of the package that a module names in imports, those in functions and for type checkers included."""
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
            paths = [path if path in MODULES else package or FACE for path in inside]
        else:
            continue
        found.update(paths)
    return found


def in_package(path: str) -> bool:
    return path == "sparse_prefill" or path.startswith("sparse_prefill.")


IMPORTS = {module: imported(module) for module in MODULES}


def test_every_module_belongs_to_a_room():
    rooms = {room_of(module) for module in MODULES if module not in EARLIER_PATHS}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    if module in EARLIER_PATHS:
        pytest.skip("only hands names on")
    height = ROOMS.index(room_of(module))
    upward = [other for other in IMPORTS[module] if ROOMS.index(room_of(other)) > height]
    assert not upward, f"{module} imports {', '.join(sorted(upward))}, from above it"


def test_nothing_imports_earlier_paths():
    users = {module: IMPORTS[module] & EARLIER_PATHS for module in MODULES}
    assert not {module: found for module, found in users.items() if found}


def test_no_module_imports_itself_through_others():
    """A package's file hands on what is inside it, so that it takes from its own modules and none of these from it."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            raise AssertionError("a circle of imports: " + " -> ".join([*trail[trail.index(module) :], module]))
        if module not in done:
            for other in sorted(IMPORTS[module]):
                walk(other, [*trail, module])
            done.add(module)

    for module in MODULES:
        walk(module, [])
