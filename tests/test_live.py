"""The live view: what its line and its race say, with and without a terminal."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import StringIO
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from autolrs_ray import AutoLRSSearch
from autolrs_ray.core.policy import Point
from autolrs_ray.core.race.policy import AnchoredPolicy
from autolrs_ray.driver.live import LiveProgress
from tests.races import start


def test_the_live_view_shows_the_line_and_who_is_left_in_the_race() -> None:
    search = AutoLRSSearch(1000, num_lrs=10, slots=4)
    search.desk.plan_for(4)
    search.desk.capacity.busy = 3
    policy = search.policy
    assert isinstance(policy, AnchoredPolicy)
    policy.issue("t00"), policy.issue("t09")
    start(policy)
    policy.report("t09", Point(20, 0.5))
    policy.saved("t09", 20, "t09@20")
    live = LiveProgress(search)
    console = Console(width=160, record=True, file=StringIO(), force_terminal=True)
    console.print(live.view(policy.progress()))
    lines = console.export_text().splitlines()
    assert lines[0].startswith(
        "AutoLRS anchored | rung 0/15 | 2 of 10 LRs in the race | lr 5.01 | loss 0.5 | step 20/1000"
    )
    assert "| 3/4 slots |" in lines[0]
    assert lines[1].split() == ["slots", "0%", "held"]
    assert lines[2].split()[:4] == ["lr", "5.01", "loss", "0.5"]
    assert lines[3].split()[:4] == ["lr", "1.26", "loss", "-"]


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        # one second a step: a race on one slot takes 2 T, and the view began with .8 T of the run left
        ("anchored", ["0:10 gone", "2:10 gone, about 24:30 left", "1:02:10 gone, about 10:00 left"]),
        # stages of 100 steps with two probes of ten: 1.2 T, less the steps that are handed over
        ("paper", ["0:10 gone", "2:10 gone, about 12:29 left", "1:02:10 gone, about 10:00 left"]),
    ],
)
def test_the_time_left_is_what_steps_have_taken_for_what_runs_take(
    policy: str, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("autolrs_ray.driver.live.time.monotonic", lambda: clock[0])
    options = {"stage_steps": 100, "max_stage_steps": 100} if policy == "paper" else {}
    search = AutoLRSSearch(1000, policy=policy, num_lrs=2, slots=1, **options)
    search.desk.plan_for(1)
    found, screen = search.policy, StringIO()
    live = LiveProgress(search)
    monkeypatch.setattr(live, "_console", Console(file=screen))  # no terminal: a line per change
    for seconds, step, steps in (
        (10.0, 200, 0),
        (30.0, 200, 0),
        (130.0, 300, 50),
        (3730.0, 400, 350),
    ):  # resumed at 200
        clock[0] = 1000.0 + seconds
        if isinstance(found, AnchoredPolicy):
            found.trunks[1].step = step
        else:
            monkeypatch.setattr(found, "step", step)
        search.desk.trained(steps, float(steps))
        live.on_step_end(1, [])
    assert [line.rpartition("slots | ")[2] for line in screen.getvalue().splitlines()[1:]] == shown


def test_a_log_gets_a_line_for_every_lr_that_joins_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    search = AutoLRSSearch(1000, slots=1)
    search.desk.plan_for(1)
    policy, screen, live = search.policy, StringIO(), LiveProgress(search)
    assert isinstance(policy, AnchoredPolicy)
    monkeypatch.setattr(live, "_console", Console(file=screen, width=200))
    policy.trunks[11].step = 60  # the others walk through the steps that it has behind it
    for trunk in policy.trunks[10:7:-1]:
        live._shown = 0.0
        live.on_step_end(1, [])
        live._shown = 0.0
        live.on_step_end(2, [])  # nothing has changed: no second line
        trunk.status = "open"
    lines = screen.getvalue().splitlines()[1:]
    assert [line.split(" | ")[2] for line in lines] == [f"{n} of 12 LRs in the race" for n in (2, 3, 4)]
    assert {line.split(" | ")[5] for line in lines} == {"step 60/1000"}


def test_a_terminal_gets_a_live_view_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    search = AutoLRSSearch(100, policy="paper", stage_steps=50, max_stage_steps=50)
    search.desk.plan_for(1)
    live, screen = LiveProgress(search), StringIO()
    monkeypatch.setattr(live, "_console", Console(width=100, file=screen, force_terminal=True))
    live.on_step_end(1, [])
    live.on_experiment_end([])
    shown = screen.getvalue()
    assert "stage 1/2 search | probes 0/10 | lr -" in shown
    assert shown.index("at most") < shown.index("stage 1/2")
    assert shown.rstrip("\n").endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("terminal", ["", "1"])
@pytest.mark.parametrize("stderr", ["without a reader", "on a full disk", "closed"])
def test_a_run_goes_on_where_its_display_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, terminal: str, stderr: str
) -> None:
    search = AutoLRSSearch(100, policy="paper", stage_steps=50, max_stage_steps=50)
    search.desk.plan_for(1)
    reader, writer = os.pipe()
    os.close(reader)
    screen = os.fdopen(os.open("/dev/full", os.O_WRONLY) if stderr == "on a full disk" else writer, "w")
    if stderr == "closed":
        screen.close()
    monkeypatch.setenv("FORCE_COLOR", terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    live = LiveProgress(search)
    for _ in range(2):
        live.on_step_end(1, [])
        live._shown = 0.0
    live.on_experiment_end([])
    assert sys.stderr is screen  # a live view had put itself in between
    with suppress(OSError):
        screen.close()


def test_what_a_run_will_cost_is_told_before_it_and_what_it_cost_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for options in (dict(), dict(policy="paper", stage_steps=500, max_stage_steps=500)):
        search = AutoLRSSearch(1000, slots=2, **options)
        search.desk.plan_for(2)
        live, screen = LiveProgress(search), StringIO()
        monkeypatch.setattr(live, "_console", Console(file=screen, width=200))
        live.on_step_end(1, [])
        search.desk.trained(1930, 1.0)
        live.on_experiment_end([])  # the run was interrupted: it has not cost all that it will
        monkeypatch.setattr(type(search.policy), "done", True)
        live.on_experiment_end([])
        first, *_, last = screen.getvalue().splitlines()
        told += [first, last]
    assert told[0] == (
        "AutoLRS anchored: mostly about 2.0 T of compute and 1.4 T of wall-clock on 2 slots; at most 10.4 and 9.2 T "
        "(T = 1000 steps)"
    )
    assert told[1].startswith("AutoLRS anchored: took 1.9 T of compute, 0:0")
    assert told[2] == (
        "AutoLRS paper: mostly about 1.9 T of compute and 1.4 T of wall-clock on 2 slots; at most 5.9 and 4.9 T "
        "(T = 1000 steps)"
    )
    assert told[3].startswith("AutoLRS paper: took 1.9 T of compute, 0:0")


def test_an_accuracy_is_shown_as_it_was_reported() -> None:
    search = AutoLRSSearch(1000, num_lrs=4, slots=1, metric="val_accuracy", mode="max")
    search.desk.plan_for(1)
    policy = search.policy
    line = LiveProgress(search).line({**policy.progress(), "loss": -0.875})
    assert "| val_accuracy 0.875 |" in line
    assert "-0.875" not in line


def test_a_notebook_gets_one_display_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []

    class Handle:
        def update(self, html: str) -> None:
            shown.append(("update", html))

    def display(html: str, display_id: bool) -> Handle:
        assert display_id
        shown.append(("display", html))
        return Handle()

    displays = ModuleType("IPython.display")
    displays.HTML, displays.display = str, display  # type: ignore[attr-defined]
    ipython = ModuleType("IPython")
    ipython.display = displays  # type: ignore[attr-defined]
    ipython.get_ipython = lambda: SimpleNamespace(kernel="a notebook's")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", displays)
    search = AutoLRSSearch(100, policy="paper", stage_steps=50)
    search.desk.plan_for(1)
    live = LiveProgress(search)
    screen = StringIO()
    monkeypatch.setattr(live, "_console", Console(width=100, file=screen))
    live.on_step_end(1, [])
    live.on_experiment_end([])
    assert [what for what, _ in shown] == ["display", "update"]
    assert all("stage 1/2 search | probes 0/10" in html and html.startswith("<pre>") for _, html in shown)
    assert "probes" not in screen.getvalue()  # the cost is said once, as a line
    ipython.get_ipython = lambda: SimpleNamespace()  # type: ignore[attr-defined]
    assert LiveProgress(search)._cell is None  # IPython in a terminal
