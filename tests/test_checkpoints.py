"""Checkpoints written in the background: a snapshot, in order, announced only when whole."""

from __future__ import annotations

import threading

import pytest
import torch

from autolrs_ray import checkpoints
from autolrs_ray.checkpoints import BackgroundWriter, read_checkpoint, snapshot, verify_checkpoint


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
