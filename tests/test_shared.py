"""Checkpoints that lie in Ray's object store too: the same bits, let go in time, and storage when they are lost."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle, tune
from torch import nn

import autolrs_ray
from autolrs_ray import AutoLRSTrainable, RunResult, TrainingTask
from autolrs_ray.record.checkpoints import read_checkpoint
from autolrs_ray.training.trainer import Trainer
from autolrs_ray.trial import shared as shared_module
from autolrs_ray.trial.shared import PackedTensor, SharedCheckpoint, SharedState, pack, state_bytes, unpack

WIDTH = 512
STATE_BYTES = 2 * 4 * (10 * WIDTH + WIDTH * WIDTH + WIDTH * 2 + 2 * WIDTH + 2)  # weights and their momentum: 2.2 MB
PAPER: dict[str, Any] = {"stage_steps": 20, "max_stage_steps": 20, "probe_steps": 4, "num_lrs": 3}


def build_wide(config: dict[str, Any], momentum: float = 0.9) -> TrainingTask:
    """Large enough to be worth the object store, with dropout so that random numbers matter."""
    x = torch.randn(160, 10, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(
        nn.Linear(10, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, 2)
    )
    return TrainingTask(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum), nn.functional.cross_entropy,
        train_data=(x[:128], y[:128]), val_data=(x[128:], y[128:]), batch_size=32,
    )  # fmt: skip


class Watched(Trainer):
    """Notes in a file where each of its states came from."""

    log: Path

    def load(self, folder: Any) -> None:
        self._note("storage")
        super().load(folder)

    def copy_state_dict(self, state: dict[str, Any]) -> None:
        self._note("store")
        super().copy_state_dict(state)

    def _note(self, source: str) -> None:
        with self.log.open("a") as file:
            file.write(source + "\n")


class Wide(AutoLRSTrainable):
    def build(self, config: dict[str, Any]) -> TrainingTask:
        return build_wide(config)

    def _new_trainer(self, seed: int, averaging: bool, config: dict[str, Any]) -> Trainer:
        trainer = Watched(lambda: self.build(config), seed, averaging)
        trainer.log = Path(config["log"])
        return trainer


class WideFromStorage(Wide):
    object_store = False


def search(folder: Path, name: str, trainable: type = Wide, **options: Any) -> tuple[RunResult, Counter[str]]:
    """A run of three stages, and how often trials started from where."""
    log = folder / f"{name}.log"
    settings: dict[str, Any] = {"storage_path": folder, "name": name, "config": {"log": str(log)}, "progress": False}
    settings.update(policy="paper", lr_interval=(1e-2, 1.0), slots=2, **PAPER)
    result = autolrs_ray.run(trainable, **{"total_steps": 60, **settings, **options})
    return result, Counter(log.read_text().split())


def same_course(one: RunResult, two: RunResult) -> bool:
    weights = [read_checkpoint(result.checkpoint)["model"] for result in (one, two)]
    rows = [[(row["end"], row["lr"], row["loss"]) for row in result.rows] for result in (one, two)]
    return rows[0] == rows[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# -- without Ray -------------------------------------------------------------------------------------------------------


def test_every_tensor_comes_back_bit_for_bit_in_its_own_layout() -> None:
    tensors = [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(4, 6).t(), torch.tensor(3),
        torch.randn(5).bfloat16(), torch.tensor([True, False]), torch.empty(0, 3), torch.tensor([float("nan"), -0.0]),
    ]  # fmt: skip
    back = unpack(pack({"list": tensors, "plain": (1, None, "x")}))
    assert back["plain"] == (1, None, "x")
    for before, after in zip(tensors, back["list"], strict=True):
        assert (before.dtype, before.shape, before.stride()) == (after.dtype, after.shape, after.stride())
        assert PackedTensor.of(before).data.tobytes() == PackedTensor.of(after).data.tobytes()
    views = [torch.randn(4, 6)[:, 1:3], torch.randn(3, 1).expand(3, 4)]
    assert all(torch.equal(view, unpack(pack(view))) for view in views)
    assert state_bytes(tensors[:2]) == 4 * (120 + 24)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_copied_state_is_the_loaded_one_and_keeps_nothing_it_was_given(momentum: float) -> None:
    one, two, three = (Trainer(lambda: build_wide({}, momentum), averaging=True) for _ in range(3))
    one.train(10, lambda step: 0.1)
    three.train(5, lambda step: 0.5)  # has momentum of its own, whose memory is used
    given = unpack(pack(one.state_dict()))
    memory = {value.data_ptr() for value in _tensors(three.task.optimizer.state_dict())}
    two.load_state_dict(one.state_dict() | {"optimizer": unpack(pack(one.task.optimizer.state_dict()))})
    three.copy_state_dict(given)
    assert memory == {value.data_ptr() for value in _tensors(three.task.optimizer.state_dict())}
    assert not {v.data_ptr() for v in _tensors(given)} & {v.data_ptr() for v in _tensors(three.state_dict())}
    losses = [trainer.train(20, lambda step: 0.1) for trainer in (two, three)]
    assert losses[0] == losses[1]
    pairs = zip(_tensors(two.state_dict()), _tensors(three.state_dict()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_model_that_keeps_what_it_is_given_gets_a_copy() -> None:
    class Keeps(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            self.weight.data, self.bias.data = state[prefix + "weight"], state[prefix + "bias"]

    def build() -> TrainingTask:
        model, x = Keeps(4, 2), torch.randn(8, 4)
        y = torch.zeros(8, dtype=torch.long)
        return TrainingTask(model, torch.optim.Adam(model.parameters(), lr=0.1), nn.functional.cross_entropy,
                            (x, y), (x, y), batch_size=4)  # fmt: skip

    trainer = Trainer(build)
    trainer.train(3, lambda step: 0.1)
    given = unpack(pack(trainer.state_dict()))
    other = Trainer(build)
    other.copy_state_dict(given)
    assert not {v.data_ptr() for v in _tensors(given)} & {v.data_ptr() for v in _tensors(other.state_dict())}
    assert all(torch.equal(a, b) for a, b in zip(_tensors(given), _tensors(other.state_dict()), strict=True))


def test_a_class_with_files_of_its_own_is_left_to_storage() -> None:
    class WithMore(Wide):
        def save_checkpoint(self, checkpoint_dir: str) -> None:
            super().save_checkpoint(checkpoint_dir)

    assert Wide.object_store
    assert not WithMore.object_store


def _tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state] if state.numel() else []
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


# -- with Ray ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    def test_trials_start_from_the_object_store_and_take_the_same_course(self, tmp_path: Path) -> None:
        result, sources = search(tmp_path, "store")
        reference, from_storage = search(tmp_path, "storage", WideFromStorage)
        assert same_course(result, reference)
        assert set(sources) == {"store"}
        assert set(from_storage) == {"storage"}
        assert sources["store"] == from_storage["storage"] == 2 * 3 + 3  # two stages of probes, and main in all three

    def test_states_that_are_lost_are_read_from_storage(self, tmp_path: Path, monkeypatch: Any) -> None:
        written, lost, steps = SharedState.written, _lost_object(), list[int]()

        def lose(self: SharedState, path: str, step: int) -> None:
            written(self, path, step)
            if self.reference is not None:  # or nobody waits for it any more
                self.reference = lost
                steps.append(step)

        monkeypatch.setattr(SharedState, "written", lose)
        result, sources = search(tmp_path, "lost")
        assert sources == {"storage": 9}
        assert steps
        monkeypatch.undo()
        assert same_course(result, search(tmp_path, "kept")[0])

    def test_a_state_too_large_for_the_store_is_not_put_there(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(shared_module, "room", lambda: STATE_BYTES - 1)
        _, sources = search(tmp_path, "large")
        assert sources == {"storage": 9}

    def test_there_is_room_for_half_a_store(self) -> None:
        capacity = ray.cluster_resources()["object_store_memory"]
        assert _until(lambda: shared_module.room() == int(capacity / 2))
        reference = ray.put(torch.zeros(5_000_000).numpy())
        assert _until(lambda: shared_module.room() <= (capacity - 20_000_000) / 2)
        del reference

    def test_at_most_two_states_lie_there_and_none_after_the_run(self, tmp_path: Path) -> None:
        capacity, used = ray.cluster_resources()["object_store_memory"], []

        class Watch(tune.Callback):  # type: ignore[misc]
            def on_trial_result(self, *arguments: Any, **named: Any) -> None:
                used.append(capacity - ray.available_resources()["object_store_memory"])

        assert _until(lambda: ray.available_resources()["object_store_memory"] == capacity)
        _, sources = search(tmp_path, "many", total_steps=300, callbacks=[Watch()])
        assert sources["store"] == 14 * 3 + 15
        assert 0 < max(used) < 3.5 * STATE_BYTES  # the node tells of its memory with a delay
        assert _until(lambda: ray.available_resources()["object_store_memory"] == capacity)

    def test_a_reference_travels_with_ray_and_with_nothing_else(self, tmp_path: Path) -> None:
        local = tune.Checkpoint.from_directory(tmp_path).filesystem
        state = SharedState(ray.put(pack({"step": 7, "w": torch.ones(3)})), str(tmp_path), 7)
        checkpoint = SharedCheckpoint(str(tmp_path), local, state)
        sent = ray.get(ray.put(checkpoint))
        assert sent.take()["w"].tolist() == [1.0, 1.0, 1.0]
        written = cloudpickle.loads(cloudpickle.dumps(checkpoint))
        assert type(written) is tune.Checkpoint
        assert written.path == str(tmp_path)
        state.step = 8
        assert ray.get(ray.put(checkpoint)).take() is None  # a state of another step
        state.clear()
        assert type(ray.get(ray.put(checkpoint))) is tune.Checkpoint


def _lost_object() -> ray.ObjectRef:
    """A reference to an object that has died with its owner."""

    class Owner:
        def put(self) -> list[ray.ObjectRef]:
            return [ray.put(torch.zeros(300_000).numpy())]

    owner = ray.remote(num_cpus=0)(Owner).remote()
    [reference] = ray.get(owner.put.remote())
    ray.kill(owner)
    return reference


def _until(true: Any, timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(true())
