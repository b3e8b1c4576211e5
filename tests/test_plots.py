"""The plots: every picture of both policies from a real journal, what is in them, and what they do with damaged input."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autolrs_ray.core.events import Event
from autolrs_ray.core.paper import kernel
from autolrs_ray.core.policies import make_policy
from autolrs_ray.record.record import Record
from autolrs_ray.show.captions import of_slots
from autolrs_ray.show.cost_figures import slots_figure
from autolrs_ray.show.main_figures import accuracy_figure, learning_rate_figure, loss_figure
from autolrs_ray.show.plots import save_plots
from autolrs_ray.show.race_figure import in_play, race_figure
from autolrs_ray.show.run_data import RunData, read_reports
from autolrs_ray.show.search_figures import forecast_figure, posterior, spread, surrogate_figure
from autolrs_ray.show.style import new_figure, scale_loss
from autolrs_ray.training.local import run_local
from autolrs_ray.training.task import TrainingTask
from autolrs_ray.training.trainer import Trainer

PAPER: dict[str, Any] = dict(stage_steps=20, max_stage_steps=40, probe_steps=4, num_lrs=4)


def task() -> TrainingTask:
    """Softmax regression on 128 noisy rows: 0.1 ms a step, and an LR of 1e3 diverges."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(192, 6, generator=generator)
    targets = (inputs @ torch.randn(6, 3, generator=generator) + torch.randn(192, 3, generator=generator)).argmax(1)
    model = nn.Linear(6, 3)
    return TrainingTask(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss=nn.functional.cross_entropy,
        train_data=(inputs[:128], targets[:128]),
        val_data=(inputs[128:], targets[128:]),
        batch_size=16,
    )


def write_run(folder: Path, policy: str, steps: int, interval: tuple[float, float], **options: Any) -> Path:
    """A whole run of `policy` without Ray, journalled into `folder` as the pair would (but for its "segment" events)."""
    config = dict(total_steps=steps, policy=policy, lr_interval=interval, metric="val_loss", mode="min",
                  time_attr="step", seed=0, options=options)  # fmt: skip
    trainer = Trainer(task, averaging=policy == "anchored")
    run = run_local(make_policy(policy, steps, lr_interval=interval, **options), trainer)
    record = Record(folder)
    record.append([{"event": "start", "config": config}, *run.events])
    record.close()
    return folder


def write_events(folder: Path, events: list[dict[str, Any]]) -> None:
    """A journal of a paper run over [1e-3, 1] that has just started, and `events`."""
    config = dict(total_steps=100, policy="paper", lr_interval=[1e-3, 1.0], metric="val_loss", mode="min",
                  time_attr="step", seed=0, options=PAPER)  # fmt: skip
    record = Record(folder)
    record.append([{"event": "start", "config": config}, *events])
    record.close()


def write_reports(folder: Path, arm: str, rows: list[dict[str, Any]], start: int = 0) -> None:
    """`rows` as the result.json of a trial of `arm`."""
    trial = folder / f"{arm}_x"
    trial.mkdir(parents=True, exist_ok=True)
    config = {"config": {"autolrs": {"arm": arm, "start": start}}}
    (trial / "result.json").write_text("".join(json.dumps({**row, **config}) + "\n" for row in rows))


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("paper"), "paper", 140, (1e-3, 1.0), **PAPER)


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("anchored"), "anchored", 200, (1e-3, 1e3), num_lrs=6)


def names(files: list[Path]) -> set[str]:
    return {file.name for file in files}


def labels(figure: Any) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


@pytest.fixture(scope="module")
def drawn(paper: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_plots(paper, tmp_path_factory.mktemp("drawn"))


def test_a_paper_run_gives_a_png_and_an_svg_of_every_plot_it_has_data_for(drawn: list[Path]) -> None:
    plots = ("loss", "learning_rate", "surrogate", "forecast")
    assert names(drawn) == {f"{name}.{suffix}" for name in plots for suffix in ("png", "svg")}
    for file in drawn:
        start = file.read_bytes()[:8]
        assert start == (b"\x89PNG\r\n\x1a\n" if file.suffix == ".png" else b"<?xml ve")


def test_an_anchored_run_gives_the_race_and_nothing_of_the_surrogate(anchored: Path, tmp_path: Path) -> None:
    plots = ("loss", "learning_rate", "race")
    assert names(save_plots(anchored, tmp_path)) == {f"{name}.{suffix}" for name in plots for suffix in ("png", "svg")}


def test_plots_are_the_same_bytes_again_and_change_no_setting_of_matplotlib(
    paper: Path, drawn: list[Path], tmp_path: Path
) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 7.25}):  # a value that no style of ours has
        before = dict(matplotlib.rcParams)
        again = save_plots(paper, tmp_path)
        assert dict(matplotlib.rcParams) == before
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in drawn]


@pytest.mark.parametrize("far", [0.0, 1e-9, 500.0])
def test_a_forecast_that_is_far_off_stands_at_the_edge_with_its_value_and_sets_no_scale(
    far: float, tmp_path: Path
) -> None:
    stages = [(far, 0.5), (0.41, 0.4), (0.3, 0.31)]
    commits = [dict(stage=i, start=20 * i, end=20 * i + 20, lr=0.1, loss=loss, forecast=forecast, warmup=False, checkpoint="c")
               for i, (forecast, loss) in enumerate(stages)]  # fmt: skip
    write_events(tmp_path, [dict(event="commit", **commit) for commit in commits])
    figure = forecast_figure(RunData.load(tmp_path))
    assert figure is not None
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    assert 0.1 < low < 0.3
    assert 0.5 < high < 1.6
    (points,) = [collection.get_offsets().tolist() for collection in axes.collections]
    assert points[1:] == [[0.41, 0.4], [0.3, 0.31]]
    assert points[0] == [high if far > 1.0 else low, 0.5]
    assert [text.get_text().strip("<> ") for text in axes.texts] == [f"{far:.3g}"]


def test_plots_go_to_a_folder_of_the_run(tmp_path: Path) -> None:
    commit = dict(stage=0, start=0, end=20, lr=0.1, loss=1.0, forecast=None, warmup=False, checkpoint="c")
    write_events(tmp_path, [dict(event="commit", **commit)])
    files = save_plots(tmp_path)
    assert names(files) == {"loss.png", "loss.svg", "learning_rate.png", "learning_rate.svg"}
    assert {file.parent for file in files} == {tmp_path / "plots"}


def test_a_run_that_has_only_started_gives_no_plots(tmp_path: Path) -> None:
    write_events(tmp_path, [])
    assert save_plots(tmp_path) == []


def test_a_run_without_a_journal_and_a_bad_epoch_are_refused(paper: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no journal"):
        save_plots(tmp_path)
    with pytest.raises(ValueError, match="steps_per_epoch must be positive, got 0"):
        save_plots(paper, tmp_path, steps_per_epoch=0)


def test_the_learning_rate_is_drawn_as_it_was_applied_envelope_and_all(anchored: Path) -> None:
    data = RunData.load(anchored)
    figure = learning_rate_figure(data)
    assert figure is not None
    line = next(line for line in figure.axes[0].lines if line.get_label() == "learned schedule")
    steps, lrs = line.get_data()
    scale = data.result.schedule.pieces[0].lr
    assert lrs[0] == pytest.approx(scale / 40)  # the first of 40 steps of warm-up
    assert dict(zip(steps, lrs, strict=True))[100] == pytest.approx(scale * (1 - (100 / 200) ** 2))
    assert lrs[-1] == data.result.schedule.lr_at(199)
    assert {"search interval", "other trunks", "rungs of the race"} <= labels(figure)


def test_an_envelope_of_the_users_own_is_drawn_from_the_reported_learning_rates(anchored: Path) -> None:
    data = RunData.load(anchored)
    history = replace(data.history, config={**data.config, "options": {"envelope": "my_decay"}})
    assert learning_rate_figure(RunData(history, {})) is None
    rows = [dict(step=step, val_loss=1.0, lr=1.0 / step) for step in (10, 100, 200)]
    figure = learning_rate_figure(RunData(history, {data.arm: rows}))
    assert figure is not None
    line = next(line for line in figure.axes[0].lines if line.get_label() == "learned schedule")
    assert list(line.get_ydata()) == [0.1, 0.01, 0.005]


def test_reports_that_step_back_after_a_restart_are_replaced_by_the_later_ones(tmp_path: Path) -> None:
    rows = [dict(step=step, val_loss=loss) for step, loss in ((1, 9), (2, 8), (3, 7), (2, 5), (2, 4), (4, 3))]
    write_reports(tmp_path, "main", rows)
    with open(tmp_path / "main_x" / "result.json", "a") as file:
        file.write('{"step": 5, "val_l')  # killed in the middle of a line
    kept = read_reports(tmp_path, "step")["main"]
    assert [(row["step"], row["val_loss"]) for row in kept] == [(1, 9), (2, 4), (4, 3)]


def points(rows: list[dict[str, Any]], key: str = "val_loss") -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if key in row}


def test_what_the_journal_holds_is_drawn_whatever_tunes_files_have_lost(paper: Path, anchored: Path) -> None:
    data = RunData.load(paper)
    commits = {row["end"]: row["loss"] for row in data.history.stages}
    first, last = min(commits), max(commits)
    rows = [dict(step=first, val_loss=99.0, val_accuracy=0.5), dict(step=first + 1, val_loss=2.0)]  # and none after
    data = RunData(data.history, {"main": rows})
    drawn = data.main_rows()
    assert points(drawn) == {**commits, first + 1: 2.0}
    assert points(drawn, "val_accuracy") == {first: 0.5}  # what the journal does not hold is Tune's
    assert [row["step"] for row in drawn] == sorted({*commits, first + 1})
    assert last == 140
    data = RunData.load(anchored)
    whole, arm = data.scores(), next(arm for arm, fate in data.history.fates.items() if fate == "dropped")
    detail = dict(step=1, val_loss=9.0, averaged_loss=8.0)
    partial = RunData(data.history, {arm: [detail], data.arm: [detail]})
    for name in (arm, data.arm):
        assert partial.scores()[name] == {1: 8.0, **whole[name]}
    assert set(whole[data.arm]) <= {row["step"] for row in partial.main_rows()}


def test_probes_are_drawn_from_the_journal_where_tune_has_no_rows_of_them(paper: Path) -> None:
    data = RunData.load(paper)
    probe = next(event for event in data.history.named(Event.PROBE) if event["stage"] == 1)
    (start,) = (event["start"] for event in data.history.named(Event.STAGE) if event["stage"] == 1)
    key = "train_loss" if probe["series"] == "training" else "val_loss"
    assert points(data.rows(probe["arm"]), key) == {
        start + step: loss for step, loss in zip(probe["steps"], probe["losses"], strict=True)
    }


def test_what_a_rolled_back_attempt_reported_is_no_part_of_the_main_run(tmp_path: Path) -> None:
    commit = dict(stage=0, start=0, end=20, lr=0.1, loss=1.0, forecast=None, warmup=False, checkpoint="c")
    write_events(
        tmp_path, [dict(event="rollback", stage=0, step=8, lr=0.9, new_lr=0.1), dict(event="commit", **commit)]
    )
    attempts = [(0.9, [2, 4]), (0.1, [6, 12, 20])]
    rows = [dict(step=step, val_loss=lr, config={"autolrs": {"arm": "main", "start": 0, "lr": lr}})
            for lr, steps in attempts for step in steps]  # fmt: skip
    data = RunData.load(tmp_path)
    assert points(RunData(data.history, {"main": rows}).main_rows()) == {6: 0.1, 12: 0.1, 20: 1.0}


def test_steps_that_a_promoted_probe_trained_are_part_of_the_main_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "paper", 40, (1e-3, 1.0), **PAPER)
    data = RunData.load(folder)
    first = data.history.stages[0]
    arms = {event["arm"]: event["lr"] for event in data.history.named(Event.PROBE) if event["stage"] == 0}
    for arm in arms:
        write_reports(folder, arm, [dict(step=step, val_loss=2.0, who=arm) for step in (2, 4)])
    write_reports(folder, "main", [dict(step=step, val_loss=1.0, who="main") for step in (10, 20)], start=4)
    chosen = next(arm for arm, lr in arms.items() if lr == first["lr"])
    rows = [row for row in RunData.load(folder).main_rows() if "who" in row]
    assert [(row["step"], row["who"]) for row in rows] == [(2, chosen), (4, chosen), (10, "main"), (20, "main")]


def test_training_loss_is_averaged_over_equal_stretches_and_validation_loss_is_not(anchored: Path) -> None:
    data = RunData.load(anchored)
    rows = [dict(step=step, train_loss=loss, val_loss=loss) for step, loss in ((1, 4.0), (2, 2.0), (5, 1.0), (10, 3.0))]
    figure = loss_figure(RunData(data.history, {data.arm: rows}))
    assert figure is not None
    lines = {line.get_label(): line.get_data() for line in figure.axes[0].lines}
    assert list(lines["training loss"][0]) == [2, 5, 10]  # a hundredth of 200 steps is 2
    assert list(lines["training loss"][1]) == [3.0, 1.0, 3.0]
    validation = dict(zip(*lines["validation loss"], strict=True))
    assert [validation[step] for step in (1, 2, 5, 10)] == [4.0, 2.0, 1.0, 3.0]


def test_without_reports_the_loss_is_that_of_the_commits(paper: Path) -> None:
    data = RunData.load(paper)
    figure = loss_figure(data)
    assert figure is not None
    line = next(line for line in figure.axes[0].lines if line.get_label() == "validation loss")
    commits = list(data.history.named(Event.COMMIT))
    assert list(line.get_xdata()) == [commit["end"] for commit in commits]
    assert list(line.get_ydata()) == [commit["loss"] for commit in commits]


def test_accuracy_is_drawn_over_epochs_where_their_length_is_known(anchored: Path) -> None:
    data = RunData.load(anchored)
    assert accuracy_figure(data) is None
    rows = [dict(step=step, val_loss=1.0, val_accuracy=step / 200) for step in (50, 100, 200)]
    data = RunData(data.history, {data.arm: rows})
    by_step, by_epoch = accuracy_figure(data), accuracy_figure(data, steps_per_epoch=50)
    assert by_step is not None
    assert by_epoch is not None
    assert by_step.axes[0].get_xlabel() == "iterations (optimizer steps)"
    assert by_epoch.axes[0].get_xlabel() == "epochs"
    assert list(by_epoch.axes[0].lines[0].get_xdata()) == [1.0, 2.0, 4.0]
    own = RunData(data.history, {data.arm: [{**row, "epoch": 0.5 * i} for i, row in enumerate(rows)]})
    figure = accuracy_figure(own)
    assert figure is not None
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("losses", [[1.0, 0.5, 0.7], [3.0, 0.2, 0.3, 0.25, 90.0], [2.0, 2.0, 5.0], [1.0, 1.0]])
def test_the_drawn_posterior_is_the_surrogates_in_units_of_the_loss(losses: list[float]) -> None:
    x = [i / 10 for i in range(len(losses))]
    _, sd, seen = posterior(x, losses, [0.05, 0.95])
    ordered = sorted(zip(losses, seen.tolist(), strict=True))
    assert seen.tolist()[losses.index(min(losses))] == pytest.approx(min(losses))
    assert all(shown == pytest.approx(loss) or shown < loss for loss, shown in ordered)  # only clipped from above
    assert kernel.standardise(seen.tolist()) == pytest.approx(kernel.standardise(losses), abs=1e-9)
    assert len(set(losses)) == 1 or float(sd[1]) > 0


def test_every_stage_has_a_panel_with_its_tried_and_chosen_lrs(paper: Path) -> None:
    data = RunData.load(paper)
    figure = surrogate_figure(data)
    assert figure is not None
    stages = {event["stage"]: event for event in data.history.named(Event.COMMIT)}
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == len(stages) == 4
    for stage, panel in enumerate(panels):
        star = next(line for line in panel.lines if line.get_label() == "chosen")
        dots = [line for line in panel.lines if line.get_label().startswith("tried")]
        tried = [x for line in dots for x in line.get_xdata()]
        assert list(star.get_xdata()) == [stages[stage]["lr"]]
        assert list(star.get_ydata()) == [min(y for line in dots for y in line.get_ydata())]
        done = [
            event["lr"]
            for event in data.history.named(Event.PROBE)
            if event["stage"] == stage and event["status"] == "done"
        ]
        assert sorted(tried) == sorted(done)


def test_at_most_twelve_stages_are_shown_the_first_and_the_last_among_them() -> None:
    assert spread(5) == [0, 1, 2, 3, 4]
    shown = spread(40)
    assert len(set(shown)) == 12
    assert (shown[0], shown[-1]) == (0, 39)
    assert {b - a for a, b in pairwise(shown)} <= {3, 4}


def test_a_second_round_of_probes_is_drawn_two_decades_lower(tmp_path: Path) -> None:
    first = [dict(probe=i, lr=0.01 * 2**i, status="diverged", forecast=None) for i in range(4)]
    second = [dict(probe=4 + i, lr=1e-5 * 4**i, status="done", forecast=1.0 + i) for i in range(4)]
    write_events(tmp_path, [
        dict(event="probe", stage=0, arm=f"s000p{probe['probe']:02d}", series="validation", steps=[1], **probe)
        for probe in first + second
    ])  # fmt: skip
    figure = surrogate_figure(RunData.load(tmp_path))
    assert figure is not None
    grid = next(line for line in figure.axes[0].lines if line.get_label() == "mean of the GP").get_xdata()
    assert (grid[0], grid[-1]) == pytest.approx((1e-5, 1e-3))
    assert "diverged or failed" in labels(figure)


def test_the_race_shows_every_trunk_the_winner_thickest_and_marks_the_lost(anchored: Path) -> None:
    data = RunData.load(anchored)
    figure = race_figure(data)
    assert figure is not None
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "None"]
    curves = [line for line in lines if line.get_linestyle() == "-"]  # dotted ones mark the rungs
    assert 2 < len(curves) == len(data.scores()) < 12
    thick = max(curves, key=lambda line: line.get_linewidth())
    assert thick.get_label() == f"winner (LR {data.history.lrs[data.arm]:.3g})"
    assert max(thick.get_xdata()) == 200
    lost = [fate for fate in data.history.fates.values() if fate not in ("won", "untried")]
    marks = [line for line in figure.axes[0].lines if len(line.get_xdata()) and line.get_marker() in set("X^s")]
    assert len(marks) == len(lost) > 1
    assert set(lost) < labels(figure)
    spans = in_play(data.history)
    assert spans[data.history.arm][-1][1] == 200
    thick = [line for line in figure.axes[1].lines if line.get_linewidth() == 4.0 and len(line.get_xdata())]
    assert len(thick) == sum(map(len, spans.values()))
    assert {"in play", "joined here, from step 0"} < labels(figure)
    named = [text.get_text() for text in figure.axes[0].texts if text.get_gid() == "lr"]
    assert f"{data.history.lrs[data.arm]:.3g}" in named
    assert len(named) <= len(curves)


def test_a_metric_to_be_maximised_is_drawn_as_it_was_reported(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "paper", 40, (1e-3, 1.0), **PAPER)
    data = RunData.load(folder)
    flipped = RunData(replace(data.history, config={**data.config, "mode": "max", "metric": "score"}), {})
    assert loss_figure(flipped) is None
    figure = accuracy_figure(flipped)
    assert figure is not None
    line = next(line for line in figure.axes[0].lines if line.get_label() == "score")
    assert list(line.get_ydata()) == [-event["loss"] for event in data.history.named(Event.COMMIT)]
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].get_ylabel() == "score"


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([2.0, 0.1], "log"), ([2.0, 0.5], "linear"), ([2.0, 0.01, 0.0], "symlog"), ([2.0, 0.0], "linear"),
        ([2.0, -30.0], "linear"), ([], "linear"),
    ],
)  # fmt: skip
def test_losses_near_and_below_zero_have_an_axis_that_shows_them(values: list[float], scale: str) -> None:
    axes = new_figure().subplots()
    added = scale_loss(axes, values)
    assert axes.get_yscale() == scale
    assert bool(added) == (scale != "linear")


def test_a_race_for_an_accuracy_has_a_linear_axis(tmp_path: Path) -> None:
    data = RunData.load(write_run(tmp_path / "run", "anchored", 60, (1e-3, 10.0), num_lrs=4))
    flipped = RunData(replace(data.history, config={**data.config, "mode": "max", "metric": "val_accuracy"}), {})
    figure = race_figure(flipped)
    assert figure is not None
    assert figure.axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("workers", [1, 4])
def test_the_slots_in_use_add_up_to_what_the_trials_worked(tmp_path: Path, workers: int) -> None:
    spans = [("main", 100.0, 3.0), ("s000p00", 101.0, 4.0), ("s000p01", 104.0, 0.5)]
    segments = [dict(event="segment", arm=arm, role="x", stage=0, lr=0.1, start=0, end=1, began=began, busy_s=busy)
                for arm, began, busy in spans]  # fmt: skip
    if workers > 1:
        segments[0]["workers"] = workers
        segments.insert(0, dict(event="workers", arm="main", step=0, workers=workers, slots=6, time=100.0))
    write_events(tmp_path, segments)
    figure = slots_figure(RunData.load(tmp_path))
    assert figure is not None
    area = [0.0, 0.0]
    for i, part in enumerate(figure.axes[0].collections):
        corners = part.get_paths()[0].vertices
        x, y = corners[:, 0], corners[:, 1]
        area[i] = abs(float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())) / 2
    assert area == pytest.approx([3.0 * workers, 4.5])
    assert figure.axes[0].get_ylim()[1] >= (1 if workers == 1 else 6)
    assert figure.axes[0].get_ylabel() == ("trials at work" if workers == 1 else "workers")
    assert ("6 slots at work" in of_slots(RunData.load(tmp_path))) == (workers > 1)
    assert figure.axes[0].get_xlabel().startswith("seconds")
    write_events(tmp_path / "none", [])
    assert slots_figure(RunData.load(tmp_path / "none")) is None
