"""Checkpoints written in the background: a snapshot, in order, announced only when whole. Those copied by Tune: flushed,
and read before anyone is told. Nothing in them is unpickled."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from autolrs_ray.record import checkpoints
from autolrs_ray.record.checkpoints import (
    PICKLE_FILE,
    STATE_FILE,
    BackgroundWriter,
    CheckpointError,
    flush_checkpoint,
    read_checkpoint,
    snapshot,
    verify_checkpoint,
    write_checkpoint,
)
from autolrs_ray.trial.trainable import AutoLRSTrainable, trainable_for, writes_manifests
from tests.crashes import Malice
from tests.tasks import build_tiny


def state(step: int, value: float = 0.0) -> dict:
    return {"step": step, "model": {"w": torch.full((3,), value)}, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}


@pytest.fixture
def gate(monkeypatch):
    """Holds every write back until it is set."""
    gate, write = threading.Event(), checkpoints.write_checkpoint

    def held(*arguments):
        assert gate.wait(10.0)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "write_checkpoint", held)
    yield gate
    gate.set()


def test_a_snapshot_shares_no_memory():
    one = {"a": torch.zeros(2), "b": [torch.zeros(1), (1, "x")], "c": None}
    two = snapshot(one)
    one["a"] += 1.0
    one["b"][0] += 1.0
    assert two["a"].tolist() == [0.0, 0.0]
    assert two["b"][0].tolist() == [0.0]
    assert two["b"][1] == (1, "x")
    assert two["c"] is None


def test_training_goes_on_while_the_state_of_its_commit_is_written(tmp_path, gate):
    writer, live = BackgroundWriter(), state(7, 1.0)
    writer.submit(live, str(tmp_path / "a"))
    live["model"]["w"] += 5.0
    writer.poll()
    assert writer.durable_step == 0
    gate.set()
    writer.wait()
    assert writer.durable_step == 7
    assert verify_checkpoint(tmp_path / "a") == 7
    assert read_checkpoint(tmp_path / "a")["model"]["w"].tolist() == [1.0, 1.0, 1.0]


def test_one_write_at_a_time_and_in_order(tmp_path, gate):
    writer = BackgroundWriter()
    writer.submit(state(1), str(tmp_path / "1"))
    second = threading.Thread(target=writer.submit, args=(state(2), str(tmp_path / "2")))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # no third copy of the state in memory
    gate.set()
    second.join(10.0)
    writer.wait()
    assert writer.durable_step == 2
    assert verify_checkpoint(tmp_path / "1") == 1


def test_a_failed_write_is_told_and_the_next_one_may_succeed(tmp_path):
    (tmp_path / "file").write_text("")
    writer = BackgroundWriter()
    writer.submit(state(3), str(tmp_path / "file" / "below"))
    writer.wait()
    assert writer.durable_step == 0
    assert "step 3 could not be written" in str(writer.failure)
    writer.submit(state(4), str(tmp_path / "good"))
    writer.wait()
    assert (writer.durable_step, writer.failure) == (4, None)
    writer.forget()
    assert writer.durable_step == 0


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flushed(monkeypatch):
    """The files and folders that have been flushed to disk."""
    paths, fsync = [], os.fsync

    def noted(descriptor):
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return paths


def test_a_new_folder_is_flushed_with_those_it_lies_in(tmp_path, flushed):
    folder = tmp_path / "trial" / "checkpoint"
    write_checkpoint(state(1), folder)
    assert {str(path) for path in (folder, folder.parent, tmp_path)} < set(flushed)
    assert flushed.index(f"{folder}/{STATE_FILE}.tmp") < flushed.index(str(folder))
    flushed.clear()
    write_checkpoint(state(2), folder)
    assert str(tmp_path) not in flushed
    flushed.clear()
    write_checkpoint(state(3), tmp_path / "copied from", flush=False)
    assert flushed == []
    assert verify_checkpoint(tmp_path / "copied from") == 3


def test_every_file_of_a_copy_is_flushed(tmp_path, flushed, monkeypatch):
    folder = tmp_path / "run" / "trial" / "checkpoint"
    (folder / "below").mkdir(parents=True)
    files = [folder / "a", folder / "below" / "b"]
    for file in files:
        file.write_text("x")
    flush_checkpoint(folder)
    above = [folder.parent, folder.parent.parent]
    assert sorted(flushed) == sorted(map(str, [*files, folder / "below", folder, *above]))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=f"{folder} cannot be flushed to disk: .*No space left"):
        flush_checkpoint(folder)


def test_the_size_alone_tells_a_checkpoint_cut_short(tmp_path):
    write_checkpoint(state(5), tmp_path)
    content = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(content[:-1] + b"x")
    assert verify_checkpoint(tmp_path, content=False) == 5
    (tmp_path / STATE_FILE).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        verify_checkpoint(tmp_path, content=False)


# -- through Tune, in this process -------------------------------------------------------------------------------------


def stored(trainable, folder, monkeypatch):
    """An actor's object without an actor or Ray, with storage in `folder`."""
    from ray.train._internal import storage as of_ray

    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    monkeypatch.setattr(of_ray, "_get_ray_train_session_dir", lambda: str(folder / "session"))
    storage = of_ray.StorageContext(storage_path=str(folder), experiment_dir_name="run", trial_dir_name="trial")
    storage.storage_filesystem.create_dir(storage.trial_fs_path)
    return trainable(config={"lr": 0.1}, storage=storage)


@pytest.fixture
def trial(tmp_path, monkeypatch):
    yield (one := stored(trainable_for(build_tiny), tmp_path, monkeypatch))
    one.stop()


def test_a_copy_of_tunes_is_flushed_and_the_files_it_was_made_from_are_not(trial, flushed):
    trial.train()
    folder = trial.save().checkpoint.path
    assert verify_checkpoint(folder) == 100
    assert {f"{folder}/{STATE_FILE}", folder, str(Path(folder).parent)} < set(flushed)
    assert [path for path in flushed if STATE_FILE in path] == [f"{folder}/{STATE_FILE}"]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda file: os.truncate(file, 10), Path.unlink])
def test_a_copy_of_tunes_that_went_wrong_is_not_told_of(trial, monkeypatch, damage):
    copy = trial._storage.persist_current_checkpoint

    def badly(checkpoint):
        copied = copy(checkpoint)
        damage(Path(copied.path, STATE_FILE))
        return copied

    monkeypatch.setattr(trial._storage, "persist_current_checkpoint", badly)
    with pytest.raises(CheckpointError, match=r"checkpoint .* (is cut short|cannot be read)"):
        trial.save()
    monkeypatch.undo()
    assert verify_checkpoint(trial.save().checkpoint.path) == 0


@pytest.mark.parametrize("given", ["the result of save", "a checkpoint", "a path"])
def test_a_pickle_planted_for_tune_is_not_executed(trial, tmp_path, given):
    trial.train()
    saved = trial.save()
    trial.train()
    sources = {"the result of save": saved, "a checkpoint": saved.checkpoint, "a path": saved.checkpoint.path}
    trial.restore(sources[given])
    assert trial.trainer.step == 100
    flag, planted = tmp_path / "executed", Path(saved.checkpoint.path, PICKLE_FILE)
    planted.write_bytes(pickle.dumps(Malice(flag)))
    with pytest.raises(CheckpointError, match=f"{saved.checkpoint.path} holds {PICKLE_FILE}, .*delete the file"):
        trial.restore(sources[given])
    with pytest.raises(CheckpointError, match=PICKLE_FILE):
        verify_checkpoint(saved.checkpoint.path)
    assert not flag.exists()


def test_tune_pickles_a_dict_which_is_refused_as_soon_as_it_is_saved(tmp_path, monkeypatch):
    class ReturnsADict(AutoLRSTrainable):
        def build(self, config):
            return build_tiny(config)

        def save_checkpoint(self, checkpoint_dir):
            return {"step": self.trainer.step}

    trial = stored(ReturnsADict, tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=f"{PICKLE_FILE}.*return None, not a dict"):
        trial.save()
    trial.stop()
    assert not writes_manifests(ReturnsADict)
    assert writes_manifests(trainable_for(build_tiny))
