"""Which dtype autocast takes."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from autolrs_ray.training import precision
from autolrs_ray.training.trainer import Trainer
from tests.trainings import falling, task

CPUINFO = Path("/proc/cpuinfo")


def seen(autocast: bool | torch.dtype) -> tuple[set[torch.dtype], float]:
    """The dtypes of the outputs that the loss is given in training, and the training loss."""
    dtypes = set()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            dtypes.add(output.dtype)
        return torch.nn.functional.cross_entropy(output, target)

    trainer = Trainer(lambda: task(autocast=autocast, loss=loss))
    trained = trainer.train(10, falling)
    assert trainer.evaluate()["loss"] > 0.0
    return dtypes, trained


@pytest.mark.parametrize("emulated", [True, False])
def test_true_is_bfloat16_only_where_the_device_computes_in_it(
    emulated: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "_emulates_bfloat16", lambda device: emulated)
    assert seen(torch.bfloat16)[0] == {torch.bfloat16}
    plain = seen(False)
    assert plain[0] == {torch.float32}
    assert not caplog.records
    if emulated:
        assert seen(True) == plain
        assert "this CPU does not compute in bfloat16" in caplog.text
    else:
        assert seen(True) == seen(torch.bfloat16)
        assert not caplog.records


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads the flags of an x86 CPU")
def test_a_cpu_computes_in_bfloat16_from_avx512_on() -> None:
    assert precision._emulates_bfloat16(torch.device("cpu")) == ("avx512bw" not in CPUINFO.read_text().split())


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_torch_says_emulates_bfloat16_trains_without(
    native: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert precision.autocast_dtype(True, torch.device("cuda")) == (torch.bfloat16 if native else None)
    assert ("this GPU does not compute in bfloat16" in caplog.text) == (not native)
    assert precision.autocast_dtype(torch.float16, torch.device("cuda")) is torch.float16
