"""docs/architecture.md against the imports in the source: nothing missing, nothing that points up, no circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import autolrs_ray

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "autolrs_ray"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
CORE_MAY_IMPORT = {"torch", "botorch", "gpytorch", "numpy"}


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file; packages' own __init__ are names only."""
    return {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py"
    }


def levels() -> dict[str, int]:
    """Room (a folder or a module of the package's root) -> line of the diagram, counted from the top."""
    diagram = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert diagram is not None
    lines = [line[23:] for line in diagram[1].splitlines()]
    names = [(name, i) for i, line in enumerate(lines) for name in re.split(r"[,\s]+", line) if name]
    assert len(names) == len(dict(names)), "a room stands twice in the diagram"
    return dict(names)


def imports(tree: ast.AST) -> Iterator[str]:
    """module or module.name of every import but those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))
        yield from imports(node)


def edges() -> set[tuple[str, str]]:
    """(importer, imported), both modules of the package, imports inside functions included. What `from autolrs_ray import`
    gives by name is resolved to its home."""
    known = modules()
    found = set()
    for name, file in known.items():
        for target in imports(ast.parse(file.read_text())):
            inner = target.removeprefix("autolrs_ray.")
            inner = f"{autolrs_ray._HOMES[inner]}.{inner}" if inner in autolrs_ray._HOMES else inner
            module = inner if inner in known else inner.rpartition(".")[0]
            if target.startswith("autolrs_ray.") and module in known:
                found.add((name, module))
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_is_in_the_diagram_and_nothing_else() -> None:
    assert set(levels()) == {room(module) for module in modules()}


def test_imports_between_rooms_point_down() -> None:
    level, found = levels(), {(a, b) for a, b in edges() if room(a) != room(b)}
    assert len(found) > 30
    assert [(a, b) for a, b in sorted(found) if level[room(a)] >= level[room(b)]] == []


def test_no_circle_of_imports_is_left() -> None:
    after: dict[str, set[str]] = {}
    for a, b in edges():
        after.setdefault(a, set()).add(b)
    TopologicalSorter(after).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", sorted(name for name in modules() if name.startswith("core.")))
def test_the_core_imports_torch_botorch_gpytorch_and_numpy_only(name: str) -> None:
    import sys

    found = {target.split(".")[0] for target in imports(ast.parse(modules()[name].read_text()))}
    assert found - set(sys.stdlib_module_names) - {"autolrs_ray"} <= CORE_MAY_IMPORT
    inside = {target for target in imports(ast.parse(modules()[name].read_text())) if target.startswith("autolrs_ray")}
    assert all(target.startswith("autolrs_ray.core") for target in inside)
