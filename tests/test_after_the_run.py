"""What comes after a run or beside it: a replay by Tune itself, TensorBoard, MLflow and W&B. On Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.logger.mlflow import MLflowLoggerCallback

import autolrs_ray
from autolrs_ray import RunResult, trainable_for
from autolrs_ray.core.events import Event
from autolrs_ray.driver.replay import ReplayScheduler
from autolrs_ray.outcome.schedule import LearnedSchedule, Piece
from autolrs_ray.show.run_data import RunData
from autolrs_ray.show.tensorboard import save_tensorboard
from tests.doc_blocks import run_section
from tests.tasks import build_tiny
from tests.trainables import NotesUpdates, Quadratic, notes_updates

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[RunResult]:
    """A paper run of two stages, with MLflow's callback writing to a folder beside it."""
    storage = tmp_path_factory.mktemp("storage")
    mlflow = MLflowLoggerCallback(
        tracking_uri=(storage / "mlflow").as_uri(), experiment_name="autolrs", log_params_on_trial_end=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 wants to be told that a plain folder will do
        yield autolrs_ray.run(
            build_tiny, total_steps=40, policy="paper", stage_steps=20, num_lrs=2, max_stage_steps=20,
            storage_path=storage, name="run", progress=False, callbacks=[mlflow],
        )  # fmt: skip


def test_tensorboard_shows_one_main_curve_and_the_probes_by_stage(run: RunResult, tmp_path: Path) -> None:
    for _ in range(2):  # the second call replaces what the first has written
        target = save_tensorboard(run.folder, tmp_path)
    data = RunData.load(run.folder)
    names = {file.parent.relative_to(target).as_posix() for file in target.rglob("events.out.tfevents.*")}
    lrs = data.history.lrs
    stages = {event["arm"]: event["stage"] for event in data.history.named(Event.PROPOSAL)}
    assert names == {"main"} | {f"probes/stage_{stages[arm]:03d}/lr_{lr:.3g}_{arm}" for arm, lr in lrs.items()}
    points = [(step, value) for step, tag, value in events(target / "main") if tag == "val_loss"]
    rows = [(row["step"], row["val_loss"]) for row in data.main_rows()]
    assert [step for step, _ in points] == [step for step, _ in rows] == sorted({step for step, _ in rows})
    assert [value for _, value in points] == pytest.approx([value for _, value in rows])
    assert {tag for _, tag, _ in events(target / "main")} == {"val_loss", "val_accuracy", "train_loss", "lr"}


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of all scalars in the one event file in `folder`: records of length, CRC, data, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.glob("events.out.tfevents.*")
    content, at, found = file.read_bytes(), 0, []
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += size + 16
    return found


def test_mlflow_gets_every_trial_through_tunes_own_callback(run: RunResult) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((Path(run.folder).parent / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("autolrs")
    assert experiment is not None
    logged = client.search_runs([experiment.experiment_id])
    assert len(logged) == 1 + len(RunData.load(run.folder).history.lrs)  # the main trial, and every probe
    losses = [entry.data.metrics["val_loss"] for entry in logged if entry.data.metrics["step"] == 40]
    assert losses == [pytest.approx(run.loss)]
    (main,) = (entry for entry in logged if entry.info.run_name.startswith("main"))
    assert float(main.data.params["lr"]) == run.rows[-1]["lr"]


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[dict[str, Any]]:
    """What the page's blocks leave behind: an anchored run on one slot, with the callbacks of MLflow and W&B."""
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_ALLOW_FILE_STORE", "WANDB_MODE"):
            patch.setenv(name, "")  # the block sets them; undone with the patch
        yield {**run_section("MLflow, Weights & Biases", folder, patch), "folder": folder}


def test_the_documented_callback_gives_mlflow_one_run_per_trunk(documented: dict[str, Any]) -> None:
    from mlflow.tracking import MlflowClient

    client, result = MlflowClient(documented["uri"]), documented["result"]
    runs = client.search_runs([client.get_experiment_by_name("race").experiment_id])
    assert len(runs) == 3
    lrs = {run.info.run_name.partition("_")[0]: float(run.data.params["autolrs/lr"]) for run in runs}
    assert lrs == RunData.load(result.folder).history.lrs
    (winner,) = (run for run in runs if run.data.metrics["step"] == 100)
    assert min(winner.data.metrics["averaged_loss"], winner.data.metrics["val_loss"]) == result.loss


def test_the_documented_callback_gives_wandb_one_offline_run_per_trunk(documented: dict[str, Any]) -> None:
    folder, data = documented["folder"] / "wandb", RunData.load(documented["result"].folder)
    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        entries = wandb_entries(file)
        (start,) = (entry.run for entry in entries if entry.WhichOneof("record_type") == "run")
        assert (start.project, start.run_group) == ("race", "race")
        history = [
            {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in entry.history.item}
            for entry in entries if entry.WhichOneof("record_type") == "history"
        ]  # fmt: skip
        found[start.display_name.partition("_")[0]] = [(row["step"], row["averaged_loss"]) for row in history]
    reported = {arm: [(row["step"], row["averaged_loss"]) for row in data.reports[arm]] for arm in data.history.lrs}
    assert len(found) == 3
    assert found == reported
    assert found[data.arm][-1][0] == 100


def wandb_entries(file: Path) -> list[Any]:
    """The protocol buffers in a file of W&B: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, data, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # padding: no header fits
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        data += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole entry, or the last part of one
            found.append(Record.FromString(data))
            data = b""
    return found


def test_tensorboard_shows_the_winner_as_one_curve_and_the_other_trunks_under_it(documented: dict[str, Any]) -> None:
    result = documented["result"]
    target, data = save_tensorboard(result.folder, documented["folder"] / "tensorboard"), RunData.load(result.folder)
    others = {arm: lr for arm, lr in data.history.lrs.items() if arm != data.arm}
    names = {file.parent.relative_to(target).as_posix() for file in target.rglob("events.out.tfevents.*")}
    assert names == {"main"} | {f"trunks/lr_{lr:.3g}_{arm}" for arm, lr in others.items()}
    assert len(others) == 2
    curve = {tag: [(step, value) for step, name, value in events(target / "main") if name == tag]
             for tag in ("averaged_loss", "val_loss", "lr")}  # fmt: skip
    rows = data.main_rows()
    for tag, points in curve.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
        assert (steps[0], steps[-1], len(steps)) == (rows[0]["step"], 100, len(rows)), tag
        assert [value for _, value in points] == pytest.approx([row[tag] for row in rows]), tag
    assert min(curve[tag][-1][1] for tag in ("averaged_loss", "val_loss")) == pytest.approx(result.loss)
    assert [lr for _, lr in curve["lr"]] == pytest.approx([result.schedule.lr_at(step - 1) for step, _ in curve["lr"]])
    for arm, lr in others.items():
        points = [step for step, tag, _ in events(target / f"trunks/lr_{lr:.3g}_{arm}") if tag == "averaged_loss"]
        assert points == [row["step"] for row in data.rows(arm)]


# -- replay --------------------------------------------------------------------------------------------------------------

SCHEDULE = LearnedSchedule(60, (Piece(0, 20, 1.0, None, 5), Piece(20, 30, 0.5), Piece(30, 60, 2.0, "linear")))


@pytest.mark.parametrize("trainable", [NotesUpdates, notes_updates], ids=["class", "function"])
def test_every_step_is_trained_once_at_the_learning_rate_of_the_schedule(trainable: Any, tmp_path: Path) -> None:
    logs = [tmp_path / "first", tmp_path / "second"]
    analysis = tune.run(
        trainable, scheduler=ReplayScheduler(SCHEDULE), config={"log": tune.grid_search([str(log) for log in logs])},
        reuse_actors=True, storage_path=str(tmp_path), name="replay", verbose=0,
    )  # fmt: skip
    expected = [[step, SCHEDULE.lr_at(step)] for step in range(60)]
    assert [lr for step, lr in expected if step in (0, 4, 5, 19, 20, 29, 30, 45)] == pytest.approx(
        [0.2, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 0.5]
    )
    for log in logs:
        assert [json.loads(line) for line in log.read_text().splitlines()] == expected
    twin = Quadratic()
    for _, lr in expected:
        twin.train(lr, 1)
    assert [trial.last_result["val_loss"] for trial in analysis.trials] == [twin.loss] * 2


def test_a_paper_run_of_several_pieces_replays_to_its_own_loss(run: RunResult, tmp_path: Path) -> None:
    assert len(run.schedule.pieces) == 2
    analysis = tune.run(
        trainable_for(build_tiny), scheduler=ReplayScheduler(run.schedule), config={"seed": 0}, reuse_actors=True,
        storage_path=str(tmp_path), name="replay", verbose=0,
    )  # fmt: skip
    assert analysis.trials[0].last_result["step"] == 40
    assert analysis.trials[0].last_result["val_loss"] == run.loss
