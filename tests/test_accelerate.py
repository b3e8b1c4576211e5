"""Accelerate's loop follows the pair in optimizer steps, as documented."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autolrs_ray import LearnedLRScheduler, LearnedSchedule
from autolrs_ray.integrations.follower import Follower
from autolrs_ray.outcome.schedule import Piece
from tests.doc_blocks import check_every_update, run_section

accelerate = pytest.importorskip("accelerate")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_documented_loop_counts_optimizer_steps_not_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = run_section("Accelerate, and any other loop", tmp_path, monkeypatch)
    result = namespace["result"]
    assert result.done
    check_every_update(tmp_path / "updates")
    assert torch.load(Path(result.checkpoint, "step.pt")) == 100


def lrs_used(scheduler_steps: Any, accelerator: Any) -> list[float]:
    """LR of every optimizer step over 20 micro-batches, replaying with `scheduler_steps`."""
    model = nn.Linear(2, 1)
    schedule = LearnedSchedule(5, (Piece(0, 5, 0.5, "linear"),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = LearnedLRScheduler(optimizer, schedule)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    scheduler, step = scheduler_steps(scheduler)
    used: list[float] = []
    for _ in range(20):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(torch.ones(1, 2)).sum())
            if accelerator.sync_gradients:
                used.append(wrapped.param_groups[0]["lr"])
            wrapped.step()
            step(scheduler)
            wrapped.zero_grad()
    return used


def test_a_schedule_replays_once_per_optimizer_step_and_a_prepared_one_once_per_process() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    expected = pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])

    def beside(scheduler: LearnedLRScheduler) -> Any:
        return scheduler, lambda it: it.step() if accelerator.sync_gradients else None

    assert lrs_used(beside, accelerator) == expected

    def prepared(scheduler: LearnedLRScheduler) -> Any:
        return accelerator.prepare(scheduler), lambda it: it.step()

    assert lrs_used(prepared, accelerator) == expected
    processes = accelerate.state.AcceleratorState().num_processes
    try:
        accelerate.state.PartialState._shared_state["num_processes"] = 2
        with pytest.warns(UserWarning, match="ends at step 5, and training goes on"):
            assert lrs_used(prepared, accelerator)[1] == pytest.approx(0.3)  # why the page says not to prepare it
    finally:
        accelerate.state.PartialState._shared_state["num_processes"] = processes


# -- the follower ------------------------------------------------------------------------------------------------------


def segment(**changes: Any) -> dict[str, Any]:
    values = dict(arm="t00", role="trunk", stage=0, lr=0.4, start=10, boundaries=[20, 100], reports=2,
                  envelope="linear", total_steps=100, warmup_steps=0)  # fmt: skip
    return {"lr": 0.36, "autolrs": {**values, **changes}}


def test_follower_reports_where_the_segment_asks_and_saves_at_its_boundaries() -> None:
    follower = Follower(segment())
    due = [step for step in range(101) if follower.report_due(step)]
    assert due == [15, 20, 60, 100]
    assert [step for step in due if follower.checkpoint_due(step)] == [20, 100]
    assert follower.end == 100
    assert follower.report(60, {"val_loss": 1.0}) == {
        "val_loss": 1.0, "step": 60, "lr": pytest.approx(0.4 * 0.41), "stage": 0, "role": "trunk",
    }  # fmt: skip


def test_follower_writes_over_what_a_checkpoint_brought_back_and_keeps_ratios() -> None:
    follower = Follower(segment())
    layers = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(
        [{"params": layers[0].parameters(), "lr": 1.0}, {"params": layers[1].parameters(), "lr": 0.5}]
    )
    assert follower.write_lr(optimizer, 10) == pytest.approx(0.36)
    for group in optimizer.param_groups:
        group["lr"] = 123.0
    follower.write_lr(optimizer, 50)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.1])


def test_follower_knows_the_ratios_that_a_warm_up_from_zero_hides() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.0
    Follower({"lr": 0.3}).write_lr(optimizer, 0)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_follower_refuses_what_it_cannot_follow() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.0)
    with pytest.raises(ValueError, match=r"build the optimizer with lr > 0 in its first group, got 0\.0"):
        Follower({"lr": 0.3}).write_lr(optimizer, 0)
    with pytest.raises(ValueError, match="report_every must be at least 1, got 0"):
        Follower({"lr": 0.3, "report_every": 0})


def test_follower_takes_groups_that_are_added_later_with_the_lr_they_come_with() -> None:
    layers = [nn.Linear(1, 1) for _ in range(3)]
    optimizer = torch.optim.SGD(layers[0].parameters(), lr=torch.tensor(0.5), foreach=False)
    follower = Follower({"lr": 2.0})
    follower.write_lr(optimizer, 0)
    optimizer.add_param_group({"params": list(layers[1].parameters()), "lr": 0.05})
    optimizer.add_param_group(
        {"params": list(layers[2].parameters())}
    )  # the default, which is the tensor it was built with
    for _ in range(2):
        follower.write_lr(optimizer, 1)
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([2.0, 0.2, 2.0])
    restored = torch.optim.SGD([{"params": list(layer.parameters())} for layer in layers], lr=0.5)
    restored.load_state_dict(optimizer.state_dict())
    Follower({"lr": 1.0}).write_lr(restored, 2)
    assert [float(group["lr"]) for group in restored.param_groups] == pytest.approx([1.0, 0.1, 1.0])


@pytest.mark.parametrize(("module", "library"), [("lightning", "lightning"), ("huggingface", "transformers")])
def test_a_missing_extra_names_the_command_that_installs_it(
    module: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # an import of it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, f"autolrs_ray.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install '\.\[{module}\]'"):
        importlib.import_module(f"autolrs_ray.integrations.{module}")
