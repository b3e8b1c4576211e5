"""Several processes train one trial: gloo on the CPU, two workers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn
from torch.distributed import TCPStore

import autolrs_ray
from autolrs_ray import AutoLRSTrainable, RunResult, TrainingTask, trainable_for
from autolrs_ray.training.trainer import Trainer
from autolrs_ray.trial.distributed import WorkerGroup, _Worker, rendezvous, worker_resources
from tests.tasks import build_tiny

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Scaled(nn.Module):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output * self.scale, target)


def uneven_task() -> TrainingTask:
    """15 rows for two workers, noise on every row, batch norm over the whole batch, and a loss that learns."""
    x = torch.randn(130, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > x[:, 1]).long()
    model, loss = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2)), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
    return TrainingTask(
        model, optimizer, loss, (x[:99], y[:99]), (x[99:], y[99:]), batch_size=15, sync_batch_norm=True,
        augment=lambda inputs, generator: inputs + torch.randn(inputs.shape, generator=generator),
    )  # fmt: skip


def plain_task() -> TrainingTask:
    """Without batch norm and dropout, whose outcome depends on how a batch is shared."""
    x = torch.randn(130, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > x[:, 1]).long()
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return TrainingTask(
        model,
        optimizer,
        nn.functional.cross_entropy,
        (x[:99], y[:99]),
        (x[99:], y[99:]),
        batch_size=16,
        eval_batch_size=10,
    )


class Drifting(torch.optim.SGD):
    """Every process has random numbers of its own."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            noise = torch.Generator()
            noise.seed()
            for group in self.param_groups:
                group["params"][0].add_(torch.randn(group["params"][0].shape, generator=noise))


def drifting_task() -> TrainingTask:
    task = plain_task()
    task.optimizer = Drifting(task.model.parameters(), lr=0.1)
    return task


def one_row_task() -> TrainingTask:
    task = plain_task()
    task.batch_size = 1
    return task


@ray.remote(num_cpus=0)
class Trial:
    """Stands for the actor of a Tune trial."""

    def call(self, function: Callable[[], Any]) -> Any:
        return function()


@pytest.fixture
def in_a_trial() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    group = placement_group([{"CPU": 1}] * 2)
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    trial = Trial.options(scheduling_strategy=strategy).remote()
    yield lambda function: ray.get(trial.call.remote(function))
    ray.kill(trial)
    remove_placement_group(group)


def test_two_workers_take_the_steps_of_one(in_a_trial: Callable[[Callable[[], Any]], Any]) -> None:
    def lr_at(step: int) -> float:
        return 0.1 / (1 + step)

    def together() -> Any:
        group = WorkerGroup(plain_task, seed=3, averaging=True, workers=2)
        loss = group.train(9, lr_at)
        found = loss, group.evaluate(), group.evaluate(averaged=True), group.state_dict()
        group.reset()
        group.load_state_dict(found[-1])
        group.train(12, lr_at)
        return *found, group.step, group.steps_per_epoch, group.state_dict()

    alone = Trainer(plain_task, seed=3, averaging=True)
    loss, values, averaged, state, step, steps_per_epoch, later = in_a_trial(together)
    assert loss == pytest.approx(alone.train(9, lr_at), rel=1e-5)
    assert values == pytest.approx(alone.evaluate(), rel=1e-5)
    assert averaged == pytest.approx(alone.evaluate(averaged=True), rel=1e-5)
    alone_best = alone.best_average
    assert (step, steps_per_epoch) == (12, alone.steps_per_epoch)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(state["model"][name], value)
    alone.train(12, lr_at)
    assert state["averages"]["best"] == alone_best
    for ours, theirs in zip(later["averages"]["weights"], alone.state_dict()["averages"]["weights"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_batch_that_cannot_be_shared_evenly_counts_row_by_row(
    in_a_trial: Callable[[Callable[[], Any]], Any],
) -> None:
    """As in one process, but for the order of sums: 6 steps, some hundred roundings each."""

    def together() -> Any:
        group = WorkerGroup(uneven_task, seed=3, averaging=True, workers=2)
        return group.train(6, lambda step: 0.1), group.evaluate(averaged=True), group.state_dict()

    alone = Trainer(uneven_task, seed=3, averaging=True)
    loss, averaged, state = in_a_trial(together)
    close = 6 * 100 * torch.finfo(torch.float32).eps
    assert loss == pytest.approx(alone.train(6, lambda step: 0.1), rel=close)
    assert averaged == pytest.approx(alone.evaluate(averaged=True), rel=close)
    own = alone.state_dict()
    for ours, theirs in ((state["model"], own["model"]), (state["others"]["loss"], own["others"]["loss"])):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=close, atol=close)
    for ours, theirs in zip(state["averages"]["weights"], own["averages"]["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


@pytest.mark.slow
def test_ranks_that_drift_apart_are_noticed(in_a_trial: Callable[[Callable[[], Any]], Any]) -> None:
    def together() -> None:
        group = WorkerGroup(drifting_task, seed=0, averaging=False, workers=2)
        group.train(1, lambda step: 0.1)
        group.state_dict()

    with pytest.raises(RuntimeError, match="weights of the 2 workers differ at step 1"):
        in_a_trial(together)


@pytest.mark.slow
def test_batches_and_bundles_that_do_not_fit_are_told(in_a_trial: Callable[[Callable[[], Any]], Any]) -> None:
    with pytest.raises(ValueError, match="batch_size=1 is shared by 2 workers: every one needs a row"):
        in_a_trial(lambda: WorkerGroup(one_row_task, seed=0, averaging=False, workers=2) and None)
    with pytest.raises(RuntimeError, match="3 workers per trial need a bundle each, but the trial's resources have 2"):
        in_a_trial(lambda: WorkerGroup(plain_task, seed=0, averaging=False, workers=3) and None)


def test_options_that_do_not_fit_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers=2 needs a function build"):
        autolrs_ray.run(AutoLRSTrainable, 10, workers=2, storage_path=tmp_path)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        trainable_for(build_tiny, workers=0)
    assert worker_resources(2, {"cpu": 2, "gpu": 0.5}).required_resources == {"CPU": 4, "GPU": 1}


class Noted(torch.optim.SGD):
    """Writes down every step's learning rate and a hash of the weights after it, one file per process. Rank 1 dies once at
    `dies_at` steps, if not 0."""

    def __init__(self, parameters: Any, folder: str, dies_at: int) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.left, self.flag = dies_at, Path(folder) / "died"
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.file = f"{folder}/{ray.get_runtime_context().get_placement_group_id()}.{self.rank}"

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.left -= 1
        if self.left == 0 and self.rank == 1 and not self.flag.exists():
            self.flag.touch()
            os._exit(1)
        weights = b"".join(weight.detach().numpy().tobytes() for weight in self.param_groups[0]["params"])
        with open(self.file, "a") as file:
            file.write(f"{self.param_groups[0]['lr']!r} {hashlib.sha256(weights).hexdigest()}\n")


def build_noted(config: dict[str, Any]) -> TrainingTask:
    task = build_tiny(config)
    task.optimizer = Noted(task.model.parameters(), config["trace"], config["dies_at"])
    return task


def run_noted(folder: Path, dies_at: int = 0) -> RunResult:
    (folder / "trace").mkdir(parents=True)
    options = dict(
        policy="paper", stage_steps=40, max_stage_steps=40, probe_steps=8, num_lrs=3, lr_interval=(1e-2, 1.0)
    )
    return autolrs_ray.run(
        trainable_for(build_noted, workers=2),
        80,
        resources=worker_resources(2),
        config={"trace": str(folder / "trace"), "dies_at": dies_at},
        storage_path=folder,
        name="run",
        progress=False,
        **options,
    )


def traces(folder: Path) -> dict[str, str]:
    """What every worker of every trial has noted; the step that is trained before the first trial is no trial's."""
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith("None.")}


@pytest.mark.slow
def test_a_run_of_trials_with_two_workers_each(tmp_path: Path) -> None:
    result = run_noted(tmp_path / "calm")
    assert result.done
    assert result.timing.max_concurrent == 2  # 4 CPUs, two for each trial
    noted = traces(tmp_path / "calm" / "trace")
    first = {name: text for name, text in noted.items() if name.endswith(".0")}
    assert len(noted) == 2 * len(first) == 4
    assert all(noted[f"{name[:-2]}.1"] == text for name, text in first.items())  # both ranks, the same at every step
    assert sum(text.count("\n") for text in first.values()) == result.main_steps + result.search_steps
    assert {f"{row['lr']!r}" for row in result.rows} <= set("".join(first.values()).split())

    disturbed = run_noted(tmp_path / "disturbed", dies_at=20)  # a worker dies, its trial starts again
    assert (tmp_path / "disturbed" / "trace" / "died").exists()
    assert [(row["end"], row["lr"]) for row in disturbed.rows] == [(row["end"], row["lr"]) for row in result.rows]
    weights = result.model_state()
    assert set(weights) == set(build_tiny({}).model.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in disturbed.model_state().items())


def build_plain_noted(config: dict[str, Any]) -> TrainingTask:
    task = plain_task()
    task.optimizer = Noted(task.model.parameters(), config["trace"], dies_at=0)
    return task


@pytest.mark.slow
def test_a_race_with_two_workers_a_trial_is_that_with_one(tmp_path: Path) -> None:
    """But for the order in which gradients and losses are summed: the same arms drop out and win, LRs to 1e-3."""

    def race(workers: int) -> tuple[RunResult, dict[str, str], dict[str, str]]:
        trace = tmp_path / str(workers) / "trace"
        trace.mkdir(parents=True)
        result = autolrs_ray.run(
            build_plain_noted,
            120,
            num_lrs=4,
            slots=2,
            workers=workers,
            config={"trace": str(trace)},
            storage_path=tmp_path / str(workers),
            name="run",
            progress=False,
        )
        fates = {
            event["arm"]: event.get("status", "won") for event in result.events if event["event"] in ("trunk", "done")
        }
        return result, fates, traces(trace)

    (one, fates, _), (two, fates_of_two, noted) = race(1), race(2)
    assert one.done
    assert two.done
    assert fates_of_two == fates
    assert len(fates) == 4
    assert "dropped" in fates.values()
    assert [row["end"] for row in two.rows] == [row["end"] for row in one.rows]
    assert [row["lr"] for row in two.rows] == pytest.approx([row["lr"] for row in one.rows], rel=1e-3)
    assert two.loss == pytest.approx(one.loss, rel=1e-3)
    for name, value in one.model_state().items():
        torch.testing.assert_close(two.model_state()[name], value, rtol=1e-2, atol=1e-3)
    first = {name[:-2]: text for name, text in noted.items() if name.endswith(".0")}
    second = {name[:-2]: text for name, text in noted.items() if name.endswith(".1")}
    assert second == first  # LRs and weights at every step
    assert len("".join(first.values()).splitlines()) >= 120


def listening() -> set[tuple[str, int]]:
    return {tuple(c.laddr) for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def test_workers_on_one_node_listen_on_the_loopback_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = listening()
    store = rendezvous("127.0.0.1", 1)
    assert listening() - before == {("127.0.0.1", store.port)}
    store.set("word", "given")
    assert TCPStore("127.0.0.1", store.port, 1, is_master=False).get("word") == b"given"

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # as it is now, after the test
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    worker = _Worker(0, 1)
    worker.join(worker.serve(near=True), "gloo")
    assert {host for host, _ in listening() - before} == {"127.0.0.1"}
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")
    torch.distributed.destroy_process_group()
