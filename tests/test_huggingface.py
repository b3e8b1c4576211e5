"""A Hugging Face Trainer as a trainable of the pair: the documentation's example, on Ray and with transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autolrs_ray import WeightAverages
from tests.crashes import Malice
from tests.doc_blocks import TrialStub, blocks, check_every_update, run_section, trunk, updates_here

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # hints of transformers about pinned memory and checkpoints

SECTION = "Hugging Face Trainer"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_every_update_has_the_learning_rate_of_its_step_also_after_a_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = run_section(SECTION, tmp_path, monkeypatch, num_lrs=2)
    result = namespace["result"]
    assert result.done
    check_every_update(tmp_path / "updates")
    assert json.loads(Path(result.checkpoint, "trainer_state.json").read_text())["global_step"] == 100
    assert namespace["scheduler"].last_epoch == 100
    assert namespace["replayed"] == [result.schedule.lr_at(step) for step in range(100)]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_papers_policy_restores_probes_and_promotes_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"policy": "paper", "stage_steps": 40, "max_stage_steps": 40, "slots": 2, "probe_steps": 8}
    namespace = run_section(SECTION, tmp_path, monkeypatch, **options)
    assert [row["end"] for row in namespace["result"].rows] == [40, 80, 100]
    check_every_update(tmp_path / "updates")


def test_what_is_added_is_under_fifteen_lines() -> None:
    assert len([line for line in blocks(SECTION)[1].splitlines() if line.strip()]) < 15


def trainer_with(folder: Path, arguments: dict[str, Any] | None = None, **options: Any) -> Any:
    """A Trainer on the documentation's model and data; two micro-batches to a step."""
    namespace: dict[str, Any] = {}
    exec(blocks(SECTION)[0], namespace)
    examples = namespace["examples"](slice(0, 64))
    plans = namespace["TrainingArguments"](
        output_dir=str(folder), per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=4, use_cpu=True,
        disable_tqdm=True, report_to="none", **(arguments or {}),
    )  # fmt: skip
    options = {"eval_dataset": examples, **options}
    return namespace["Trainer"](model_init=namespace["make_model"], args=plans, train_dataset=examples, **options)


def test_without_the_pair_it_reports_optimizer_steps_and_its_scheduler_has_no_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    from autolrs_ray.integrations.huggingface import fit

    used: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            used.append(optimizer.param_groups[0]["lr"])

    trial = TrialStub(tmp_path / "trial", monkeypatch)
    fit(trainer_with(tmp_path / "unused", callbacks=[Watch()]), {"lr": 0.25, "report_every": 2})
    assert used == [0.25] * 4  # the Trainer's linear decay would have made it fall
    assert [(report["step"], report["lr"]) for report in trial.reports] == [(2, 0.25), (4, 0.25)]
    assert [report["epoch"] for report in trial.reports] == [0.5, 1.0]
    assert all(report["val_loss"] > 0 and report["train_loss"] > 0 for report in trial.reports)
    assert {report["val_batches"] for report in trial.reports} == {4.0}  # 64 rows, four times as many as a step takes
    assert sorted(path.name for path in (tmp_path / "trial").iterdir()) == ["step-2", "step-4"]
    assert list((tmp_path / "unused").iterdir()) == []


def test_a_restored_trial_goes_on_exactly_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autolrs_ray.integrations.huggingface import fit

    trial = TrialStub(tmp_path, monkeypatch)
    fit(trainer_with(tmp_path / "unused"), trunk(0, 3, 8), (0.25, 1.0))
    trial.source = trial.checkpoint(3)  # in the middle of an epoch of 4 steps
    last = trainer_with(tmp_path / "unused")
    fit(last, trunk(3, 8), (0.25, 1.0))
    assert [report["step"] for report in trial.reports] == [3, 8, 8]
    assert trial.reports[1]["val_loss"] == trial.reports[2]["val_loss"] != trial.reports[0]["val_loss"]
    assert trial.reports[1]["train_loss"] == pytest.approx(trial.reports[2]["train_loss"], rel=1e-5)
    assert trial.reports[1]["averaged_loss"] == trial.reports[2]["averaged_loss"] != trial.reports[2]["val_loss"]
    averages = WeightAverages(last.model, (0.25, 1.0))
    averages.load_state_dict(torch.load(trial.checkpoint(8) / "averages.pt", weights_only=True))
    with averages.applied():
        assert last.evaluate()["eval_loss"] == pytest.approx(trial.reports[2]["averaged_loss"], rel=1e-6)
    trial.source = None
    with pytest.raises(ValueError, match=r"compared by 'val_f1', which is none of .*'val_loss'"):
        fit(trainer_with(tmp_path / "unused"), trunk(0, 3, 8), (1.0,), metric="val_f1")


def test_a_malicious_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autolrs_ray.integrations.huggingface import fit

    trial = TrialStub(tmp_path, monkeypatch)
    fit(trainer_with(tmp_path / "unused"), trunk(0, 3, 8))
    trial.source = trial.checkpoint(3)
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    for name in names:
        assert (trial.source / name).exists()
        torch.save(Malice(tmp_path / "executed"), trial.source / name)
    with pytest.raises(Exception, match="Weights only load failed"):
        fit(trainer_with(tmp_path / "unused"), trunk(3, 8))
    for name in names[:2]:
        (trial.source / name).unlink()
    with pytest.raises(Exception, match="Weights only load failed"):  # the random numbers' state
        fit(trainer_with(tmp_path / "unused"), trunk(3, 8))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("written", [True, False])
def test_a_restored_trial_trains_at_its_own_lr_and_without_us_at_that_of_the_trainers_scheduler(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autolrs_ray.integrations.follower import Follower
    from autolrs_ray.integrations.huggingface import fit

    trial = TrialStub(tmp_path, monkeypatch)

    def lrs(config: dict[str, Any]) -> list[float]:
        with updates_here() as seen:
            fit(trainer_with(tmp_path / "unused"), config)
        return seen

    assert lrs(trunk(0, 3, lr=0.4)) == [0.4] * 3
    trial.source = trial.checkpoint(3)
    if not written:
        monkeypatch.setattr(Follower, "write_lr", lambda *_: None)
    found = lrs(trunk(3, 6, lr=0.7))
    assert found == [0.7] * 3 if written else max(found) <= 5e-5


def test_no_validation_data_is_refused(tmp_path: Path) -> None:
    from autolrs_ray.integrations.huggingface import fit

    trainer = trainer_with(tmp_path, eval_dataset=None)
    with pytest.raises(ValueError, match="build the Trainer with an eval_dataset"):
        fit(trainer, {"lr": 0.1})


# -- Trainers as people configure them -----------------------------------------------------------------------------------


def own_plans(folder: Path, **options: Any) -> Any:
    """A Trainer with evaluations, saves and a schedule of its own, and a callback that asks for more of them."""
    from transformers import TrainerCallback

    class Extra(TrainerCallback):  # type: ignore[misc]
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.evaluate(metric_key_prefix="own")
            self.trainer.evaluate()
            control.should_evaluate = control.should_save = True

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = control.should_save = True

    arguments = dict(
        eval_on_start=True, save_strategy="best", ignore_data_skip=True,
        eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss",
        logging_steps=1, lr_scheduler_type="reduce_lr_on_plateau",
    )  # fmt: skip
    extra = Extra()
    extra.trainer = trainer_with(folder, arguments, callbacks=[extra], **options)
    return extra.trainer


def test_evaluations_and_saves_that_the_pair_did_not_ask_for_are_no_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autolrs_ray.integrations.huggingface import fit

    trial = TrialStub(tmp_path, monkeypatch)
    fit(own_plans(tmp_path / "unused"), trunk(0, 2, 5))
    trial.source = trial.checkpoint(2)
    fit(own_plans(tmp_path / "unused"), trunk(2, 5))
    assert [report["step"] for report in trial.reports] == [2, 5, 5]
    assert all({"val_loss", "train_loss"} <= set(report) for report in trial.reports)
    assert trial.reports[1]["val_loss"] == trial.reports[2]["val_loss"]


def test_a_report_holds_the_metrics_of_all_evaluation_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autolrs_ray.integrations.huggingface import fit

    trial = TrialStub(tmp_path, monkeypatch)
    examples = trainer_with(tmp_path).eval_dataset
    trainer = own_plans(tmp_path / "unused", eval_dataset={"a": examples[:32], "a_b": examples[32:]})
    config = trunk(0, 2, 5)
    config["autolrs"]["reports"] = 2
    fit(trainer, config)
    assert [report["step"] for report in trial.reports] == [1, 2, 3, 5]
    assert all({"val_a_loss", "val_a_b_loss", "train_loss"} <= set(report) for report in trial.reports)
    assert not any("val_batches" in report for report in trial.reports)  # of which set it would be


def test_its_log_has_the_lr_in_use_and_its_schedule_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    from autolrs_ray.integrations.huggingface import fit

    TrialStub(tmp_path, monkeypatch)
    told: list[float] = []
    lengths: list[int] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            lengths.append(state.max_steps)
            if "learning_rate" in logs:
                told.append(logs["learning_rate"])

    trainer = trainer_with(tmp_path / "unused", {"logging_steps": 1}, callbacks=[Watch()])
    with updates_here() as used:
        fit(trainer, trunk(0, 2, 3, lr=0.8, envelope="linear", total_steps=8))
    assert told == used == pytest.approx([0.8, 0.7, 0.6])
    assert [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line] == told
    assert set(lengths) == {8}


@pytest.mark.parametrize("name", ["load_best_model_at_end", "save_only_model", "auto_find_batch_size", "push_to_hub"])
def test_plans_that_the_pair_cannot_keep_are_refused_by_name(name: str, tmp_path: Path) -> None:
    from autolrs_ray.integrations.huggingface import fit

    trainer = trainer_with(tmp_path)
    setattr(trainer.args, name, True)
    with pytest.raises(ValueError, match=f"{name}=True is not possible here"):
        fit(trainer, {"lr": 0.1})


def test_what_ends_a_trial_early_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import EarlyStoppingCallback, TrainerCallback

    from autolrs_ray.integrations.huggingface import fit

    class Stopping(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    TrialStub(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="EarlyStoppingCallback is not possible here"):
        fit(trainer_with(tmp_path, callbacks=[EarlyStoppingCallback()]), trunk(0, 4))
    with pytest.raises(
        RuntimeError, match=r"stopped at step 2, before the trial's end at 4: one of its callbacks \(Stop\w*\)"
    ):
        fit(trainer_with(tmp_path, callbacks=[Stopping()]), trunk(0, 4))
