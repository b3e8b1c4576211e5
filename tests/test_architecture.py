"""docs/architecture.md against the imports in the source: nothing missing, nothing that points up or sideways."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    """Module -> line of the diagram, counted from the top."""
    diagram = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert diagram is not None
    lines = [line[18:] for line in diagram[1].splitlines()]
    names = [(name, i) for i, line in enumerate(lines) for name in re.split(r"[,|\s]+", line) if name]
    assert len(names) == len(dict(names)), "a module stands twice in the diagram"
    return dict(names)


def imports(tree: ast.AST, lazily: bool = False) -> Iterator[tuple[str, bool]]:
    """(module or module.name, whether inside a function) of every import but those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((f"{node.module}.{alias.name}", lazily) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            yield from ((arg.value, lazily) for arg in node.args if isinstance(arg, ast.Constant))
        yield from imports(node, lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def edges() -> set[tuple[str, str, bool]]:
    """(importer, imported, whether inside a function), both modules of the package. What `import autolrs_ray` gives by
    name counts as nothing: those names are resolved on first use."""
    known = modules()
    found = set()
    for name, file in known.items():
        for target, lazily in imports(ast.parse(file.read_text())):
            inner = target.removeprefix("autolrs_ray.")
            module = inner if inner in known else inner.rpartition(".")[0]
            if target.startswith("autolrs_ray.") and module in known:
                found.add((name, module, lazily))
    return found


def test_every_module_is_in_the_diagram_and_nothing_else() -> None:
    assert set(levels()) == set(modules())


def test_imports_point_down() -> None:
    level = levels()
    assert len(edges()) > 50
    assert [(a, b) for a, b, lazily in edges() if not lazily and level[a] >= level[b]] == []


def test_the_imports_inside_functions_that_point_up_are_those_named() -> None:
    level = levels()
    named = set(re.findall(r"`([\w.]+) -> ([\w.]+)`", PAGE))
    assert {(a, b) for a, b, lazily in edges() if lazily and level[a] >= level[b]} == named


@pytest.mark.parametrize("name", sorted(name for name in modules() if name.startswith("core.")))
def test_the_core_imports_torch_botorch_gpytorch_and_numpy_only(name: str) -> None:
    import sys

    found = {target.split(".")[0] for target, _ in imports(ast.parse(modules()[name].read_text()))}
    assert found - set(sys.stdlib_module_names) - {"autolrs_ray"} <= CORE_MAY_IMPORT
    inside = {
        target for target, _ in imports(ast.parse(modules()[name].read_text())) if target.startswith("autolrs_ray")
    }
    assert all(target.startswith("autolrs_ray.core") for target in inside)
