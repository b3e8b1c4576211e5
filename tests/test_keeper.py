"""What is deleted of a run that goes on: what its own journal names and nobody needs, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from autolrs_ray.driver.keeper import CheckpointKeeper
from tests.test_settings import opened, train

POLICIES: dict[str, dict[str, Any]] = {
    "paper": dict(policy="paper", stage_steps=50, num_lrs=2),
    "anchored": dict(num_lrs=2),
}
OURS = ("checkpoint_000001", "checkpoint_step_000000007")
OTHERS = (
    "best/checkpoint_000001",
    "pbt_trial_00000/checkpoint_000007",
    "main_1/checkpoint_best",
    "main_1/mine",
    "checkpoint_3",
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("finished", [False, True])
def test_nothing_is_deleted_that_the_journal_does_not_name_and_nothing_of_a_finished_run(
    policy: str, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autolrs_ray.driver.stored.Stored.damage", lambda self, path: "")
    first = opened(tmp_path, **POLICIES[policy])
    segment = first.desk.assign("trial")
    assert segment is not None
    for _ in range(2):
        first.desk.name_folder("trial", "main_1")
    first.desk.forget("trial")
    train(first, 1000 if finished else 1)
    assert first.desk.policy.done == finished
    for name in (*(f"main_1/{name}" for name in OURS), *OTHERS):
        (tmp_path / name).mkdir(parents=True)
    outside = tmp_path / "precious"
    outside.mkdir()
    (tmp_path / "main_1" / "checkpoint_000002").symlink_to(outside)
    again = opened(tmp_path, **POLICIES[policy])
    storage = SimpleNamespace(storage_filesystem=LocalFileSystem())
    CheckpointKeeper(again.desk, {}, storage, object).adopt(str(tmp_path))
    again.close()
    assert all((tmp_path / name).exists() for name in (*OTHERS, "precious", "main_1/checkpoint_000002"))
    assert [(tmp_path / "main_1" / name).exists() for name in OURS] == [finished, finished]
