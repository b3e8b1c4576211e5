"""A Ray that lacks private places: each has a fall-back, and nothing else in the package reaches past Ray's interface."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune import Checkpoint

import autolrs_ray
from autolrs_ray import AutoLRSTrainable, private
from autolrs_ray.driver import coordinator
from tests.tasks import build_tiny

PACKAGE = Path(autolrs_ray.__file__).parent


class PlainController:
    """A controller of a Ray without anything private."""


def plain_trial(**fields: Any) -> Any:
    return SimpleNamespace(
        trial_id="a", last_result={"training_iteration": 3, "time_total_s": 1.5, "lr": 1.0}, **fields
    )


IDLE = type("Idle", (AutoLRSTrainable,), {})
PLACES: dict[str, tuple[Callable[[], Any], Any]] = {
    "the controller itself": (lambda: type(private.controller_of(PlainController())), PlainController),
    "actor caches": (lambda: private.keep_actors_warm(PlainController(), None, 2, 2), False),
    "idle workers": (lambda: private.use_idle_workers(PlainController(), IDLE), False),
    "actors being made": (lambda: private.starting_actor(PlainController(), plain_trial()), None),
    "the running actor": (lambda: private.actor_of(plain_trial()), None),
    "saves of running trials": (lambda: private.saver_of(PlainController()), None),
    "a trial's status": (lambda: private.set_status(PlainController(), plain_trial(), "TERMINATED"), False),
    "what a trial waits for": (lambda: private.unstage(PlainController(), plain_trial()), False),
    "which checkpoints are kept": (lambda: private.checkpoints_kept(plain_trial()), None),
    "windows of metrics": (lambda: private.drop_windows(plain_trial()), None),
    "pickled by Ray": (lambda: private.sent_by_ray(), False),
    "the autoscaler's state": (lambda: private.nodes_starting(), None),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_without_it_there_is_a_plainer_way(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ray.tune.execution.class_cache", "ray._private.worker", "ray._private.ray_constants"):
        monkeypatch.setitem(__import__("sys").modules, module, None)  # an import of it fails
    call, expected = PLACES[place]
    assert call() == expected


def test_every_place_is_among_those_taken_away() -> None:
    tree = ast.parse((PACKAGE / "private.py").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    tried = {name for call, _ in PLACES.values() for name in call.__code__.co_names}
    assert functions - tried == {"set_source"}  # which has tests of its own


PAST = re.compile(r"controller\._|run_metadata|temporary_state|ray\._private|ray\S*\._internal|_tune_controller")


def test_nothing_else_reaches_past_rays_interface() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        lines = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Attribute, ast.ImportFrom))]
        if file.name != "private.py":
            found += [(file.name, line) for line in lines if PAST.search(line)]
    assert found == []


class Manager:
    """Where Tune keeps a trial's checkpoint."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class FakeTrial:
    """A trial as Tune's, which finds its checkpoint in `where` of its manager."""

    def __init__(self, where: str, registers: bool = True) -> None:
        self.run_metadata = SimpleNamespace(checkpoint_manager=Manager(**{where: None}))
        self.last_result = {"training_iteration": 3, "lr": 1.0}
        self._where, self._registers = where, registers

    def on_checkpoint(self, result: Any) -> None:
        if self._registers:
            setattr(self.run_metadata.checkpoint_manager, self._where, result)

    @property
    def checkpoint(self) -> Checkpoint | None:
        found = getattr(self.run_metadata.checkpoint_manager, self._where)
        return found and found.checkpoint


@pytest.mark.parametrize("where", ["_latest_checkpoint_result", "another_place"])
def test_a_trial_starts_from_the_checkpoint_it_is_given(where: str, tmp_path: Path) -> None:
    trial: Any = FakeTrial(where)
    private.set_source(trial, None, {})
    private.set_source(trial, Checkpoint.from_directory(tmp_path), {"step": 20})
    found = getattr(trial.run_metadata.checkpoint_manager, where)
    assert (found.checkpoint.path, found.metrics) == (str(tmp_path), {"training_iteration": 3, "step": 20})


@pytest.mark.parametrize("gone", ["the manager", "the result's class", "the registration"])
def test_a_trial_that_cannot_start_from_its_checkpoint_is_refused(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial: Any = FakeTrial("another_place", registers=gone != "the registration")
    if gone == "the manager":
        trial = plain_trial(checkpoint=None)
    if gone == "the result's class":
        monkeypatch.setitem(__import__("sys").modules, "ray.train._internal.checkpoint_manager", None)
    private.set_source(trial, None, {})
    with pytest.raises(RuntimeError, match=r"does not let AutoLRS start a trial from a checkpoint of its choice"):
        private.set_source(trial, Checkpoint.from_directory(tmp_path), {"step": 20})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("policy", [pytest.param("paper", marks=pytest.mark.slow), "anchored"])
def test_a_run_without_any_of_them_ends_as_one_with_all(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(policy=policy, num_lrs=2, lr_interval=(1e-2, 1.0), slots=2, progress=False)
    if policy == "paper":
        options |= dict(stage_steps=30, max_stage_steps=30)
    results = []
    for name in ("with", "without"):
        results.append(autolrs_ray.run(build_tiny, 60, storage_path=tmp_path, name=name, **options))
        for place, otherwise in (("saver_of", None), ("starting_actor", None), ("drop_windows", None),
                                 ("use_idle_workers", False), ("set_status", False)):  # fmt: skip
            monkeypatch.setattr(coordinator, place, lambda *_, otherwise=otherwise, **__: otherwise)
        monkeypatch.setattr("autolrs_ray.driver.elastic.keep_actors_warm", lambda *_, **__: False)
        monkeypatch.setattr("autolrs_ray.driver.keeper.actor_of", lambda trial: None)
    rows = [[(row["end"], row["lr"], row["loss"]) for row in result.rows] for result in results]
    assert results[1].done
    assert rows[0] == rows[1]
