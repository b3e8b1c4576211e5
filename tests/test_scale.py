"""The comparison at size, on little data: its tasks, rows that are killed and go on, and its tables."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.datasets.cifar

from autolrs_ray.core.policies import make_policy
from autolrs_ray.training.trainer import Trainer
from experiments import full_runs, scale, scale_tasks
from experiments.scale_report import write_report
from experiments.scale_tasks import ScaleTask, make_task
from tests.cifar_files import trusting, write_cifar

WIDTH = 0.5
"""Eight channels at least: with fewer, the gradient of a strided 1 x 1 convolution in channels_last ends the process on CPUs
without AVX-512 (oneDNN in torch 2.13)."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eighty modules of Python, and a test of theirs."""
    folder = tmp_path_factory.mktemp("library")
    source = inspect.getsource(inspect)
    for i in range(80):
        (folder / f"m{i}.py").write_text(f"# module {i}\n" + source[1000 * i : 1000 * i + 1000])
    (folder / "tests").mkdir()
    (folder / "tests" / "test_m.py").write_text(source)
    return str(folder)


def bytes_task(text: str, epochs: float = 1.0) -> ScaleTask:
    return make_task("bytes", text=text, width=0.125, epochs=epochs, val_windows=8, layers=1)


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_text_is_split_by_whole_files_and_targets_are_one_byte_on(text: str) -> None:
    files = scale_tasks.source_files(Path(text))
    assert sorted(path.name for part in files.values() for path in part) == sorted(f"m{i}.py" for i in range(80))
    assert all(files.values())
    splits = scale_tasks.byte_windows(text, 8)
    written = {name: b"".join(path.read_bytes() for path in part) for name, part in files.items()}
    for name, (inputs, targets) in splits.items():
        assert (inputs.dtype, inputs.shape[1]) == (torch.uint8, 256)
        assert all(bytes([*row.tolist(), int(last)]) in written[name]
                   for row, last in zip(inputs, targets[:, -1], strict=True))  # fmt: skip
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert len(splits["val"][0]) == 8
    with pytest.raises(ValueError, match="are under 5000 windows"):
        scale_tasks.byte_windows(text, 5000)


def test_the_model_of_bytes_has_two_million_parameters_and_sees_no_byte_ahead() -> None:
    model = scale_tasks.ByteModel()
    assert sum(p.numel() for p in model.parameters()) > 2_000_000
    small = scale_tasks.ByteModel(32, 1)
    one = torch.randint(0, 256, (2, 256), dtype=torch.uint8)
    other = one.clone()
    other[:, 100:] = 7
    assert torch.equal(small(one)[:, :100], small(other)[:, :100])
    assert not torch.equal(small(one)[:, 100:], small(other)[:, 100:])


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", trusting)
    write_cifar(tmp_path / "data")
    scale_tasks.load.cache_clear()
    return str(tmp_path / "data")


@pytest.mark.parametrize("name", ["finetune", "resnet", "cifar10", "cifar100"])
def test_the_image_tasks_train_on_what_they_say(name: str, data_dir: str, tmp_path: Path) -> None:
    few = {"tuned_images": 2, "pretraining_epochs": 1} if name == "finetune" else {}
    task = make_task(name, data_dir, str(tmp_path), width=WIDTH, epochs=3, train_images=260, val_images=40, **few)
    assert task.batch_size == (32 if name == "finetune" else 128)
    assert task.steps == 3 * (100 // 32 if name == "finetune" else 2)
    if name == "finetune":
        task.prepare(task.config)
        kept = Path(task.config["weights"]).read_bytes()
        task.prepare(task.config)  # once
        assert Path(task.config["weights"]).read_bytes() == kept
    trainer = task.trainer(0)
    assert len(trainer.train_data[0]) <= task.rows  # of some classes these files have fewer images
    before = trainer.evaluate(task.test(task.config))
    trainer.train(2, lambda step: 1e-3)
    assert trainer.evaluate(task.test(task.config)) != before


def test_fine_tuning_has_the_odd_classes_and_starts_from_the_even_ones_weights(data_dir: str, tmp_path: Path) -> None:
    task = make_task("finetune", data_dir, str(tmp_path), width=WIDTH, train_images=260, val_images=40, tuned_images=2,
                     pretraining_epochs=1)  # fmt: skip
    task.prepare(task.config)
    images, labels = scale_tasks.load("cifar100", task.config["data_dir"], 260, 40)["train"]
    known = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    trainer = task.trainer(0)
    tuned, classes = trainer.train_data
    assert all(known[image.numpy().tobytes()] == 2 * int(c) + 1 for image, c in zip(tuned, classes, strict=True))
    assert int(classes.bincount().max()) == 2
    before = torch.load(task.config["weights"], weights_only=True)
    assert torch.equal(trainer.model.state_dict()["stem.1.weight"], before["stem.1.weight"])
    assert not torch.equal(trainer.model.state_dict()["head.weight"], before["head.weight"])


def test_the_residual_network_is_resnet_20() -> None:
    assert sum(p.numel() for p in scale_tasks.ResNet("cifar10", 10).parameters()) == 272_474


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'mnist'"):
        make_task("mnist")


# -- rows --------------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_end(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = bytes_task(text)

    def run(folder: str) -> dict[str, Any]:
        return full_runs.full_run(
            lambda: task.trainer(0, averaging=True), lambda step: 1e-3, (2, 4, 6), tmp_path / folder, True
        )

    whole = run("whole")
    train, trained = Trainer.train, []

    def dies(self: Trainer, until: int, lr_at: Any) -> float:
        trained.append(until)
        if trained == [2, 4]:
            raise KilledError
        return train(self, until, lr_at)

    monkeypatch.setattr(Trainer, "train", dies)
    with pytest.raises(KilledError):
        run("killed")
    found = run("killed")
    assert trained == [2, 4, 4, 6]  # the first two steps were not trained again
    assert (found["curve"], found["val"]) == (whole["curve"], whole["val"])
    states = [torch.load(result["weights"], weights_only=True) for result in (whole, found)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert run("killed")["val"] == found["val"]
    assert len(trained) == 4


def test_the_lr_is_chosen_on_validation_data_and_a_second_seed_takes_it_over(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "MARKS", 2)
    task = replace(bytes_task(text, epochs=0.3), peaks=(1e-6, 1e-3, 1e3))
    arguments = scale.parse([])
    first, second = (scale.run_row(task, "linear, best of 3", seed, tmp_path, arguments) for seed in (0, 1))
    runs = {json.loads(file.read_text())["val"]["loss"] for file in tmp_path.glob("fixed/*-s0-*/run.json")}
    assert len(runs) == 3
    assert first["val"]["loss"] == min(loss for loss in runs if math.isfinite(loss))
    assert (first["lr"], first["compute"], second["lr"], second["compute"]) == (1e-3, 3.0, 1e-3, 3.0)
    assert len(list(tmp_path.glob("fixed/*-s1-*"))) == 1
    assert [curve["chosen"] for curve in first["curves"]] == [False, True, False]
    averaged = scale.run_row(task, "constant + averaged weights, best of 2", 0, tmp_path, arguments)
    assert averaged["weights"] == "averaged"
    monkeypatch.setattr(Trainer, "train", lambda *args: pytest.fail("trained again"))
    assert scale.run_row(task, "linear, best of 3", 0, tmp_path, arguments) == json.loads(json.dumps(first))


def test_further_seeds_come_after_all_rows_of_the_first(text: str) -> None:
    plan = [(method, seed) for _, method, seed in scale.planned([bytes_task(text)], list(scale.ROWS), 2)]
    assert plan[: len(scale.ROWS)] == [(method, 0) for method in scale.ROWS]
    tuned = [method for method in scale.ROWS if "best of" in method]
    assert plan[len(scale.ROWS) :] == [("anchored", 1), *((method, 1) for method in tuned)]
    other = replace(bytes_task(text), name="resnet")
    assert {method for _, method, _ in scale.planned([other], list(scale.ROWS), 1)} == {
        method for method in scale.ROWS if "batch" not in method
    }


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_policy_trains_through_ray(text: str, tmp_path: Path) -> None:
    arguments = scale.parse(["--slots", "2", "--gpus-per-trial", "0"])
    anchored = scale.run_row(bytes_task(text, epochs=0.5), "anchored", 0, tmp_path, arguments)
    assert [curve["chosen"] for curve in anchored["curves"]].count(True) == 1
    assert all(curve["points"] for curve in anchored["curves"])
    assert anchored["compute"] > 1.0
    assert anchored["test"].keys() == anchored["val"].keys() == {"loss", "accuracy"}


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_the_papers_policy_has_five_stages_and_the_interval_of_the_task(epochs: int, text: str) -> None:
    task = bytes_task(text, epochs)
    policy: Any = make_policy("paper", task.steps, **scale.ROWS["paper"].options(task))
    assert len(policy.plan.stages()) == 5
    assert policy.lr_interval == (1e-4, 1e-2)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_table_has_the_comparisons_columns_and_names_what_was_not_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "MARKS", 2)
    task, out = bytes_task(text, epochs=0.3), tmp_path / "runs"
    untuned = scale.run_row(task, "linear, untuned", 0, out, scale.parse([]))
    race = {**untuned, "method": "anchored", "test": {"loss": untuned["test"]["loss"] - 0.5, "accuracy": 0.25}}
    for seed in (0, 1):
        (out / "outcomes" / f"anchored-{seed}.json").write_text(
            json.dumps({**race, "seed": seed, "hardware": f"machine {seed}"})
        )
    scale.main(["--report", "--out", str(out), "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "scale.json").read_text())
    assert [(row["method"], row["seeds"], row["interval_decades"]) for row in rows] == [
        ("anchored", 2, 6),
        ("linear, untuned", 1, None),
    ]
    assert rows[1]["minus_anchored"] == pytest.approx([0.5, 0.0])
    assert rows[0]["hardware"] == "machine 0; machine 1"
    compare = json.loads(Path(scale.__file__).with_name("results").joinpath("compare.json").read_text())
    wanted = {"epochs", "width", "images_per_s", "hardware", *compare[0]}
    assert all(wanted <= row.keys() for row in rows)
    table = (tmp_path / "scale.md").read_text()
    assert f"; machine 0; machine 1; {untuned['hardware']}; " in table
    assert "| linear, best of 3 | not run yet |" in table
    rest = " ".join(f'"{method}"' for method in scale.ROWS if method not in ("anchored", "linear, untuned"))
    assert f"--tasks bytes --rows {rest}`" in table
    assert "`python -m experiments.scale --data DIR --tasks cifar10`" in table
    assert (tmp_path / "scale.png").stat().st_size > 0
    (out / "outcomes" / "anchored-1.json").unlink()  # another machine's rows stay beside those that are made anew
    for file in out.glob("outcomes/bytes-*"):
        file.unlink()
    scale.main(["--report", "--out", str(out), "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "scale.json").read_text())
    assert {(row["method"], row["seeds"]) for row in rows} == {("anchored", 1), ("linear, untuned", 1)}


def test_without_a_finished_row_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished rows"):
        write_report(tmp_path, tmp_path, {})
