"""Run folders on a store: what is written there, who may write, and going on elsewhere when the driver's machine is lost."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import autolrs_ray
from autolrs_ray import LearnedSchedule, RunResult
from autolrs_ray.cli import app
from autolrs_ray.core.policies import make_policy
from autolrs_ray.record import mirror
from autolrs_ray.record import stores as storage
from autolrs_ray.record.checkpoints import CheckpointError, write_checkpoint
from autolrs_ray.record.journal import JOURNAL_FILE, read_journal
from autolrs_ray.record.mirror import Mirror, RunTakenError
from autolrs_ray.record.record import STATE_FILE, Record
from autolrs_ray.record.stores import open_store
from autolrs_ray.show.plots import save_plots
from autolrs_ray.training.local import run_local
from autolrs_ray.training.trainer import Trainer
from tests.faults.harness import Driver
from tests.tasks import build_tiny

pytestmark = pytest.mark.usefixtures("bucket")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_S", 0.1), ("LEASE_S", 1.0), ("SETTLE_S", 0.1)):
        monkeypatch.setattr(mirror, name, seconds)


def state(step: int) -> dict[str, Any]:
    return {"step": step}


def write(record: Record, step: int) -> None:
    record.append([{"event": "stage", "step": step}])
    record.write_state({}, state(step))


def begun(folder: Path, uri: str, written: int) -> Record:
    """The record of a new run at `uri`, after so many commits, each of them there."""
    record = Record(folder, Mirror.at(uri))
    assert not record.exists()
    record.begin({"event": "start"})
    for step in range(1, written + 1):
        write(record, step)
        assert steps(uri) == list(range(1, step + 1))
    return record


def silence(record: Record) -> None:
    """No beat any more, not even one that was under way."""
    record._mirror._stop.set()
    record._mirror._thread.join()


def steps(folder: str | Path) -> list[int]:
    return [event["step"] for event in read_journal(folder) if event["event"] == "stage"]


def objects(uri: str) -> set[str]:
    from pyarrow.fs import FileSelector

    filesystem, path = open_store(uri)
    return {info.base_name for info in filesystem.get_file_info(FileSelector(path)) if info.is_file}


# -- the record ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_every_state_is_on_the_store_and_goes_on_elsewhere(bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/record"
    record = begun(tmp_path / "here", uri, written=2)
    record.close()
    assert not (tmp_path / "here").exists()
    assert objects(uri) == {JOURNAL_FILE, STATE_FILE, "autolrs_state.previous.json"}  # and no lock
    there = Record(tmp_path / "there", Mirror.at(uri))
    assert there.load_state()["state"] == state(2)
    write(there, 3)
    there.close()
    assert steps(uri) == [1, 2, 3]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("written", [0, 1, 2])  # files of the commit that still arrive
def test_a_copy_cut_short_leaves_the_last_state(
    written: int, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{bucket}/cut{written}"
    record = begun(tmp_path / "here", uri, written=2)
    real, left = mirror.write_to, [written]

    def fails(filesystem: Any, path: str, content: bytes) -> None:
        if not path.endswith("lock"):
            if not left[0]:
                raise OSError("the store has gone away")
            left[0] -= 1
        real(filesystem, path, content)

    monkeypatch.setattr(mirror, "write_to", fails)
    with pytest.raises(OSError, match="gone away"):
        write(record, 3)
    monkeypatch.undo()
    monkeypatch.setattr(mirror, "LEASE_S", 0.1)
    silence(record)  # the driver dies
    there = Record(tmp_path / "there", Mirror.at(uri))
    assert there.load_state()["state"] == state(2)
    write(there, 4)
    there.close()
    assert steps(uri) == [1, 2, 4]


@pytest.mark.usefixtures("impatient")
def test_a_second_driver_is_refused_while_the_first_lives(bucket: str, tmp_path: Path) -> None:
    record = Record(tmp_path / "one", Mirror.at(f"{bucket}/lock"))
    with pytest.raises(RunTakenError, match="another process is driving the run in s3://runs/lock"):
        Record(tmp_path / "two", Mirror.at(f"{bucket}/lock"))
    record.close()
    Record(tmp_path / "two", Mirror.at(f"{bucket}/lock")).close()


@pytest.mark.usefixtures("impatient")
def test_a_driver_that_was_given_up_for_dead_writes_no_more(bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/zombie"
    first = begun(tmp_path / "one", uri, written=1)
    silence(first)  # it hangs
    began = time.monotonic()
    second = Record(tmp_path / "two", Mirror.at(uri))
    assert 1.0 <= time.monotonic() - began < 5.0
    second.load_state()
    with pytest.raises(RunTakenError, match="another process"):
        write(first, 2)
    first.close()
    write(second, 3)
    second.close()
    assert steps(uri) == [1, 3]


def test_uris_are_joined_before_their_query() -> None:
    assert storage.join("s3://b/x?region=eu-west-1", "run", "plots") == "s3://b/x/run/plots?region=eu-west-1"
    assert storage.join("/a/b/", "c") == "/a/b/c"
    with pytest.raises(ValueError, match="cannot open nowhere://x"):
        open_store("nowhere://x")


def test_a_file_uri_is_the_path_it_was_made_of(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "my runs", tmp_path / "100% ü#1?", tmp_path / os.fsdecode(b"\xff")):
        assert storage.normal(path.as_uri()) == str(path)
    assert [storage.normal(f"{begin}/a/b") for begin in ("file:", "file://localhost", "FILE://")] == ["/a/b"] * 3


@pytest.mark.parametrize("uri", ["file://runs", "file://runs/a", "file:a", "file:///a#b", "file:///a?b=c", "file://"])
def test_a_file_uri_that_names_no_local_folder_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(repr(uri))} names no folder of this machine: give the path"):
        storage.normal(uri)
    with pytest.raises(ValueError, match="a path must name a folder, got 'file:///a%00': give one without NUL"):
        storage.normal("file:///a%00")


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_noticed(bucket: str, tmp_path: Path) -> None:
    write_checkpoint({"step": 3, "weights": torch.ones(5)}, tmp_path)
    uri = f"{bucket}/damage/trial/checkpoint_000000"
    storage.upload(tmp_path, uri)
    store, path = Mirror.at(f"{bucket}/damage"), open_store(uri)[1]
    store.verify(path)
    content = storage.read_bytes(f"{uri}/state.pt")
    storage.write_bytes(f"{uri}/state.pt", content[:-1] + b"?")
    with pytest.raises(CheckpointError, match="does not match its manifest"):
        store.verify(path)
    open_store(uri)[0].delete_dir(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.verify(path)
    storage.write_bytes(f"{uri}/of_another_kind", b"")
    store.verify(path)


# -- whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_a_store_is_the_run_in_a_plain_loop(bucket: str) -> None:
    options = dict(lr_interval=(1e-2, 1.0), stage_steps=40, max_stage_steps=40, probe_steps=8, num_lrs=3)
    result = autolrs_ray.run(
        build_tiny, 80, policy="paper", storage_path=bucket, name="run", slots=2, progress=False, **options
    )
    trainer = Trainer(lambda: build_tiny({}), 0)
    run_local(make_policy("paper", 80, seed=0, concurrency=2, **options), trainer)
    assert result.done
    assert result.checkpoint.startswith(f"{bucket}/run/main_")
    weights = trainer.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in result.model_state().items())
    assert LearnedSchedule.load(f"{bucket}/run") == result.schedule

    files = save_plots(f"{bucket}/run")
    assert f"{bucket}/run/plots/loss.png" in files
    assert {"loss.png", "learning_rate.svg"} <= objects(f"{bucket}/run/plots")
    shown = CliRunner().invoke(app, ["show", f"{bucket}/run"])
    assert "paper policy, finished" in shown.output, shown.output
    target = f"{bucket}/run/schedule.json"
    exported = CliRunner().invoke(app, ["export", f"{bucket}/run", "--output", target])
    assert exported.exit_code == 0, exported.output
    assert json.loads(storage.read_bytes(target)) == json.loads(result.schedule.to_json())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["paper", "anchored"])
def test_a_lost_machine_changes_nothing(policy: str, bucket: str, tmp_path: Path) -> None:
    """The driver and its Ray are killed, nothing local is kept, and another machine goes on."""
    with Driver(tmp_path / "undisturbed", ("--policy", policy)) as driver:
        expected = driver.outcome()
    uri = f"{bucket}/{policy}"
    command = ("--policy", policy, "--uri", uri)
    with Driver(tmp_path / "first", command) as driver:
        assert driver.wait_until(lambda: journalled(f"{uri}/run", "commit"), every_s=0.2)
        driver.kill()
    with Driver(tmp_path / "second", command) as driver:
        driver.ends_as(expected)
    assert journalled(f"{uri}/run", "resume")


def journalled(uri: str, event: str) -> bool:
    try:
        return any(line["event"] == event for line in read_journal(uri))
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://AKIA:hushhush@b/x?region=eu-west-1", "s3://***@b/x?region=eu-west-1"),
        ("s3://b/x?access_key=hushhush&region=eu-west-1", "s3://b/x?access_key=***&region=eu-west-1"),
        ("s3://b/x?Secret_Key=hushhush", "s3://b/x?Secret_Key=***"),
        ("abfs://:hushhush@account.blob.core.windows.net/c/x", "abfs://***@account.blob.core.windows.net/c/x"),
        ("abfs://c@account/x?sig=hushhush", "abfs://***@account/x?sig=***"),
        ("gs://b/x?access_token=hushhush", "gs://b/x?access_token=***"),
    ],
)
def test_secrets_in_a_uri_are_refused_and_not_printed(uri: str, shown: str) -> None:
    for use in (open_store, Mirror.at, RunResult.load, lambda uri: autolrs_ray.run(build_tiny, 10, storage_path=uri)):
        with pytest.raises(ValueError, match="holds a secret: give it in the environment") as raised:
            use(uri)
        assert str(raised.value).startswith(shown.split("/x")[0])
        assert "hushhush" not in "".join(traceback.format_exception(raised.value, limit=0))
    with pytest.raises(ValueError, match=re.escape(shown)):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://b/x?region=eu-west-1&scheme=https", "gs://anonymous@b/x", "abfs://c@account/x"])
def test_uris_without_secrets_are_not_refused(uri: str) -> None:
    storage.refuse_secrets(uri)
