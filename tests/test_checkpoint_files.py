"""Checkpoints of a Trainer: plain values only, and whatever is damaged is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch

from autolrs_ray.record.checkpoints import (
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointError,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from autolrs_ray.training.trainer import Trainer
from tests.crashes import Malice, dies_after_renames
from tests.trainings import adamw, assert_same, falling, task


@pytest.fixture
def checkpoint(tmp_path):
    trainer = Trainer(lambda: task(adamw), 0, averaging=True)
    trainer.train(7, falling)
    trainer.save(tmp_path / "c")
    return tmp_path / "c"


def test_checkpoints_hold_tensors_and_plain_values_only(checkpoint):
    state = torch.load(checkpoint / STATE_FILE, weights_only=True)
    assert state["step"] == 7
    assert verify_checkpoint(checkpoint) == 7
    assert sorted(os.listdir(checkpoint)) == [MANIFEST_FILE, STATE_FILE]  # no temporary files


def refused(folder):
    with pytest.raises(CheckpointError, match=str(folder)):
        verify_checkpoint(folder)
    trainer = Trainer(lambda: task(adamw), 0, averaging=True)
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(CheckpointError, match=str(folder)):
        trainer.load(folder)
    assert_same(trainer.state_dict(), before)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_checkpoint_is_refused(checkpoint, keep):
    content = (checkpoint / STATE_FILE).read_bytes()
    (checkpoint / STATE_FILE).write_bytes(content[:keep])
    refused(checkpoint)


@pytest.mark.parametrize("position", [0, 0.25, 0.5, 0.99])
def test_a_flipped_bit_is_refused(checkpoint, position):
    content = bytearray((checkpoint / STATE_FILE).read_bytes())
    content[int(position * len(content))] ^= 1
    (checkpoint / STATE_FILE).write_bytes(content)
    refused(checkpoint)


@pytest.mark.parametrize("name", [STATE_FILE, MANIFEST_FILE])
def test_a_missing_file_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    refused(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"size": 1}', '{"size": 1, "sha256": 2, "step": "x"}', "\xff"]
)
def test_a_damaged_manifest_is_refused(checkpoint, text):
    (checkpoint / MANIFEST_FILE).write_bytes(text.encode("latin-1"))
    refused(checkpoint)


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere")


@pytest.mark.parametrize("through_torch", [True, False])
def test_a_malicious_pickle_with_a_matching_manifest_is_not_executed(checkpoint, tmp_path, through_torch):
    flag, target = tmp_path / "executed", checkpoint / STATE_FILE
    if through_torch:
        torch.save({"step": 7, "model": Malice(flag)}, target)
    else:
        target.write_bytes(pickle.dumps(Malice(flag)))
    from autolrs_ray.record.checkpoints import _sha256

    manifest = {"size": target.stat().st_size, "sha256": _sha256(target), "step": 7}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert verify_checkpoint(checkpoint) == 7
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        read_checkpoint(checkpoint)
    assert not flag.exists()


def test_a_checkpoint_cut_off_while_it_is_written_over_another_leaves_that_or_an_error(checkpoint):
    """The process dies between any two of its steps: what is read afterwards is the old state, the new one, or an error."""
    old = read_checkpoint(checkpoint)
    for survives in range(2):
        with dies_after_renames(survives):
            write_checkpoint({**old, "step": 8}, checkpoint)
        if survives == 0:
            assert read_checkpoint(checkpoint)["step"] == 7
        else:
            with pytest.raises(CheckpointError):
                read_checkpoint(checkpoint)
    write_checkpoint({**old, "step": 8}, checkpoint)
    assert read_checkpoint(checkpoint)["step"] == 8
