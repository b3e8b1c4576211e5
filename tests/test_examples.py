"""The examples of jobs on a cluster, each on a little real data: pictures of digits, numbers in two languages, a manual."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer

from autolrs_ray import Trainer
from experiments import bert, resnet_imagefolder, translation

ONES = {
    "en": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
    "de": "ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn",
}
TENS = {
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
    "de": "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
}


def number(n: int, language: str) -> str:
    """0 < n < 100 in words; German says the units first."""
    ones, tens = ONES[language].split(), TENS[language].split()
    if n < 20:
        return ones[n - 1] + ("s" if n == 1 and language == "de" else "")
    ten, one = tens[n // 10 - 2], n % 10
    if not one:
        return ten
    return f"{ten}-{ones[one - 1]}" if language == "en" else f"{ones[one - 1]}und{ten}"


def write_pictures(folder: Path) -> str:
    """Digits 0 and 1 as 16 x 16 pictures: 40 to train on and choose by, 10 for the test."""
    digits = load_digits()
    for label in (0, 1):
        images = digits.images[digits.target == label][:25]
        for i, image in enumerate(images):
            path = folder / ("train" if i < 20 else "val") / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.kron(image * 15, np.ones((2, 2))).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(path)
    return str(folder)


def write_numbers(folder: Path) -> str:
    for language in ("en", "de"):
        lines = [f"{number(1 + i % 99, language)} {number(1 + 7 * i % 99, language)}" for i in range(200)]
        (folder / f"numbers.{language}").write_text("\n".join(lines), "utf-8")
    return str(folder / "numbers")


def write_manual(folder: Path) -> str:
    (folder / "manual.txt").write_text(topics["assignment"] + topics["class"], "utf-8")
    return str(folder)


JOBS: dict[str, tuple[Any, Callable[[Path], str], list[str]]] = {
    "resnet_imagefolder": (resnet_imagefolder, write_pictures, ["--model", "resnet18", "--size", "16", "--held-out", "4"]),
    "translation": (translation, write_numbers, ["--vocabulary", "300", "--length", "24", "--width", "32", "--layers", "1",
                                                 "--held-out", "20"]),
    "bert": (bert, write_manual, ["--vocabulary", "300", "--length", "16", "--width", "32", "--layers", "1",
                                  "--held-out", "10"]),
}  # fmt: skip


STEADY = {"resnet_imagefolder": 0.02, "translation": 3e-3, "bert": 3e-3}
COMMON = ["--epochs", "4", "--batch-size", "16", "--gpus", "0"]


@pytest.mark.parametrize("name", JOBS)
def test_each_job_learns_from_real_data(name: str, tmp_path: Path) -> None:
    job, write, options = JOBS[name]
    config = job.config_of(job.parser().parse_args(["--data", write(tmp_path), "--storage", "runs", *COMMON, *options]))
    trainer = Trainer(lambda: job.build(config), averaging=True)
    assert trainer.task.autocast
    first, _, last = (trainer.train(until, lambda step: STEADY[name]) for until in (4, 8, 12))
    assert last < first
    assert trainer.evaluate() == trainer.evaluate()  # the same rows, masked and cropped in the same way
    again = Trainer(lambda: job.build(config), averaging=True)
    assert again.train(4, lambda step: STEADY[name]) == first


@pytest.mark.parametrize("name", ["translation", "bert"])
def test_a_job_that_is_submitted_again_trains_on_the_same_tokens(name: str, tmp_path: Path) -> None:
    job, write, options = JOBS[name]
    given = ["--data", write(tmp_path), "--storage", "runs", *COMMON, *options]
    first, again = (job.config_of(job.parser().parse_args(given)) for _ in range(2))
    assert first == again
    (path,) = (Path(value) for value in first.values() if str(value).endswith(".pt"))
    before = path.stat().st_mtime_ns
    assert job.config_of(job.parser().parse_args([*given, "--vocabulary", "310"])) != first
    assert path.stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*.part"))


def test_data_that_a_job_cannot_use_is_named_before_it_trains(tmp_path: Path) -> None:
    write_numbers(tmp_path), write_pictures(tmp_path)
    with (tmp_path / "numbers.de").open("a", encoding="utf-8") as file:
        file.write("\neins\u2028zwei\n")  # a line of its own, and no two
    with pytest.raises(ValueError, match=r"numbers.en has 200 lines and \S*numbers.de 201: they are read in pairs"):
        translation.sentences(tmp_path / "numbers.en", tmp_path / "numbers.de")
    assert resnet_imagefolder.test_images({"data": str(tmp_path), "size": 16}).classes == ["0", "1"]
    (tmp_path / "val" / "1").rename(tmp_path / "val" / "2")
    with pytest.raises(ValueError, match=r"must have the same folders, one for each class: see \['1', '2'\]"):
        resnet_imagefolder.test_images({"data": str(tmp_path), "size": 16})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_job_runs_on_the_cluster_and_tests_its_final_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = JOBS["resnet_imagefolder"][2]
    resnet_imagefolder.main(
        ["--data", write_pictures(tmp_path), "--storage", str(tmp_path / "runs"), *COMMON, *options]
    )
    found, test = capsys.readouterr().out.splitlines()
    assert json.loads(found)["done"]
    assert np.isfinite(json.loads(found)["loss"])
    assert Path(json.loads(found)["checkpoint"]).is_dir()
    assert test.startswith("test: {'loss':")


def test_text_is_encoded_without_loss_of_pairs_and_masked_where_it_is_asked_for(tmp_path: Path) -> None:
    write_numbers(tmp_path), write_manual(tmp_path)
    texts = translation.sentences(tmp_path / "numbers.en", tmp_path / "numbers.de")
    found = translation.encode(*texts, vocabulary=300, length=24)
    assert found["source"].shape == (200, 24)
    assert found["target"].shape == (200, 25)
    assert (found["target"][:, 0] == translation.BEGIN).all()
    assert ((found["target"] == translation.END).sum(1) == 1).all()
    read = Tokenizer.from_str(found["tokenizer"])
    assert read.encode(texts[0][7]).ids == [token for token in found["source"][7].tolist() if token != translation.PAD]
    with pytest.raises(ValueError, match="no pair of sentences has at most 2 tokens"):
        translation.encode(*texts, vocabulary=300, length=2)
    encoded = bert.encode([str(tmp_path / "manual.txt")], 300)
    words = {number: word for word, number in encoded["words"].items()}
    begin = "".join(words[int(token)].removeprefix("##") for token in encoded["tokens"][:40])
    assert begin.startswith("assignmentstatements")
    windows = encoded["tokens"][:640].view(10, 64)
    tokens, targets = bert.Masked(windows, torch.tensor([3]), 300)[0]
    asked = targets != bert.IGNORED
    assert int(asked.sum()) == 10
    assert torch.equal(targets[asked], windows[3][asked].long())
    assert torch.equal(tokens[~asked], windows[3][~asked].long())
    assert (tokens[asked] == bert.MASK).any()
    with pytest.raises(FileNotFoundError, match=r"no \*\.txt files"):
        bert.config_of(bert.parser().parse_args(["--data", str(tmp_path / "none"), "--storage", "runs"]))
