"""What is trained, as the record knows it: the same in every process, another for every other code, value and config."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle, tune
from ray.tune.trainable.function_trainable import wrap_function

from autolrs_ray import TrainingTask, trainable_for
from autolrs_ray.driver.identity import changes, refuse_search_spaces, search_spaces, subject
from autolrs_ray.record.journal import opened, sealed

SCALE = 3


def scaled(x: int) -> int:
    return x * SCALE


def builder(width: int) -> Callable[[dict[str, Any]], TrainingTask]:
    def build(config: dict[str, Any]) -> TrainingTask:
        raise NotImplementedError(scaled(width))

    return build


def another(width: int) -> Callable[[dict[str, Any]], TrainingTask]:
    def build(config: dict[str, Any]) -> TrainingTask:
        raise NotImplementedError(width, "another")

    return build


def function(config: dict[str, Any]) -> None:
    tune.report({"step": scaled(1)})


class Model(tune.Trainable):
    width = 4

    def setup(self, config: dict[str, Any]) -> None:
        super().setup(config)
        self.names = {"a", "b", "c"}


TRAINABLES: dict[str, Callable[[], type]] = {
    "build": lambda: trainable_for(builder(8)),
    "build, wider": lambda: trainable_for(builder(9)),
    "another build": lambda: trainable_for(another(8)),
    "function": lambda: wrap_function(function),
    "class": lambda: Model,
    "class of another width": lambda: type("Model", (tune.Trainable,), {**vars(Model), "width": 5}),
}


def test_every_other_trainable_has_another_digest_and_a_copy_has_the_same() -> None:
    codes = {}
    for name, make in TRAINABLES.items():
        found = subject(make(), {})
        passed_on = cloudpickle.loads(cloudpickle.dumps(make()))  # as Tune hands it on
        assert subject(passed_on, {}) == found, name
        codes[name] = found["code"]
    assert len(set(codes.values())) == len(codes)
    names = [subject(make(), {})["trainable"] for make in TRAINABLES.values()]
    assert names == ["builder.<locals>.build"] * 2 + ["another.<locals>.build", "function", "Model", "Model"]


def test_what_a_trial_asks_for_does_not_count() -> None:
    made = trainable_for(builder(8))
    for trainable, wrapped in ((Model, Model), (function, wrap_function(function)), (made, made)):
        asking = tune.with_resources(trainable, {"cpu": 1})
        asking = asking if isinstance(asking, type) else wrap_function(asking)
        assert subject(asking, {}) == subject(wrapped, {})


def test_a_constant_around_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = subject(trainable_for(builder(8)), {})["code"]
    monkeypatch.setattr(f"{__name__}.SCALE", 4)
    assert subject(trainable_for(builder(8)), {})["code"] != before


def test_it_is_the_same_in_another_process() -> None:
    script = "import tests.test_identity as t\nprint(*[t.subject(make(), {'a': {'x', 'y'}}) for make in t.TRAINABLES.values()])"
    root = Path(__file__).parent.parent
    seen = {
        subprocess.run([sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                       capture_output=True, text=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"width": 8}, []),
        ({"lr": 0.1, "autolrs": "t00", "width": 8}, []),
        ({"width": 64}, ["config width: 8 -> 64"]),
        ({}, ["config width: 8 -> None"]),
        ({"width": 8, "data": np.zeros(3)}, ['config data: None -> "array (3,) of float64']),
        ({"width": 8, "nested": {"a": [1, 2.0]}}, ['config nested.a: None -> [1, "2.0"]']),
    ],
)
def test_a_config_that_differs_is_told_by_key(config: dict[str, Any], told: list[str]) -> None:
    found, code = changes(subject(Model, config), subject(Model, {"width": 8}))
    assert not code
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))


def test_arrays_and_tensors_count_by_their_values() -> None:
    assert subject(Model, {"x": torch.ones(3)}) == subject(Model, {"x": torch.ones(3)})
    assert subject(Model, {"x": torch.ones(3)}) != subject(Model, {"x": torch.zeros(3)})
    assert subject(Model, {"x": object()}) == subject(Model, {"x": object()})  # nothing is known of it


@dataclass
class Settings:
    width: int = 8
    more: dict[str, Any] = field(default_factory=dict)


Kind = Enum("Kind", "A B")
CHOSEN: Any = None


def by_global(config: dict[str, Any]) -> None:
    tune.report({"step": CHOSEN})


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Settings(8), Settings(9)),
        (Settings(8, {"a": [1]}), Settings(8, {"a": [2]})),
        (Namespace(width=8), Namespace(width=9)),
        (SimpleNamespace(width=8), SimpleNamespace(width=9)),
        (Path("/data/a"), Path("/data/b")),
        (Kind.A, Kind.B),
        (b"a", b"b"),
        (1j, 2j),
        (1 << 1100, 1 << 1101),
        (range(3), range(4)),
        (torch.float32, torch.bfloat16),
        (date(2026, 1, 1), date(2026, 1, 2)),
        ({"width": 8}, {"width": 9}),
        ([1, {"a": (2,)}], [1, {"a": (3,)}]),
    ],
)
def test_plain_values_of_any_kind_count_in_config_and_around_the_code(
    one: Any, two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (told,), _ = changes(subject(Model, {"x": one}), subject(Model, {"x": two}))
    assert told.startswith("config x")
    assert changes(subject(Model, {"x": one}), subject(Model, {"x": copy.deepcopy(one)})) == ([], False)
    codes = []
    for value in (one, copy.deepcopy(one), two):
        monkeypatch.setattr(f"{__name__}.CHOSEN", value)
        codes.append(subject(wrap_function(by_global), {})["code"])
    assert codes[0] == codes[1] != codes[2]


def test_long_lists_count_and_what_holds_itself_is_read_to_an_end() -> None:
    long: list[Any] = list(range(20_000))
    assert changes(subject(Model, {"x": long}), subject(Model, {"x": long[::-1]}))[0]
    around: dict[str, Any] = {"a": 1}
    around["self"] = around
    assert search_spaces(around) == []
    assert changes(subject(Model, {"x": around}), subject(Model, {"x": {"a": 2, "self": around}}))[0]


@pytest.mark.parametrize("bits", [53, 1023, 1024, 20_000])
def test_a_whole_number_of_any_size_can_be_written_and_read_again(bits: int) -> None:
    event = {"event": "start", "subject": subject(Model, {"x": [1 << bits, {"y": -(1 << bits)}]})}
    assert opened(sealed(event)) == event


def test_another_trainable_and_another_python_are_told_apart() -> None:
    one, two = subject(Model, {}), subject(wrap_function(function), {})
    assert changes(two, one) == (["trainable: Model -> function"], True)
    assert changes({**two, "python": "2.7"}, one)[1] is False  # its bytecode says nothing


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (tune.loguniform(1e-3, 1), r"config\['wd'\] = Float \(0.001, 1\)"),
        (tune.choice(["sgd", "adam"]), r"config\['wd'\] = Categorical \['sgd', 'adam'\]"),
        (tune.randint(1, 9), r"config\['wd'\] = Integer \(1, 9\)"),
        (tune.sample_from(lambda spec: 1), r"config\['wd'\] = Function"),
        (tune.grid_search([1, 2]), r"config\['wd'\] = tune.grid_search\(\[1, 2\]\)"),
        ({"deep": [0, {"er": tune.uniform(0, 1)}]}, r"config\['wd'\]\['deep'\]\[1\]\['er'\] = Float \(0, 1\)"),
    ],
)
def test_a_search_space_anywhere_is_refused_by_key_and_value(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told + ".*only the learning rate is searched for"):
        refuse_search_spaces({"lr": tune.loguniform(1e-3, 1), "batch": 32, "wd": value})


def test_what_is_no_search_space_passes() -> None:
    assert search_spaces({"grid_search": 1, "other": 2, "list": [1, (2, {"a": None})], "f": len}) == []
