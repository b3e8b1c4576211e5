"""The VGG16 experiment, on small random files in CIFAR's own format: data, augmentation, schedules, policies, tables."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as transforms

from autolrs_ray.core.policies import make_policy
from autolrs_ray.record.journal import JOURNAL_FILE
from autolrs_ray.training.trainer import Trainer
from benchmarks import vgg16_step
from experiments import vgg16_cifar, vgg16_report, vgg16_task
from experiments.vgg16_task import Settings, crop_and_flip, draw_moves, vgg16
from tests.cifar_files import build_trusting, trusting, write_cifar

TRAIN, VAL = 256, 40  # of the 300 training images in the files
SMALL = ["--width", ".125", "--train-images", str(TRAIN), "--val-images", str(VAL), "--channels-last"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", trusting)


def settings(data_dir: str, **options: Any) -> Settings:
    return Settings(**{"data_dir": data_dir, "width": 0.125, "train_images": TRAIN, "val_images": VAL, **options})


def trainer(data_dir: str, seed: int = 0, averaging: bool = False, **options: Any) -> Trainer:
    return Trainer(lambda: vgg16_task.build(asdict(settings(data_dir, **options))), seed, averaging)


# -- data and augmentation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_the_images_stay_uint8_and_the_splits_share_none(dataset: str, data_dir: str) -> None:
    ours = trainer(data_dir, dataset=dataset)
    (train, labels), (val, _) = ours.train_data, ours.val_data
    assert train.dtype == val.dtype == ours.batch(0)[0].dtype == torch.uint8
    assert (len(train), len(val), labels.dtype) == (TRAIN, VAL, torch.int64)
    rows = {image.numpy().tobytes() for image in torch.cat([train, val])}
    assert len(rows) == TRAIN + VAL
    everything = vgg16_task.read_cifar(dataset, data_dir, train=True)
    known = {image.numpy().tobytes(): int(label) for image, label in zip(*everything, strict=True)}
    assert all(known[image.numpy().tobytes()] == int(label) for image, label in zip(train, labels, strict=True))
    assert known.keys() >= rows


def test_the_held_out_images_are_the_same_whatever_is_trained_on(data_dir: str) -> None:
    few, many = trainer(data_dir, train_images=128), trainer(data_dir, seed=5)
    assert torch.equal(few.val_data[0], many.val_data[0])
    assert torch.equal(few.train_data[0], many.train_data[0][:128])


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_crops_and_flips_are_torchvisions_image_by_image(padding: str) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (200, 3, 32, 32), generator=generator, dtype=torch.uint8)
    moves = draw_moves(len(images), generator)
    expected = []
    for image, (top, left, flip) in zip(images, moves.T.tolist(), strict=True):
        mode = {"zero": "constant", "reflect": "reflect"}[padding]
        cropped = transforms.crop(transforms.pad(image, [4], padding_mode=mode), top, left, 32, 32)
        expected.append(transforms.hflip(cropped) if flip else cropped)
    found = crop_and_flip(images, moves, padding)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack(expected))


def test_every_crop_and_both_sides_are_drawn() -> None:
    top, left, flip = draw_moves(5000, torch.Generator().manual_seed(0))
    assert set(top.tolist()) == set(left.tolist()) == set(range(9))
    assert len({(int(a), int(b)) for a, b in zip(top, left, strict=True)}) == 81
    assert 0.45 < flip.float().mean() < 0.55


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_the_augmented_batch_is_a_function_of_seed_and_step(padding: str, data_dir: str) -> None:
    first, second = (trainer(data_dir, padding=padding) for _ in range(2))
    once = {step: first.batch(step)[0] for step in range(4)}
    first.train(1, lambda step: 0.1)
    torch.manual_seed(77)
    for step in (3, 0, 2, 1):
        assert torch.equal(second.batch(step)[0], once[step])
        assert torch.equal(first.batch(step)[0], once[step])
    assert not torch.equal(trainer(data_dir, seed=1, padding=padding).batch(0)[0], once[0])
    plain = first.train_data[0][first.feed.rows.at(0)]
    moved = (once[0] != plain).flatten(1).any(1)
    assert moved.float().mean() > 0.9  # all but the few crops at the centre


class Waits(TorchDispatchMode):
    """Notes what makes the host wait for the device: a value read, or a copy that is not said to be non_blocking."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type != "cpu":
            self.found.append(str(func))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            copied = func is torch.ops.aten.copy_.default
            source, target = (args[1], args[0]) if copied else (args[0], out)
            free = args[2] if copied and len(args) > 2 else (kwargs or {}).get("non_blocking", False)
            if source.device != target.device and not free:
                self.found.append(str(func))
        return out


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("averaging", [False, True])
def test_no_step_waits_for_the_device(averaging: bool, data_dir: str) -> None:
    """On "meta", a device without values: reading one raises, and copies to it are seen."""

    def train(ours: Trainer, until: int) -> None:
        def lr_at(step: int) -> float:
            if step == until:
                raise EnoughError  # before the loss is read, once per call
            return 0.1

        with pytest.raises(EnoughError):
            ours.train(until + 1, lr_at)

    task = vgg16_task.build(asdict(settings(data_dir)))
    ours = Trainer(lambda: replace(task, device="meta", batch_size=32), 0, averaging)
    train(ours, 2)
    with Waits() as waits:
        train(ours, 7)  # within the epoch: its order is sent at its start
    assert ours.step == 7
    assert waits.found == []
    theirs = AveragedModel(ours.model)
    theirs.update_parameters(ours.model)
    with waits:  # it does find what it is to find
        theirs.update_parameters(ours.model)
    assert waits.found


# -- model -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "classes", "parameters"), [("cifar10", 10, 14_728_266), ("cifar100", 100, 14_774_436)]
)
def test_the_model_is_vgg16_with_batch_norm_and_one_linear_head(dataset: str, classes: int, parameters: int) -> None:
    model = vgg16(dataset)
    kinds = [type(layer).__name__ for layer in model.modules()]
    assert [kinds.count(kind) for kind in ("Conv2d", "BatchNorm2d", "MaxPool2d", "Linear")] == [13, 13, 5, 1]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert vgg16(dataset, 0.125)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, classes)


def test_the_model_normalises_as_torchvision_does() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = transforms.normalize(images / 255.0, *map(list, vgg16_task.STATISTICS["cifar100"]))
    assert torch.allclose(vgg16("cifar100", 0.125)[0](images), expected, atol=1e-5)


def test_the_optimizer_is_the_publications(data_dir: str) -> None:
    task = vgg16_task.build(asdict(settings(data_dir)))
    (group,) = task.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
    assert len(group["params"]) == len(list(task.model.parameters()))
    assert task.batch_size == 128
    assert task.loss is nn.functional.cross_entropy


def test_bfloat16_and_channels_last_train_to_nearly_the_same_weights(data_dir: str) -> None:
    plain, fast = trainer(data_dir), trainer(data_dir, autocast=True, channels_last=True)
    assert fast.model[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    losses = [run.train(4, lambda step: 0.02) for run in (plain, fast)]
    roundings = 2 * 14  # each of 14 layers rounds what it passes on, forward and backward, by 2**-8 at most
    assert losses[1] == pytest.approx(losses[0], rel=roundings * 2**-8)
    assert losses[1] != losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_compiled_training_gives_the_same_loss(data_dir: str) -> None:
    plain, compiled = trainer(data_dir), trainer(data_dir, compile="reduce-overhead")
    losses = [run.train(3, lambda step: 0.02) for run in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert compiled.evaluate()["loss"] == pytest.approx(plain.evaluate()["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "mnist"}, "got 'mnist'"),
        ({"padding": "edge"}, "got 'edge'"),
        ({"width": 0.0}, "width must be positive, got 0.0"),
        ({"train_images": 127}, "self.train_images=127"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_more_images_than_there_are_is_refused(data_dir: str) -> None:
    with pytest.raises(ValueError, match=r"train_images=256 and val_images=45 are more than the 300"):
        trainer(data_dir, val_images=45)


# -- fixed schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "factors"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.853553, 0.5, 0.146447]),
        ("multistep", [1.0, 1.0, 0.1, 0.01]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_fixed_schedules_set_the_lr_of_every_step(
    shape: str, factors: list[float], data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = torch.optim.SGD.step

    def noting(self: Any, *args: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    outcome = run(tmp_path, data_dir, "--policy", shape, "--epochs", "2", "--peaks", ".2")
    assert seen == pytest.approx([0.2 * factor for factor in factors], rel=1e-5)
    assert outcome["weights"] == ("averaged" if shape == "constant" else "raw")
    assert (outcome["steps"], outcome["epochs"], outcome["lrs"], outcome["tuned"]) == (4, 2, [0.2], False)


def run(out: Path, data_dir: str, *arguments: str) -> dict[str, Any]:
    """Run the command line; the outcome of its one job."""
    known = set(out.glob("outcomes/*"))
    vgg16_cifar.main(["--data-dir", data_dir, "--out", str(out), *SMALL, *arguments])
    (file,) = set(out.glob("outcomes/*")) - known
    return dict(json.loads(file.read_text()))


def test_the_peak_is_tuned_on_validation_images_and_the_test_images_are_read_once(
    data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = []
    metrics = vgg16_cifar.test_metrics
    monkeypatch.setattr(vgg16_cifar, "test_metrics", lambda *args: tested.append(args) or metrics(*args))
    outcome = run(tmp_path, data_dir, "--policy", "linear", "--epochs", "2", "--peaks", "1e-5", ".05", "1e3")
    folders = {peak: next(tmp_path.glob(f"fixed/*-lr{peak:g}-*/run.json")) for peak in (1e-5, 0.05, 1e3)}
    losses = {peak: json.loads(file.read_text())["val"]["loss"] for peak, file in folders.items()}
    assert outcome["lrs"] == [min(losses, key=lambda peak: np.nan_to_num(losses[peak], nan=np.inf))]
    assert outcome["lrs"] != [1e3]
    assert (outcome["compute"], outcome["tuned"], len(tested)) == (3.0, True, 1)

    again = trainer(data_dir, channels_last=True)
    again.train(4, lambda step: outcome["lrs"][0] * (1 - step / 4))
    expected = again.evaluate(vgg16_task.read_cifar("cifar10", data_dir, train=False))
    assert outcome["test_accuracy"] == expected["accuracy"]
    assert outcome["test_loss"] == expected["loss"]


def test_the_same_command_trains_nothing_again(data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = run(tmp_path, data_dir, "--policy", "cosine", "--epochs", "1", "--peaks", ".1", ".2")
    trained = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *args: trained.append(args) or train(self, *args))
    vgg16_cifar.main(["--data-dir", data_dir, "--out", str(tmp_path), *SMALL, "--policy", "cosine", "--epochs", "1",
                      "--peaks", ".1", ".2"])  # fmt: skip
    untuned = run(tmp_path, data_dir, "--policy", "cosine", "--epochs", "1", "--peaks", ".2")
    assert not trained  # the single peak is one of the two above
    assert (untuned["peaks"], once["peaks"]) == ([0.2], [0.1, 0.2])
    run(tmp_path, data_dir, "--policy", "cosine", "--epochs", "1", "--peaks", ".2", "--padding", "reflect")
    assert len(trained) == 1


# -- AutoLRS -----------------------------------------------------------------------------------------------------------


def test_the_papers_set_up_is_700_epochs_with_doubling_stages() -> None:
    job = vgg16_cifar.jobs_of(vgg16_cifar.parse(["--policy", "paper"]))[0]
    assert (job.epochs, job.steps, job.settings.width) == (350, 350 * 351, 1.0)
    policy: Any = make_policy("paper", job.steps, **job.options)
    assert (policy.lr_interval, policy.num_lrs, policy.series) == ((1e-3, 1e-1), 10, "authors")
    assert [stage.steps for stage in policy.plan.stages()][:6] == [1000, 2000, 4000, 8000, 8000, 8000]
    assert [stage.probe_steps for stage in policy.plan.stages()][:4] == [100, 200, 400, 800]
    compute, _ = policy.usual(1)
    last = policy.plan.stages()[-1]
    cut = 8000 - last.steps  # the last stage is cut at the end of the run; its probes are not
    assert compute * 350 == pytest.approx(700 + cut / 351)


@pytest.mark.parametrize(("variable", "address"), [(None, "local"), ("RAY_ADDRESS", "auto"), ("RAY_JOB_ID", "auto")])
def test_in_a_clusters_job_it_joins_the_cluster(
    variable: str | None, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "127.0.0.1:6379")
    assert vgg16_cifar.parse([]).address == address
    assert vgg16_cifar.parse(["--address", "other:6379"]).address == "other:6379"


def test_the_data_sets_folder_stays_out_of_git_and_out_of_jobs() -> None:
    """`ray job submit --working-dir .` leaves out what .gitignore names."""
    ignored = (Path(vgg16_cifar.__file__).parent.parent / ".gitignore").read_text().splitlines()
    assert {f"{vgg16_cifar.parse([]).data_dir}/", "runs/", ".venv/"} <= set(ignored)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_both_policies_train_report_and_draw_on_ray(
    data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vgg16_cifar, "build", build_trusting)
    common = ["--epochs", "5", "--reports", "1", "--slots", "1", "--gpus-per-trial", "0", "--dataset", "cifar100"]
    paper = run(tmp_path, data_dir, "--policy", "paper", "--stage-steps", "10", "--max-stage-steps", "10", *common)
    assert paper["compute"] == pytest.approx(2.0)
    (lr,) = paper["lrs"]
    assert 0.999e-3 < lr < 1.001e-1
    anchored = run(tmp_path, data_dir, "--policy", "anchored", *common)
    assert anchored["compute"] > 1.0
    for outcome in (paper, anchored):
        (folder,) = tmp_path.glob(f"cifar100-{outcome['policy']}-*")
        assert (folder / JOURNAL_FILE).stat().st_size > 0
        plots = {file.stem for file in (folder / "plots").glob("*.png")}
        assert plots >= {"loss", "learning_rate", "accuracy"}
        assert outcome["steps"] == 10
        assert 0.0 <= outcome["test_accuracy"] <= 1.0
        assert outcome["val_accuracy"] is not None
        assert outcome["train_images_per_s"] > 0
    vgg16_report.write_report(tmp_path, tmp_path / "results")
    rows = json.loads((tmp_path / "results" / "vgg16_cifar.json").read_text())
    assert [row["policy"] for row in rows] == ["anchored", "paper"]


# -- tables and throughput ---------------------------------------------------------------------------------------------


def outcome(seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    return {
        **asdict(Settings()), "policy": "linear", "tuned": False, "peaks": [0.1], "epochs": 50, "steps": 17_550,
        "seed": seed, "options": {}, "slots": None, "lrs": [0.1], "val_accuracy": accuracy, "compute": 1.0,
        "seconds": 60.0 + 60 * seed, "weights": "raw", "test_accuracy": accuracy, "test_loss": 1.0,
        "train_images_per_s": 500.0, "device": "cpu", "hardware": "a machine", "date": f"2026-01-0{seed + 1}", **changes,
    }  # fmt: skip


def test_rows_are_means_over_seeds_of_equal_settings() -> None:
    found = [outcome(0, 0.5), outcome(1, 0.7), outcome(0, 0.9, padding="reflect"), outcome(0, 0.6, policy="anchored")]
    rows = vgg16_report.summarise(found)
    by_seeds = {(row["policy"], row["padding"]): row for row in rows}
    assert len(by_seeds) == len(rows) == 3
    row = by_seeds["linear", "zero"]
    assert row["test_accuracy"] == pytest.approx([0.6, 0.1])
    assert (row["seeds"], row["training_minutes"], row["date"], row["hardware"]) == (2, 1.5, "2026-01-02", "a machine")
    assert {"dataset", "policy", "width", "epochs", "seeds", "test_accuracy", "train_images_per_s", "device",
            "training_minutes", "hardware", "date"} <= row.keys()  # fmt: skip


def test_the_table_names_both_controls(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished runs in"):
        vgg16_report.write_report(tmp_path, tmp_path)
    (tmp_path / "outcomes").mkdir()
    control = outcome(0, 0.4, policy="constant", peaks=[0.1, 0.3], tuned=True, weights="averaged")
    for i, found in enumerate([outcome(0, 0.5), control]):
        (tmp_path / "outcomes" / f"{i}.json").write_text(json.dumps(found))
    vgg16_report.write_report(tmp_path, tmp_path)
    text = (tmp_path / "vgg16_cifar.md").read_text()
    assert "| linear, untuned peak 0.1 | 50.00 ± 0.00 |" in text
    assert "| constant, averaged weights, best peak of 0.1, 0.3 | 40.00 ± 0.00 |" in text
    assert text.index("linear, untuned") < text.index("constant, averaged")


def test_rows_of_an_earlier_report_stay_until_they_are_run_again(tmp_path: Path) -> None:
    (tmp_path / "outcomes").mkdir()
    for accuracy, policy in ((0.5, "linear"), (0.6, "anchored"), (0.7, "linear")):
        (tmp_path / "outcomes" / "0.json").write_text(json.dumps(outcome(0, accuracy, policy=policy)))
        rows = vgg16_report.write_report(tmp_path, tmp_path)
    assert [(row["policy"], row["test_accuracy"][0]) for row in rows] == [("anchored", 0.6), ("linear", 0.7)]


def test_operations_are_those_of_the_convolutions_and_the_head() -> None:
    """Forward once, backward twice, but no gradient for the images."""
    model, side, macs, first = vgg16("cifar10"), 32, 0, 0
    for layer in model[1]:
        if isinstance(layer, nn.Conv2d):
            count = layer.weight.numel() * side * side
            macs, first = macs + count, first or count
        elif isinstance(layer, nn.MaxPool2d):
            side //= 2
    macs += model[-1].weight.numel()
    assert vgg16_step.flops_per_image("cifar10", 1.0) == pytest.approx(2 * (3 * macs - first), rel=1e-6)


def test_the_step_and_the_usual_pipeline_are_timed_side_by_side(data_dir: str) -> None:
    small = settings(data_dir)
    assert vgg16_step.step_rate(small, True, 1) > 0
    images, label = vgg16_step.usual_pipeline(small)[0]
    assert images.shape == (3, 32, 32)
    assert isinstance(label, int)
    assert vgg16_step.loader_rate(replace(small, autocast=True), 1, 0, torch.device("cpu")) > 0
    assert vgg16_step.batch_rate(small, 1) > 0
    assert vgg16_step.loader_batch_rate(small, 1, 0, torch.device("cpu")) > 0
    row = {"dataset": "cifar10", "width": 1.0, "device": "GPU", "hardware": "a GPU", "date": "2026-01-01"}
    shares = {"images_per_s": 1234.5, "tflops": 2.0, "share_of_peak": 0.25, "over_loader": 3.0}
    assert "| bfloat16 | 1234 | 2.000 | 25.0% | 3.00 |" in vgg16_report.step_section(
        [{**row, "variant": "bfloat16", **shares}]
    )
    for on_gpu, options in ((True, {False, True, "reduce-overhead"}), (False, {False, True})):
        assert {found.compile for found, _ in vgg16_step.variants(small, on_gpu).values()} == options
