"""A LightningModule as a trainable of the pair: the documentation's example, on Ray and with Lightning itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from autolrs_ray import WeightAverages
from tests.crashes import Malice
from tests.doc_blocks import TrialStub, blocks, check_every_update, run_section, trunk, updates_here

pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's hints about workers, loggers and intervals


def state(result: Any) -> dict[str, Any]:
    return torch.load(Path(result.checkpoint, "trainer.ckpt"), weights_only=False)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_every_update_has_the_learning_rate_of_its_step_also_after_a_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = run_section("Lightning", tmp_path, monkeypatch)
    result, replay = namespace["result"], namespace["trainer"]
    assert result.done
    check_every_update(tmp_path / "updates")
    assert state(result)["global_step"] == 100
    assert replay.global_step == replay.lr_scheduler_configs[0].scheduler.last_epoch == 100
    assert namespace["replayed"] == [result.schedule.lr_at(step) for step in range(100)]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_papers_policy_restores_probes_and_promotes_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"policy": "paper", "stage_steps": 40, "max_stage_steps": 40, "slots": 2, "probe_steps": 8}
    namespace = run_section("Lightning", tmp_path, monkeypatch, **options)
    assert [row["end"] for row in namespace["result"].rows] == [40, 80, 100]
    check_every_update(tmp_path / "updates")


def test_what_is_added_is_under_fifteen_lines() -> None:
    assert len([line for line in blocks("Lightning")[1].splitlines() if line.strip()]) < 15


def lightning_parts() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(blocks("Lightning")[0], namespace)
    namespace["trainer"] = namespace["L"].Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=4,
        enable_model_summary=False, accumulate_grad_batches=2,
    )  # fmt: skip
    return namespace


def test_without_the_pair_it_reports_optimizer_steps_and_keeps_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autolrs_ray.integrations.lightning import fit

    parts, trial = lightning_parts(), TrialStub(tmp_path, monkeypatch)

    losses = []

    class TwoGroups(parts["Classifier"]):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            losses.append(super().training_step(batch, batch_idx))
            return losses[-1]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            first, second = self.network[0].parameters(), self.network[2].parameters()
            return torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.02}])

    loaders = {"train_dataloaders": parts["loader"](slice(0, 256), True)}
    loaders["val_dataloaders"] = parts["loader"](slice(256, 320), False)
    fit(parts["trainer"], TwoGroups(), {"lr": 0.5, "report_every": 2}, **loaders)
    assert [(report["step"], report["lr"]) for report in trial.reports] == [(2, 0.5), (4, 0.5)]
    assert all(report["val_loss"] > 0 for report in trial.reports)
    assert [report["epoch"] for report in trial.reports] == [0.5, 1.0]  # 8 batches, two to a step
    assert {report["val_batches"] for report in trial.reports} == {1.0}  # 64 rows, as many as a step takes
    means = [float(sum(losses[i : i + 4])) / 4 for i in (0, 4)]
    assert [report["train_loss"] for report in trial.reports] == pytest.approx(means, rel=1e-5)
    assert parts["trainer"].fit_loop.total_batch_idx + 1 == 8
    assert [group["lr"] for group in parts["trainer"].optimizers[0].param_groups] == pytest.approx([0.5, 0.1])


def test_restored_trials_see_new_batches_and_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray import tune

    from autolrs_ray.integrations.lightning import fit

    TrialStub(tmp_path / "trial", monkeypatch)
    seen: list[list[torch.Tensor]] = []
    for start in (0, 1, 1, 2):
        parts = lightning_parts()
        parts["L"].seed_everything(0, verbose=False)
        seen.append([])

        class Recording(parts["Classifier"]):
            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                seen[-1].append(batch[0])
                return super().training_step(batch, batch_idx)

        trainer, data = parts["trainer"], parts["loader"]
        trainer.fit_loop.epoch_loop.max_steps = start + 1
        fit(trainer, Recording(), {"lr": 0.5, "report_every": 1, "seed": 0},
            train_dataloaders=data(slice(0, 256), True), val_dataloaders=data(slice(256, 320), False))  # fmt: skip
        if len(seen) != 2:  # the third starts where the second did
            trainer.save_checkpoint(tmp_path / "trainer.ckpt")
            monkeypatch.setattr(tune, "get_checkpoint", lambda: tune.Checkpoint.from_directory(tmp_path))
    first, second, twin, last = (torch.cat(batches) for batches in seen)
    assert torch.equal(second, twin)
    assert not any(torch.equal(*pair) for pair in ((first, second), (second, last), (first, last)))


@pytest.mark.parametrize("keeps_its_place", [False, True])
def test_a_restored_stream_that_begins_anew_is_warned_of(
    keeps_its_place: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    from ray import tune

    from autolrs_ray.integrations.lightning import fit

    TrialStub(tmp_path / "trial", monkeypatch)

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(parts["loader"](slice(0, 256), False).dataset)

    for end in (1, 2):
        parts = lightning_parts()
        parts["trainer"].fit_loop.epoch_loop.max_steps = end
        loader: Any = torch.utils.data.DataLoader(Stream(), batch_size=32)
        if keeps_its_place:
            loader.state_dict, loader.load_state_dict = dict, len
        fit(parts["trainer"], parts["Classifier"](), {"lr": 0.1, "report_every": 1, "seed": 0},
            train_dataloaders=loader, val_dataloaders=parts["loader"](slice(256, 320), False))  # fmt: skip
        told = [str(warning.message) for warning in recwarn if "a stream, which begins anew" in str(warning.message)]
        assert len(told) == (end == 2 and not keeps_its_place)
        parts["trainer"].save_checkpoint(tmp_path / "trainer.ckpt")
        monkeypatch.setattr(tune, "get_checkpoint", lambda: tune.Checkpoint.from_directory(tmp_path))


def test_no_validation_data_and_two_optimizers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autolrs_ray.integrations.lightning import fit

    parts = lightning_parts()
    TrialStub(tmp_path, monkeypatch)
    train = parts["loader"](slice(0, 256), True)
    with pytest.raises(ValueError, match="chosen on validation data: give fit"):
        fit(parts["trainer"], parts["Classifier"](), {"lr": 0.1}, train_dataloaders=train)

    class TwoOptimizers(parts["Classifier"]):
        automatic_optimization = False

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    trainer = parts["L"].Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match="one optimizer is supported, got 2"):
        fit(trainer, TwoOptimizers(), {"lr": 0.1}, train_dataloaders=train, val_dataloaders=train)

    class NoOptimizer(parts["Classifier"]):
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ValueError, match="no optimizer to write learning rates into"):
        fit(quiet_trainer(parts), NoOptimizer(), {"lr": 0.1}, train_dataloaders=train, val_dataloaders=train)


@pytest.mark.parametrize("written", [True, False])
def test_a_restored_trial_trains_at_its_own_lr_and_without_us_at_the_checkpoints(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autolrs_ray.integrations.follower import Follower
    from autolrs_ray.integrations.lightning import fit

    trial = TrialStub(tmp_path, monkeypatch)

    def lrs(config: dict[str, Any]) -> list[float]:
        parts = lightning_parts()
        trainer = parts["L"].Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        with updates_here() as seen:
            fit(trainer, parts["Classifier"](), config, train_dataloaders=parts["loader"](slice(0, 256), True),
                val_dataloaders=parts["loader"](slice(256, 320), False))  # fmt: skip
        return seen

    assert lrs(trunk(0, 3, lr=0.4)) == [0.4] * 3
    trial.source = trial.checkpoint(3)
    if not written:
        monkeypatch.setattr(Follower, "write_lr", lambda *_: None)
    assert lrs(trunk(3, 6, lr=0.7)) == [0.7 if written else 0.4] * 3  # the module was built with 0.1


@pytest.mark.parametrize("averaging", [False, True])
def test_a_restored_trial_goes_on_with_the_same_weights_and_averages(
    averaging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autolrs_ray.integrations.lightning import fit

    parts, trial = lightning_parts(), TrialStub(tmp_path, monkeypatch)
    validation = parts["loader"](slice(256, 320), False)

    def train(config: dict[str, Any]) -> Any:
        trainer = parts["L"].Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        parts["L"].seed_everything(0, verbose=False)
        rows = Subset(parts["loader"](slice(0, 256), False).dataset, list(range(32)) * 8)  # 8 times the same batch
        loader = DataLoader(rows, batch_size=32)
        fit(trainer, parts["Classifier"](), config, (0.25, 1.0) if averaging else (), train_dataloaders=loader,
            val_dataloaders=validation)  # fmt: skip
        return trainer

    train(trunk(0, 6, 20))
    trial.source = trial.checkpoint(6)
    trainer = train(trunk(6, 20))
    assert [report["step"] for report in trial.reports] == [6, 20, 20]
    assert trainer.global_step == 20
    assert trial.reports[1]["val_loss"] == pytest.approx(trial.reports[2]["val_loss"], rel=1e-6)
    saved = torch.load(trial.checkpoint(20) / "trainer.ckpt", weights_only=False)
    module = parts["Classifier"]()
    module.load_state_dict(saved["state_dict"])

    def loss_of(expected: float) -> None:
        losses = [torch.nn.functional.cross_entropy(module.network(x), y).item() for x, y in validation]
        assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-5)

    loss_of(trial.reports[2]["val_loss"])
    assert ("AutoLRSCallback" in saved["callbacks"]) == averaging
    if averaging:
        assert trial.reports[1]["averaged_loss"] == pytest.approx(trial.reports[2]["averaged_loss"], rel=1e-6)
        averages = WeightAverages(module, (0.25, 1.0))
        averages.load_state_dict(saved["callbacks"]["AutoLRSCallback"])
        with averages.applied():
            loss_of(trial.reports[2]["averaged_loss"])


def test_a_malicious_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autolrs_ray.integrations.lightning import fit

    parts, trial = lightning_parts(), TrialStub(tmp_path, monkeypatch)
    torch.save({"state_dict": Malice(tmp_path / "executed")}, tmp_path / "trainer.ckpt")
    trial.source = tmp_path
    data = parts["loader"](slice(0, 64), False)
    with pytest.raises(Exception, match="Weights only load failed"):
        fit(parts["trainer"], parts["Classifier"](), trunk(6, 20), train_dataloaders=data, val_dataloaders=data)
    assert not (tmp_path / "executed").exists()


# -- modules as people write them --------------------------------------------------------------------------------------


def quiet_trainer(parts: dict[str, Any], **options: Any) -> Any:
    return parts["L"].Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def data_of(parts: dict[str, Any]) -> dict[str, Any]:
    loader = parts["loader"]
    return {"train_dataloaders": loader(slice(0, 256), True), "val_dataloaders": loader(slice(256, 320), False)}


def test_schedulers_are_built_for_the_whole_run_and_one_that_waits_for_a_metric_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autolrs_ray.integrations.lightning import fit

    parts, trial, lengths = lightning_parts(), TrialStub(tmp_path, monkeypatch), []

    class Scheduled(parts["Classifier"]):
        kind = "onecycle"

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            lengths.append((self.trainer.estimated_stepping_batches, self.trainer.max_steps))
            if self.kind == "plateau":
                plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
            once = {"total_steps": lengths[-1][0]} if self.kind == "onecycle" else {}
            once = once or {"epochs": self.trainer.max_epochs, "steps_per_epoch": 8}
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, **once)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    for start, end, kind in ((0, 3, "onecycle"), (3, 20, "onecycle"), (0, 20, "plateau"), (0, 20, "epochs")):
        trial.source = trial.checkpoint(start) if start else None
        module = Scheduled()
        module.kind = kind
        with updates_here() as seen:
            fit(quiet_trainer(parts), module, trunk(start, end, lr=0.7, total_steps=20), **data_of(parts))
        assert seen == [0.7] * (end - start)
    assert lengths == [(20, 20)] * 4
    assert [report["step"] for report in trial.reports] == [3, 20, 20, 20]


@pytest.mark.parametrize("manual", [False, True])
def test_skipped_batches_and_manual_optimization(manual: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autolrs_ray.integrations.lightning import fit

    parts, trial = lightning_parts(), TrialStub(tmp_path, monkeypatch)

    class Skipping(parts["Classifier"]):
        automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            loss = super().training_step(batch, batch_idx)
            if not manual:
                return loss if batch_idx % 3 else None
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

    with updates_here() as seen:
        fit(quiet_trainer(parts), Skipping(), trunk(0, 4, 10, lr=0.3), **data_of(parts))
    assert seen == [0.3] * 10
    assert [report["step"] for report in trial.reports] == [4, 10]
    assert all(("train_loss" in report) != manual for report in trial.reports)


def test_a_batch_of_several_updates_that_misses_a_report_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autolrs_ray.integrations.lightning import fit

    parts = lightning_parts()
    TrialStub(tmp_path, monkeypatch)

    class Twice(parts["Classifier"]):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                self.manual_backward(super().training_step(batch, batch_idx))
                self.optimizers().step()

    with pytest.raises(RuntimeError, match=r"report was due after step 3, inside of one batch.* 2 optimizer steps"):
        fit(quiet_trainer(parts), Twice(), trunk(0, 3, 10), **data_of(parts))


def test_a_group_that_is_unfrozen_later_keeps_its_share_of_the_lr_also_after_a_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.callbacks import BackboneFinetuning

    from autolrs_ray.integrations.lightning import fit

    parts, trial = lightning_parts(), TrialStub(tmp_path, monkeypatch)

    class Backbone(parts["Classifier"]):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Linear(8, 8)
            self.network = torch.nn.Sequential(self.backbone, self.network)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2, momentum=0.9)

    class Monitor(parts["L"].Callback):  # as LearningRateMonitor reads it
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            assert trainer.optimizers[0].param_groups[0]["lr"] == 0.6

    for start, end in ((0, 5), (5, 12), (12, 20)):  # an epoch has 8 steps
        trial.source = trial.checkpoint(start) if start else None
        trainer = quiet_trainer(parts, callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1), Monitor()])
        fit(trainer, Backbone(), trunk(start, end, lr=0.6, total_steps=20), **data_of(parts))
        lrs = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert lrs == pytest.approx([0.6] if end == 5 else [0.6, 0.06])


def test_what_ends_a_trial_early_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import callbacks

    from autolrs_ray.integrations.lightning import fit

    parts = lightning_parts()
    TrialStub(tmp_path, monkeypatch)
    for kind, options in (("EarlyStopping", {"monitor": "val_loss"}), ("StochasticWeightAveraging", {"swa_lrs": 0.01}),
                          ("LearningRateFinder", {}), ("BatchSizeFinder", {})):  # fmt: skip
        trainer = quiet_trainer(parts, callbacks=[getattr(callbacks, kind)(**options)])
        with pytest.raises(ValueError, match=f"{kind} is not possible here"):
            fit(trainer, parts["Classifier"](), trunk(0, 9), **data_of(parts))
    with pytest.raises(ValueError, match="barebones=True is not possible here"):
        fit(parts["L"].Trainer(accelerator="cpu", barebones=True), parts["Classifier"](), trunk(0, 9))

    class Stopping(parts["L"].Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    with pytest.raises(RuntimeError, match=r"stopped at step 4, before the trial's end at 9: one of .*\(Stopping\)"):
        fit(quiet_trainer(parts, callbacks=[Stopping()]), parts["Classifier"](), trunk(0, 9), **data_of(parts))
