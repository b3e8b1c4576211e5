"""Journals of another making: a line whose checksum fits may say anything, and every command ends in one line or does well."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from autolrs_ray import LearnedSchedule, RunResult
from autolrs_ray.cli import app
from autolrs_ray.core.events import Event
from autolrs_ray.core.policies import make_policy
from autolrs_ray.outcome.history import History
from autolrs_ray.record.journal import JOURNAL_FILE, RecordWarning, sealed
from tests.simulation import Simulation

PAPER: dict[str, Any] = dict(
    stage_steps=20, max_stage_steps=40, probe_steps=5, num_lrs=3, warmup_steps=10, warmup_lr=0.1
)


def journal_of(policy: str, **options: Any) -> list[dict[str, Any]]:
    """The events of a small run, as the pair writes them."""
    events = Simulation(make_policy(policy, 100, (1e-3, 1.0), **options)).run().events
    config = dict(total_steps=100, policy=policy, lr_interval=[1e-3, 1.0], metric="val_loss", mode="min", time_attr="step",
                  train_metric="train_loss", averaged_metric="averaged_loss", seed=0, options=options, slots=None)  # fmt: skip
    arm = next(event.get("arm", "main") for event in events if event["event"] == "done")
    segment = dict(event="segment", arm=arm, role="main", stage=0, lr=0.1, start=0, end=20, began=1001.0, busy_s=1.0)
    packages = {"torch": "2.13.0"}
    start = dict(
        event="start", config=config, environment=dict(python="3.11", cpus=2, packages=packages, gpu_types=["H100"])
    )
    resume = dict(event="resume", step=20, environment={})
    rollback = dict(event="rollback", stage=0, step=5, lr=0.5, new_lr=0.1)
    extra = [resume, rollback] if policy == "paper" else [resume]
    return [
        {"time": 1000.0 + i, **event, "line": i}
        for i, event in enumerate([start, segment, *json.loads(json.dumps(events)), *extra])
    ]


JOURNALS = {"paper": journal_of("paper", **PAPER), "anchored": journal_of("anchored", num_lrs=4)}


def write(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / JOURNAL_FILE).write_text("".join(sealed(event) + "\n" for event in events))
    return folder


HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 10**15, 2**63, 10**400, -(10**15), 0.5, 1e300, -1e300, 1e-320, "", "x", "t00", "main", "[/b]", "$x_{",
    "\x1b[31m", "a\nb", [], [1], ["x"], [[]], [None], {}, {"x": 1}, "../../x", "./x", "s3://b/x",
]  # fmt: skip


@st.composite
def crafted(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A journal with one to three values replaced, left out, or put somewhere else."""
    events = copy.deepcopy(JOURNALS[draw(st.sampled_from(sorted(JOURNALS)))])
    for _ in range(draw(st.integers(1, 3))):
        event = events[draw(st.integers(0, len(events) - 1) | st.just(0))]
        while (inner := [key for key in sorted(event) if isinstance(event[key], dict) and event[key]]) and draw(
            st.booleans()
        ):
            event = event[draw(st.sampled_from(inner))]
        key = draw(st.sampled_from(sorted(event)))
        act = draw(st.sampled_from(["replace", "replace", "replace", "delete", "repeat", "move"]))
        if act == "replace":
            event[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif act == "delete":
            del event[key]
        elif act == "repeat":
            events.insert(
                draw(st.integers(0, len(events))), copy.deepcopy(events[draw(st.integers(0, len(events) - 1))])
            )
        else:
            events.insert(draw(st.integers(0, len(events) - 1)), events.pop(draw(st.integers(0, len(events) - 1))))
        if not event:
            break
    return events


def ends_in_a_line(*arguments: str) -> None:
    """The command does well, or says on one line why not; what is wrong with the journal is told on lines of its own."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    said = [line for line in result.stderr.splitlines() if not line.startswith("autolrs: warning:")]
    assert (result.exit_code, len(said)) in ((0, 0), (1, 1)), (arguments, result.exit_code, said)


@settings(deadline=None, max_examples=100)
@given(crafted())
def test_a_crafted_journal_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]]
) -> None:
    folder = str(write(tmp_path_factory.getbasetemp() / "crafted", events))
    for command in (["show"], ["show", "--json"], ["export"], ["export", "--format", "csv", "--every", "7"]):
        ends_in_a_line(*command, folder)


@settings(deadline=None, max_examples=8)
@given(crafted())
def test_a_crafted_journal_is_drawn_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]]
) -> None:
    folder = str(write(tmp_path_factory.getbasetemp() / "drawn", events))
    for command in ("report", "tensorboard"):
        ends_in_a_line(command, folder)


@pytest.mark.parametrize("policy", sorted(JOURNALS))
def test_what_no_version_has_written_is_left_out_and_the_rest_is_read(policy: str, tmp_path: Path) -> None:
    events = copy.deepcopy(JOURNALS[policy])
    whole = RunResult.of(History.of(events))
    strangers: list[dict[str, Any]] = [
        dict(event="commit", arm=whole.rows[0].get("arm", "main"), end="far", lr=0.1),
        dict(event="warning", message=["no text"]),
        dict(event="rung", arm="t00", step=-5, score=None),
        dict(event="segment", arm="main", role="main", stage=0, lr=0.1, start=9, end=9, began=1.0, busy_s=1.0),
    ]
    folder = write(tmp_path / "run", [*events, *strangers, {"event": "of a later version", "end": "far"}])
    with pytest.warns(
        RecordWarning, match=r"4 line\(s\) that make no sense left out; the first: commit with end='far'"
    ):
        result = RunResult.load(folder)
    assert result.schedule == whole.schedule
    assert (result.loss, result.rows, result.timing) == (whole.loss, whole.rows, whole.timing)
    assert result.events[-1]["event"] == "of a later version"


@pytest.mark.parametrize(("change", "message"), [
    (lambda start: start.update(format=99), "is of format 99, this version reads up to"),
    (lambda start: start.update(config=7), "cannot be read: not a configuration: 7"),
    (lambda start: start["config"].update(policy="best"), r"policy must be one of \['anchored', 'paper'\], got 'best'"),
    (lambda start: start["config"].update(total_steps="9"), "total_steps must be an int, got '9'"),
    (lambda start: start["config"].update(metric=""), "metric must be the name of a result key, got ''"),
    (lambda start: start["config"].update(mode="best"), r"mode must be one of \['max', 'min'\], got 'best'"),
    (lambda start: start["config"].update(lr_interval=[1.0, 0.1]), "min_lr must be below max_lr"),
])  # fmt: skip
def test_a_run_that_cannot_be_read_is_refused_by_the_value(change: Any, message: str, tmp_path: Path) -> None:
    events = copy.deepcopy(JOURNALS["paper"])
    change(events[0])
    folder = write(tmp_path / "run", events)
    for read in (History.read, RunResult.load, LearnedSchedule.load):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_a_race_with_branches_is_refused_by_name(tmp_path: Path) -> None:
    parents = [dict(event="proposal", arm="t09", lr=0.1, parent="t09", start=5)]  # its own parent, too
    with pytest.raises(ValueError, match=r"is of a race with branches, which are no more"):
        RunResult.load(write(tmp_path / "run", [*JOURNALS["anchored"], *parents]))


@pytest.mark.parametrize(
    "metric", ["loss[val]", "val[/loss]", "[bold]x", "[/]", "$x_{", "_hidden", "a b", "100%", "{x}", "<b>"]
)
@pytest.mark.parametrize("policy", sorted(JOURNALS))
def test_a_metric_may_have_any_name(metric: str, policy: str, tmp_path: Path) -> None:
    events = copy.deepcopy(JOURNALS[policy])
    events[0]["config"]["metric"] = metric
    folder = str(write(tmp_path / "run", events))
    shown = CliRunner().invoke(app, ["show", folder])
    assert shown.exit_code == 0, shown.exception
    assert shown.stdout.count(metric) == 2
    if metric in ("$x_{", "_hidden", "[/]"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for command in ("plot", "report"):
                drawn = CliRunner().invoke(app, [command, folder])
                assert drawn.exit_code == 0, drawn.exception


def test_every_event_that_is_written_is_one_of_the_enum() -> None:
    for events in JOURNALS.values():
        assert {event["event"] for event in events} <= {str(name) for name in Event}
    with pytest.raises(ValueError, match="'comit' is not a valid Event"):
        make_policy("paper", 100, stage_steps=20).emit("comit")  # type: ignore[arg-type]
