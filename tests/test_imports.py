"""What an import costs: dependencies point downwards only, and heavy ones are not imported before they are needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import autolrs_ray

PACKAGE = Path(autolrs_ray.__file__).parent
PURE = [
    ".".join(("autolrs_ray", *path.relative_to(PACKAGE).with_suffix("").parts))
    for room in ("core", "training", "outcome")
    for path in sorted((PACKAGE / room).rglob("*.py"))
    if path.stem != "__init__"
]


def loaded(statement, *modules):
    code = f"import sys\n{statement}\nprint([name for name in {list(modules)!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_the_core_the_training_loop_and_the_schedule_never_import_ray():
    assert "autolrs_ray.core.paper.surrogate" in PURE
    statement = "; ".join(f"import {name}" for name in PURE)
    use = "from autolrs_ray.core.paper.surrogate import propose; propose([(0.1, 1.0), (0.5, 2.0)], [], 2.0)"
    assert loaded(f"{statement}\n{use}", "ray", "matplotlib", "sklearn") == "[]"


def test_importing_the_package_imports_neither_ray_nor_torch():
    assert loaded("import autolrs_ray", "ray", "torch", "botorch", "numpy") == "[]"


def test_the_journal_imports_neither_ray_nor_torch():
    assert loaded("import autolrs_ray.record.journal", "ray", "torch", "numpy") == "[]"


def test_botorch_is_imported_on_first_use():
    assert loaded("import autolrs_ray.core.policies", "ray", "botorch", "gpytorch") == "[]"


def test_a_run_of_single_process_trials_imports_nothing_for_several_processes():
    assert loaded("from autolrs_ray import run", "autolrs_ray.trial.distributed", "botorch", "matplotlib") == "[]"


def test_every_public_name_is_there_and_others_are_not():
    assert set(autolrs_ray._HOMES) == set(autolrs_ray.__all__)
    for name in autolrs_ray.__all__:
        if autolrs_ray._HOMES[name] in (
            "core.policy",
            "outcome.schedule",
            "training.averages",
            "training.task",
            "training.trainer",
        ):  # those that need no Ray
            assert getattr(autolrs_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = autolrs_ray.nonsense
