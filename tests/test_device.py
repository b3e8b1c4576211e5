"""On which device trials train. No GPU is here: torch is told that there is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
import torch

import autolrs_ray
from autolrs_ray.trial.device import own_device
from tests.tasks import build_tiny


@pytest.mark.parametrize(
    ("ray_runs", "given", "expected"),
    [(True, ["0"], "cuda"), (True, [], "cpu"), (False, [], "cuda")],
)
def test_a_trial_trains_on_a_gpu_if_ray_has_given_it_one(
    ray_runs: bool, given: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: ray_runs)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given}))
    assert own_device() == "cpu"  # where torch has no CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device() == expected


def test_the_tasks_own_device_comes_before_that_of_the_trial() -> None:
    assert autolrs_ray.Trainer(lambda: build_tiny({}), device="meta").device.type == "meta"

    def build() -> autolrs_ray.TrainingTask:
        task = build_tiny({})
        task.device = "cpu"
        return task

    assert autolrs_ray.Trainer(build, device="meta").device.type == "cpu"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_process_without_a_gpu_may_ask() -> None:
    assert ray.get(ray.remote(num_cpus=0)(own_device).remote()) == "cpu"


@pytest.mark.parametrize("workers", [2, "elastic"])
def test_workers_need_whole_gpus(workers: int | str) -> None:
    with pytest.raises(ValueError, match=r"needs whole GPUs, .* got \{'gpu': 0.5\}"):
        autolrs_ray.run(build_tiny, 100, workers=workers, resources={"gpu": 0.5})
