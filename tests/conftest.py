"""Ray for the tests: one small cluster per module, in a short temporary folder, gone afterwards."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from autolrs_ray.record.record import Record
    from tests.fake_tune import Begin

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True)  # other examples: --hypothesis-profile default
settings.load_profile("repeatable")

MINUTES = float(os.environ.get("TEST_MINUTES", "inf"))
"""After so many minutes no further test begins: what is left is skipped. For machines whose speed is not known."""
BEGAN = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where time is short, what is done to runs comes first."""
    if math.isfinite(MINUTES):
        items.sort(key=lambda item: "faults" not in item.path.parts)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - BEGAN > 60.0 * MINUTES:
        pytest.skip(f"no time left: TEST_MINUTES={MINUTES:g}")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray with 4 (pretended) CPUs and 2 (pretended) GPUs."""
    import ray

    folder = tempfile.mkdtemp(prefix="alr", dir="/tmp")  # socket paths end at 107 bytes: not pytest's own folder
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=80_000_000,
        log_to_driver=False,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Makes runs on Tune without Ray, all in one folder."""
    from autolrs_ray.driver import coordinator
    from tests.fake_tune import Begin

    coordinator._driving.clear()
    monkeypatch.setattr(coordinator.surrogate, "preload", lambda: None)
    yield Begin(tmp_path, monkeypatch)
    coordinator._driving.clear()


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    """An open record of a new run."""
    from autolrs_ray.record.record import Record

    record = Record(tmp_path / "run")
    yield record
    record.close()
