"""A run goes on under the settings that it was begun with, whatever this version's defaults are, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autolrs_ray import AutoLRSSearch
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point, Verdict
from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.driver import settings
from autolrs_ray.record.journal import read_journal

PAPER: dict[str, Any] = dict(policy="paper", stage_steps=50, num_lrs=3)


def opened(folder: Path, total_steps: int = 400, **options: Any) -> AutoLRSSearch:
    search = AutoLRSSearch(total_steps, resume="auto", **options)
    search.desk.plan_for(1)
    search.desk.open_record(folder)
    return search


def train(search: AutoLRSSearch, segments: int) -> None:
    """Train the first `segments` segments that are wanted, or all there are; the best LR is .1."""
    policy = search.desk.policy
    for _ in range(segments):
        if policy.done:
            break
        (segment, *_) = policy.wanted()
        policy.issue(segment.arm)
        for step in segment.boundaries:
            verdict = policy.report(segment.arm, Point(step, 1.0 + abs(segment.lr - 0.1) / step))
            if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
                policy.saved(segment.arm, step, f"{segment.arm}@{step}")
            if verdict not in (Verdict.CONTINUE, Verdict.SAVE):
                break
        policy.withdraw(segment.arm)
    search.desk.persist()
    search.close()


def decisions(folder: Path) -> list[dict[str, Any]]:
    kept = [event for event in read_journal(folder) if event["event"] in ("commit", "rung", "probe", "decision")]
    return [{key: value for key, value in event.items() if key not in ("time", "line")} for event in kept]


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other defaults, and other rungs."""
    later: dict[str, dict[str, Any]] = {"anchored": dict(warmup=0.05, commits=3, num_lrs=7),
                                        "paper": dict(kappa=9.0, initial="random", probe_steps=9, promote=False)}  # fmt: skip

    def made(name: str, total: int, interval: Any, seed: int, slots: int, **options: Any) -> Any:
        return make_policy(name, total, interval or (0.5, 0.7), seed, slots, **{**later[name], **options})

    of = RacePlan.of
    monkeypatch.setattr(settings, "make_policy", made)
    monkeypatch.setattr(RacePlan, "of", lambda total, **rule: of(total, (0.3, 1.0), **rule))
    monkeypatch.setattr(settings, "DEFAULT_INTERVALS", dict.fromkeys(("paper", "anchored"), (0.5, 0.7)))


@pytest.mark.parametrize("given", [{}, PAPER])
@pytest.mark.usefixtures("undamaged")
def test_the_record_holds_every_option_as_it_was_resolved(given: dict[str, Any], tmp_path: Path) -> None:
    opened(tmp_path, **given).close()
    config = read_journal(tmp_path)[0]["config"]
    policy = make_policy(given.get("policy", "anchored"), 400, **{k: v for k, v in given.items() if k != "policy"})
    values = {**vars(policy), **vars(policy.plan), "batch_growth": None}  # type: ignore[attr-defined]
    assert config["options"] == {name: values[name] for name in config["options"]}
    assert {"num_lrs", "envelope"} <= config["options"].keys()
    assert config["given"] == sorted(given.keys() - {"policy"})
    assert config["lr_interval"] == list(policy.lr_interval)  # type: ignore[attr-defined]
    assert (config["rule"] is None) == bool(given)


@pytest.fixture
def undamaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that are names only."""
    monkeypatch.setattr("autolrs_ray.driver.stored.Stored.damage", lambda self, path: "")


@pytest.mark.parametrize("given", [{}, PAPER], ids=["anchored", "paper"])
@pytest.mark.usefixtures("undamaged")
def test_a_run_goes_on_under_its_own_rule_in_a_version_with_other_defaults(
    given: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole, parted = opened(tmp_path / "whole", **given), opened(tmp_path / "parted", **given)
    described = whole.desk.settings.describe()
    train(parted, 4)
    train(whole, 8)
    request.getfixturevalue("next_version")
    for _ in range(2):  # and again: what was taken over is not what was given
        again = opened(tmp_path / "parted", **given)
        assert again.desk.settings.describe() == described
        if _:
            break
        again.close()
    train(again, 4)
    ours, theirs = (
        [e for e in read_journal(tmp_path / name) if e["event"] != "resume"] for name in ("parted", "whole")
    )
    drop = ("time", "line")
    assert [{k: v for k, v in e.items() if k not in drop} for e in ours if e["event"] == "commit"] == [
        {k: v for k, v in e.items() if k not in drop} for e in theirs if e["event"] == "commit"
    ]


@pytest.mark.usefixtures("undamaged")
def test_what_is_given_otherwise_or_no_longer_is_refused_by_name(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    opened(tmp_path, warmup=0.3).close()
    for options, message in (
        ({}, r"warmup: 0.3 -> 0.2\)"), ({"warmup": 0.4}, r"\(warmup: 0.3 -> 0.4\)"),
        ({"warmup": 0.3, "commits": 4}, r"\(commits: 10 -> 4\)"),
        ({"warmup": 0.3, "total_steps": 500}, "total_steps: 400 -> 500"),
        ({"warmup": 0.3, "lr_interval": (1e-3, 1.0)}, r"lr_interval: \[1e-05, 10.0\] -> \[0.001, 1.0\]"),
        (PAPER, r"\(policy: 'anchored' -> 'paper'\)"), ({"warmup": 0.3, "seed": 2}, r"\(seed: 0 -> 2\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot resume the run in {tmp_path} with other settings.*{message}"):
            opened(tmp_path, **options)
    opened(tmp_path, warmup=0.3, commits=10).close()  # what it was anyway
    request.getfixturevalue("next_version")
    with pytest.raises(ValueError, match=r"\(warmup: 0.3 -> 0.05, commits: 10 -> 3\)"):
        opened(tmp_path)


@pytest.mark.parametrize("late", [False, True])
def test_an_option_that_follows_from_the_mode_is_resolved_by_it_whenever_it_is_told(late: bool) -> None:
    search = AutoLRSSearch(400, **PAPER, **({} if late else {"mode": "max"}))
    search.desk.take_metric("val_accuracy", "max")
    assert search.desk.settings.describe()["options"]["floor"] is None


def test_an_option_that_this_version_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    search = AutoLRSSearch(400)
    theirs = search.desk.settings.describe()
    theirs["options"]["tolerances"] = [0.1]
    assert search.desk.settings.adopt(json.loads(json.dumps(theirs))) == {"tolerances": ([0.1], None)}


@pytest.mark.parametrize("given", [{}, PAPER], ids=["anchored", "paper"])
def test_another_function_as_the_envelope_is_refused_by_what_it_gives(given: dict[str, Any], tmp_path: Path) -> None:
    opened(tmp_path, **given, envelope=lambda step: 1.0 - step / 800).close()
    opened(tmp_path, **given, envelope=lambda step: 1.0 - step / 800).close()
    with pytest.raises(ValueError, match=r"envelope: 'function <lambda>: 1, .*' -> '.*: 0.25, 0.25, "):
        opened(tmp_path, **given, envelope=lambda step: 0.25)


def test_a_function_that_was_recorded_by_its_name_alone_goes_on(tmp_path: Path) -> None:
    search = AutoLRSSearch(400, envelope=lambda step: 0.25)
    theirs = search.desk.settings.describe()
    assert theirs["options"]["envelope"].startswith("function <lambda>: 0.25")
    theirs["options"]["envelope"] = "function <lambda>"
    assert search.desk.settings.adopt(theirs) == {}
    theirs["options"]["envelope"] = "function other"
    assert search.desk.settings.adopt(theirs).keys() == {"envelope"}
