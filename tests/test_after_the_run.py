"""A run in TensorBoard and in MLflow. On Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.tune.logger.mlflow import MLflowLoggerCallback

import autolrs_ray
from autolrs_ray import RunResult
from autolrs_ray.plot_data import RunData
from autolrs_ray.tensorboard import save_tensorboard
from tests.tasks import build_tiny

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
    lrs = data.lrs()
    stages = {event["arm"]: event["stage"] for event in data.events("proposal")}
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
    assert len(logged) == 1 + len(RunData.load(run.folder).lrs())  # the main trial, and every probe
    losses = [entry.data.metrics["val_loss"] for entry in logged if entry.data.metrics["step"] == 40]
    assert losses == [pytest.approx(run.loss)]
