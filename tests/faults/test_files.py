"""Damaged and hostile files in a run folder: the last good one is used with a warning, and nothing foreign is executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autolrs_ray import AutoLRSSearch
from autolrs_ray.record.checkpoints import PICKLE_FILE
from autolrs_ray.record.journal import JOURNAL_FILE
from autolrs_ray.record.record import PREVIOUS_STATE_FILE, STATE_FILE
from tests.faults.harness import COUNTS, SCALE, Driver, journal_text
from tests.faults.trainables import flip as flipped

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

Undisturbed = Callable[[str], dict[str, Any]]
Damage = Callable[[Path], None]


class Evil:
    """Unpickling it creates the file named in FAULTS_MARKER."""

    def __reduce__(self) -> Any:
        return (os.system, ('touch "$FAULTS_MARKER"',))


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def hostile(file: Path) -> None:
    file.write_bytes(pickle.dumps(Evil()))


def removed(file: Path) -> None:
    file.unlink()


DAMAGES = [truncated, emptied, flipped, hostile, removed]
one_by_one = pytest.mark.skipif(SCALE < 20, reason="one kind of file at a time: with FAULTS=20")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> tuple[Path, Path]:
    """(storage, copy of it): a paper run whose driver was killed in the search of its fourth stage."""
    storage = tmp_path_factory.mktemp("stopped")
    with Driver(storage, ("--address", cluster)) as driver:
        assert driver.wait_until(lambda: '"arm":"s003p01","role"' in journal_text(storage))
        driver.kill()
    settle(storage / "run")
    copy = storage.with_name("copy")
    shutil.copytree(storage, copy)
    return storage, copy


@pytest.fixture
def run(stopped: tuple[Path, Path]) -> Path:
    """The stopped run's folder, as it was when it was stopped."""
    storage, copy = stopped
    shutil.rmtree(storage)
    shutil.copytree(copy, storage)
    return storage / "run"


def settle(run: Path) -> None:
    """Put back the state of a driver that was killed between two renames; a resume would take the one before it."""
    if not (run / STATE_FILE).exists():
        shutil.copy(run / PREVIOUS_STATE_FILE, run / STATE_FILE)


def main_checkpoints(run: Path) -> list[Path]:
    """Those of the main trial that its state names, the last one first."""
    state = json.loads((run / STATE_FILE).read_text())["state"]
    return [run / state["checkpoint"], run / state["previous"]["checkpoint"]]


def finish(run: Path, cluster: str, expected: dict[str, Any], rows: bool = True) -> str:
    """Resume, compare with `expected`, and return what was said on stderr."""
    marker = run.parent / "executed"
    with Driver(run.parent, ("--address", cluster), {"FAULTS_MARKER": str(marker)}) as driver:
        driver.ends_as(expected, rows)
        assert not marker.exists(), "a file of the run was executed"
        return driver.errors.read_text()


@pytest.mark.parametrize("damage", DAMAGES if SCALE >= 20 else [truncated, flipped, hostile])
def test_everything_damaged_at_once(run: Path, cluster: str, undisturbed: Undisturbed, damage: Damage) -> None:
    last, previous = main_checkpoints(run)
    checkpoints = [folder / "state.pt" for folder in run.glob("*/checkpoint_*") if folder != previous]
    for file in (*checkpoints, run / STATE_FILE, run / JOURNAL_FILE):
        damage(file)
        COUNTS["corrupt_files"] += 1
    said = finish(run, cluster, undisturbed("paper"), rows=False)
    assert f"checkpoint {last}" in said
    assert "RecordWarning" in said
    assert "unreadable; going back a stage" in journal_text(run.parent)
    commits = [json.loads(line) for line in journal_text(run.parent).splitlines() if '"event":"commit"' in line]
    assert [row["end"] for row in commits] == [40, 80, 120, 120, 160, 200]


def test_damaged_trunks_go_back_a_checkpoint(tmp_path: Path, cluster: str, undisturbed: Undisturbed) -> None:
    command = ("--policy", "anchored", "--address", cluster)
    with Driver(tmp_path, command) as driver:
        assert driver.wait_until(lambda: '"event":"decision","step":102' in journal_text(tmp_path))
        driver.kill()
    settle(tmp_path / "run")
    state = json.loads((tmp_path / "run" / STATE_FILE).read_text())["state"]
    last = [
        tmp_path / "run" / trunk["checkpoint"]
        for trunk in state["trunks"]
        if trunk["status"] == "open" and trunk["checkpoint"]
    ]
    for folder in last:
        flipped(folder / "state.pt")
        COUNTS["corrupt_files"] += 1
    assert last
    with Driver(tmp_path, command) as driver:
        driver.ends_as(undisturbed("anchored"), rows=False)
    assert journal_text(tmp_path).count("is unreadable; back to step") == len(last)


@one_by_one
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(run: Path, cluster: str, undisturbed: Undisturbed, damage: Damage) -> None:
    last, _ = main_checkpoints(run)
    damage(last / "state.pt")
    COUNTS["corrupt_files"] += 1
    said = finish(run, cluster, undisturbed("paper"), rows=False)
    assert f"checkpoint {last}" in said
    assert "unreadable; going back a stage" in journal_text(run.parent)


@one_by_one
@pytest.mark.parametrize("damage", [truncated, emptied, removed])
def test_damaged_manifest_or_both_checkpoints(
    run: Path, cluster: str, undisturbed: Undisturbed, damage: Damage
) -> None:
    last, previous = main_checkpoints(run)
    if damage is removed:
        for folder in (last, previous):
            shutil.rmtree(folder)
    else:
        damage(last / "manifest.json")
    COUNTS["corrupt_files"] += 2 if damage is removed else 1
    finish(run, cluster, undisturbed("paper"), rows=False)
    way = "starting from scratch" if damage is removed else "going back a stage"
    assert way in journal_text(run.parent)


@one_by_one
@pytest.mark.parametrize("name", [STATE_FILE, JOURNAL_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_record(run: Path, cluster: str, undisturbed: Undisturbed, name: str, damage: Damage) -> None:
    damage(run / name)
    COUNTS["corrupt_files"] += 1
    said = finish(run, cluster, undisturbed("paper"))
    assert "RecordWarning" in said or (name, damage) == (STATE_FILE, removed)


def test_both_states_damaged_is_a_clear_error(run: Path, cluster: str) -> None:
    hostile(run / STATE_FILE)
    truncated(run / PREVIOUS_STATE_FILE)
    COUNTS["corrupt_files"] += 2
    marker = run.parent / "executed"
    with Driver(run.parent, ("--address", cluster), {"FAULTS_MARKER": str(marker)}) as driver:
        assert driver.finish() == 1
        assert "RuntimeError: cannot resume from" in driver.errors.read_text()
    assert not marker.exists()


def test_hostile_checkpoints_with_matching_manifests_are_refused(run: Path, cluster: str) -> None:
    """All of them: where a probe had ended, the run goes on from that one's state and not from the main trial's."""
    for file in run.glob("*/checkpoint_*/state.pt"):
        hostile(file)
        content = file.read_bytes()
        manifest = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "step": 120}
        (file.parent / "manifest.json").write_text(json.dumps(manifest))
        COUNTS["corrupt_files"] += 1
    marker = run.parent / "executed"
    more = ("--options", json.dumps({"max_failures": 0}))
    with Driver(run.parent, ("--address", cluster, *more), {"FAULTS_MARKER": str(marker)}) as driver:
        assert driver.finish() == 1
        assert "cannot be loaded" in driver.errors.read_text()
    assert not marker.exists()


def test_a_pickle_planted_in_every_checkpoint_is_not_executed(
    run: Path, cluster: str, undisturbed: Undisturbed
) -> None:
    """Tune unpickles a file of that name wherever it lies."""
    last, _ = main_checkpoints(run)
    for folder in run.glob("*/checkpoint_*"):
        hostile(folder / PICKLE_FILE)
        COUNTS["corrupt_files"] += 1
    said = finish(run, cluster, undisturbed("paper"), rows=False)
    assert f"{last} holds {PICKLE_FILE}, which would be executed" in said
    assert "starting from scratch" in journal_text(run.parent)


def damaged(folder: Path, cluster: str, policy: str, *moments: str) -> tuple[str, ...]:
    """The arguments of a driver whose checkpoints are damaged at `moments`: see tests/faults/trainables.py."""
    config = json.dumps({"flag": str(folder / "flag"), "damage_at": moments})
    COUNTS["corrupt_files"] += len(moments)
    return ("--policy", policy, "--address", cluster, "--config", config)


@pytest.mark.parametrize(("policy", "moments", "way"), [
    ("paper", ("copy main 80", "restore s003p01 120"), "unreadable; going back a stage"),
    ("anchored", ("restore t04 3",), "unreadable; back to step 0"),
])  # fmt: skip
def test_checkpoints_damaged_while_the_run_is_under_way(
    tmp_path: Path, cluster: str, undisturbed: Undisturbed, policy: str, moments: tuple[str, ...], way: str
) -> None:
    """A copy of Tune's with a flipped bit: the segment is trained again. One that was whole, and is not when a trial is to
    start from it: the run goes back to the one before, and chooses what it had chosen."""
    with Driver(tmp_path, damaged(tmp_path, cluster, policy, *moments)) as driver:
        driver.ends_as(undisturbed(policy), rows=False)
    assert (tmp_path / "flag").read_text().splitlines() == list(moments)
    assert way in journal_text(tmp_path)


def test_checkpoints_that_are_no_good_end_the_run_with_a_clear_error_and_it_resumes(
    tmp_path: Path, cluster: str, undisturbed: Undisturbed
) -> None:
    """One cut short between the trial's look at it and the driver's, and one that no trial may fail for."""
    again = damaged(tmp_path, cluster, "paper", "saved main 120", "restore s003p00 120")
    again += ("--options", json.dumps({"max_failures": 0}))
    errors = (
        r"the main trial ended its segment at step 120, but its checkpoint is no good: .*cut short.*\(step 80\); run the same",
        r"checkpoint .*main_.* is cut short or altered.* No trial can start from it: look at the storage, and run the same",
    )
    for expected in errors:
        with Driver(tmp_path, again) as driver:
            assert driver.finish() == 1
            message = driver.errors.read_text().splitlines()[-1]
        assert re.search(f"AutoLRSError: {expected} command again", message), message
    with Driver(tmp_path, again) as driver:
        driver.ends_as(undisturbed("paper"), rows=False)


def test_hostile_files_of_tune_are_not_read(
    run: Path, cluster: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What our resume promises. (Tuner.restore is Ray's own: it unpickles the files of the folder it is given.)"""
    found = [file for file in run.rglob("*") if file.suffix in (".pkl", ".json") and "autolrs" not in file.name]
    planted = [run / name for name in ("tuner.pkl", "trainable.pkl", "searcher-state-2099-01-01_00-00-00.pkl",
                                       "search_gen_state-2099-01-01_00-00-00.json", "callback-state-2099.pkl",
                                       "experiment_state-2099-01-01_00-00-00.json")]  # fmt: skip
    kept = {file for folder in main_checkpoints(run) for file in folder.iterdir()}
    for file in {*found, *planted} - kept:
        hostile(file)
        COUNTS["corrupt_files"] += 1
    finish(run, cluster, undisturbed("paper"))
    monkeypatch.setenv("FAULTS_MARKER", str(tmp_path / "executed"))
    with pytest.raises(ValueError, match=r"codec|JSON|Expecting"):
        AutoLRSSearch(200, policy="paper", stage_steps=40).restore(str(planted[2]))
    assert not (tmp_path / "executed").exists()


def test_second_driver_on_a_run_is_refused(tmp_path: Path, cluster: str, undisturbed: Undisturbed) -> None:
    slow = ("--address", cluster, "--config", json.dumps({"pause_s": 0.2}))
    with Driver(tmp_path, slow) as first:
        assert first.wait_until(lambda: '"event":"commit"' in journal_text(tmp_path))
        first.process.send_signal(signal.SIGSTOP)  # else it may have ended before the second has started
        with Driver(tmp_path, slow) as second:
            assert second.finish() == 1
            assert "another process is driving the run" in second.errors.read_text()
        first.process.send_signal(signal.SIGCONT)
        first.ends_as(undisturbed("paper"))
