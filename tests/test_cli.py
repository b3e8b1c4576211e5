"""The command line: what it prints of a run, that it passes arguments on, and that mistakes cost one line on stderr."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autolrs_ray.cli import app
from autolrs_ray.outcome.schedule import LearnedSchedule
from autolrs_ray.record.journal import JOURNAL_FILE
from autolrs_ray.record.record import Record

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "autolrs_ray"]
Event = dict[str, Any]


def write(folder: Path, policy: str, events: list[Event], **config: Any) -> Path:
    start = dict(total_steps=60, policy=policy, lr_interval=[0.001, 1.0], metric="val_loss", mode="min",
                 time_attr="step", seed=0, options={"num_lrs": 2})  # fmt: skip
    record = Record(folder)
    record.append([{"event": "start", "time": 1000.0, "config": {**start, **config}}])
    record.append([{"time": 1000.0, **event} for event in events])
    record.close()
    return folder


def commit(
    stage: int, start: int, end: int, lr: float, loss: float, forecast: float | None, warmup: bool = False
) -> Event:
    return dict(event="commit", stage=stage, start=start, end=end, lr=lr, loss=loss, forecast=forecast, warmup=warmup,
                checkpoint=f"/c/{end}")  # fmt: skip


def probe(stage: int, index: int, lr: float, status: str, forecast: float | None) -> Event:
    return dict(event="probe", stage=stage, probe=index, arm=f"s{stage:03d}p{index:02d}", lr=lr, status=status,
                forecast=forecast, series="validation", steps=[2], losses=[1.0])  # fmt: skip


def segment(arm: str, start: int, end: int, began: float, busy_s: float) -> Event:
    return dict(event="segment", arm=arm, role="x", stage=0, lr=0.1, start=start, end=end, began=began, busy_s=busy_s)


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """Warm-up, two stages, one diverged probe, a rollback and a warning; 10 s of wall-clock."""
    return write(tmp_path / "paper", "paper", [
        segment("main", 0, 10, 1001.0, 1.0), commit(-1, 0, 10, 0.05, 3.0, None, warmup=True),
        dict(event="stage", stage=0, start=10, steps=20, probe_steps=2, concurrency=2),
        probe(0, 0, 0.25, "done", 1.25), probe(0, 1, 0.9, "diverged", None),
        segment("s000p00", 10, 12, 1002.0, 1.0), segment("s000p01", 10, 12, 1002.5, 1.0),
        dict(event="choice", stage=0, probe=0, lr=0.25, forecast=1.25),
        segment("main", 12, 30, 1004.0, 2.0), commit(0, 10, 30, 0.25, 1.5, 1.25),
        dict(event="warning", stage=1, message="surrogate failed"),
        probe(1, 0, 0.125, "done", 0.75), probe(1, 1, 0.5, "done", 0.5),
        dict(event="rollback", stage=1, step=40, lr=0.5, new_lr=0.125),
        segment("main", 30, 60, 1006.0, 3.0), commit(1, 30, 60, 0.125, 0.875, 0.75),
        dict(event="done", step=60, loss=0.875, checkpoint="/c/60", time=1010.0),
    ], options={"num_lrs": 2, "warmup_steps": 10})  # fmt: skip


@pytest.fixture
def anchored(tmp_path: Path) -> Path:
    """Three trunks: 0.5 wins, 0.01 is dropped at step 6, 0.75 diverges."""
    rungs = [("t00", 0.01, 6, 2.5), ("t01", 0.5, 6, 2.0), ("t01", 0.5, 30, 1.5)]
    ends = [(0.01, "t00", "dropped", 6), (0.75, "t02", "diverged", 0)]
    return write(tmp_path / "anchored", "anchored", [
        *(dict(event="proposal", stage=0, probe=i, arm=f"t{i:02d}", lr=lr) for i, lr in enumerate((0.01, 0.5))),
        *(dict(event="rung", arm=arm, lr=lr, step=step, score=score, loss=3.0, averaged_loss=score)
          for arm, lr, step, score in rungs),
        dict(event="proposal", stage=0, probe=2, arm="t02", lr=0.75),
        *(dict(event="trunk", lr=lr, arm=arm, status=status, step=step) for lr, arm, status, step in ends),
        dict(event="commit", stage=0, arm="t01", end=60, lr=0.5, checkpoint="/c/60", loss=1.0, averaged_loss=0.75),
        dict(event="done", arm="t01", lr=0.5, step=60, loss=0.75, checkpoint="/c/60"),
    ])  # fmt: skip


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """The one line that a refused command prints to stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_show_prints_a_stage_a_line_and_the_cost_of_a_paper_run(paper: Path) -> None:
    lines = table(invoke("show", paper))
    assert ["warm-up", "0-10", "0.05", "-", "3", "0", "0"] in lines
    assert ["0", "10-30", "0.25", "1.25", "1.5", "2", "1"] in lines
    assert ["1", "30-60", "0.125", "0.75", "0.875", "2", "0"] in lines
    text = " ".join(" ".join(line) for line in lines)
    assert "paper policy, finished; val_loss 0.875" in text
    # The main run trained 58 of its 60 steps itself and the probes 4; 62 steps in all, and the winner's 2 are the run's.
    assert "steps: 60 main + 2 search; compute 1.03 T" in text
    assert "wall-clock: 10.0 s = 6.0 s training + 1.5 s probing + 2.5 s overhead; at most 2 trials at a time" in text
    assert "warning: surrogate failed" in text
    assert (
        "warning: stage 1: at step 40 the main trial was above the stage's start, with LR 0.5; trained again with 0.125"
        in text
    )


def test_show_prints_every_trunk_and_its_fate_for_an_anchored_run(anchored: Path) -> None:
    lines = table(invoke("show", anchored))
    assert ["0.01", "6", "2.5", "6", "dropped"] in lines
    assert ["0.5", "30", "1.5", "60", "won"] in lines
    assert ["0.75", "-", "-", "0", "diverged"] in lines
    text = " ".join(" ".join(line) for line in lines)
    assert "search and times not recorded (no segments in the journal)" in text


def test_show_json_holds_the_same_as_the_table(paper: Path, anchored: Path) -> None:
    found = json.loads(invoke("show", "--json", paper))
    assert found["stages"][1] == dict(
        stage=0, start=10, end=30, lr=0.25, forecast=1.25, realised=1.5, tried=2, failed=1
    )
    assert found["totals"]["compute"] == pytest.approx(62 / 60)
    assert found["done"] is True
    assert len(found["warnings"]) == 2
    found = json.loads(invoke("show", anchored, "--json"))
    assert [trunk["fate"] for trunk in found["trunks"]] == ["dropped", "won", "diverged"]
    assert found["totals"]["search_steps"] is None


def test_a_run_under_way_is_shown_as_unfinished(tmp_path: Path) -> None:
    folder = write(tmp_path, "paper", [commit(0, 0, 20, 0.25, 1.5, 1.25)])
    assert "not finished: at step 20 of 60" in invoke("show", folder)


def test_a_metric_to_be_maximised_is_shown_as_it_was_reported(tmp_path: Path) -> None:
    folder = write(tmp_path, "paper", [commit(0, 0, 20, 0.25, -0.75, -0.5)], metric="val_accuracy", mode="max")
    assert ["0", "0-20", "0.25", "0.5", "0.75", "0", "0"] in table(invoke("show", folder))


def test_a_stage_done_again_after_a_lost_checkpoint_counts_once(tmp_path: Path) -> None:
    commits = [(0, 0, 20, 1.0), (1, 20, 40, 0.9), (0, 0, 20, 1.5), (1, 20, 40, 0.8)]
    folder = write(tmp_path, "paper", [commit(i, start, end, 0.25, loss, 1.0) for i, start, end, loss in commits[:3]])
    assert [row["realised"] for row in json.loads(invoke("show", folder, "--json"))["stages"]] == [1.5]
    other = write(tmp_path / "x", "paper", [commit(i, start, end, 0.25, loss, 1.0) for i, start, end, loss in commits])
    assert [row["realised"] for row in json.loads(invoke("show", other, "--json"))["stages"]] == [1.5, 0.8]


def test_damage_to_the_journal_is_told_and_the_rest_is_shown(paper: Path) -> None:
    with open(paper / JOURNAL_FILE, "ab") as file:
        file.write(b'{"event":"commit","crc":1}\n')
    result = CliRunner().invoke(app, ["show", str(paper)])
    assert result.exit_code == 0
    assert "1 damaged line(s) left out" in result.stderr
    assert "finished" in result.stdout


@pytest.mark.parametrize("command", ["show", "plot", "export"])
def test_a_folder_that_is_no_run_costs_one_line_and_status_1(command: str, tmp_path: Path) -> None:
    assert f"no such folder: {tmp_path}/nowhere" in refused(command, tmp_path / "nowhere")
    assert f"no journal at {tmp_path}/autolrs.jsonl" in refused(command, tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs that were read from disk."""
    from autolrs_ray.outcome.history import History

    found: list[Any] = []
    read = History.read
    monkeypatch.setattr(History, "read", lambda folder: found.append(folder) or read(folder))
    return found


@pytest.mark.parametrize("command", ["plot", "report", "tensorboard", "show"])
def test_a_run_is_read_once(command: str, paper: Path, reads: list[Any]) -> None:
    invoke(command, paper)
    assert reads == [str(paper)]


def test_a_run_is_named_by_its_journal_too(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = invoke("show", paper)
    assert invoke("show", paper / JOURNAL_FILE) == shown
    monkeypatch.chdir(paper)
    assert invoke("show", JOURNAL_FILE) == shown


def test_output_that_cannot_be_written_costs_one_line_and_status_1(paper: Path) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*COMMAND, "show", paper], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr == "autolrs: cannot write to standard output: [Errno 28] No space left on device\n"
    assert ended.returncode == 1


def test_folders_whose_names_are_not_utf_8_are_shown_as_what_they_are(paper: Path, tmp_path: Path) -> None:
    odd = paper.rename(tmp_path / os.fsdecode(b"r\xff"))
    assert "r\\xff" in invoke("compare", odd, "--output", tmp_path / "a.png")
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    told = subprocess.run([*COMMAND, "report", odd], env=strict, capture_output=True, text=True, check=True).stdout
    assert told == f"{tmp_path}/r\\udcff/report.html\n"
    assert "r\\xff" in (odd / "report.html").read_text()


def test_plot_prints_the_files_it_wrote(paper: Path, tmp_path: Path) -> None:
    files = [Path(line) for line in invoke("plot", paper, "--output", tmp_path / "out").splitlines()]
    assert {file.name for file in files} >= {"loss.png", "learning_rate.svg", "surrogate.png", "forecast.svg"}
    assert all(file.parent == tmp_path / "out" and file.stat().st_size > 1000 for file in files)


def test_plot_refuses_a_run_with_nothing_to_draw_and_a_folder_it_cannot_make(paper: Path, tmp_path: Path) -> None:
    assert "nothing to plot yet" in refused("plot", write(tmp_path / "new", "paper", []))
    (tmp_path / "file").write_text("")
    assert "file" in refused("plot", paper, "--output", tmp_path / "file")


def test_export_writes_a_schedule_that_loads_as_the_same(paper: Path, tmp_path: Path) -> None:
    schedule = LearnedSchedule.load(paper)
    assert LearnedSchedule.from_json(invoke("export", paper)) == schedule
    invoke("export", paper, "--output", tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(60))
    loaded = LearnedSchedule.load(tmp_path / "s.csv")
    assert [loaded.lr_at(step) for step in range(60)] == [schedule.lr_at(step) for step in range(60)]


def test_export_every_thins_the_rows_out_and_keeps_the_last(paper: Path) -> None:
    lines = invoke("export", paper, "--format", "csv", "--every", "20").split()
    assert lines == ["step,lr", f"0,{0.05 * (1 / 10)!r}", "20,0.25", "40,0.125", "59,0.125"]


def test_export_refuses_a_run_without_a_stage_and_a_file_it_cannot_write(paper: Path, tmp_path: Path) -> None:
    assert "no schedule yet" in refused("export", write(tmp_path / "new", "paper", []))
    assert "nowhere" in refused("export", paper, "--output", tmp_path / "nowhere" / "s.json")
    own = write(tmp_path / "own", "paper", [commit(0, 0, 20, 0.25, 1.5, 1.25)], options={"envelope": "my_decay"})
    assert "unknown envelope 'my_decay'" in refused("export", own)


def autolrs(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autolrs_ray.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "task.py").write_text("NAME = 'shared'\n")
    (folder / "echo.py").write_text(
        "import sys\nfrom experiments.task import NAME\n"
        'if __name__ == "__main__":\n    print(NAME, sys.argv[1:])\n    sys.exit(3)\n'
    )
    return tmp_path


def test_run_passes_arguments_and_exit_status_through(experiments: Path) -> None:
    done = autolrs("run", "echo", "--seed", "1", "--help", "x", cwd=experiments)
    assert (done.returncode, done.stdout) == (3, "shared ['--seed', '1', '--help', 'x']\n")
    by_path = autolrs("run", "experiments/echo.py", "-v", cwd=experiments)
    assert (by_path.returncode, by_path.stdout) == (3, "shared ['-v']\n")


def test_run_of_an_unknown_experiment_names_the_available_ones(
    experiments: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(experiments)
    line = refused("run", "digit")
    assert "unknown experiment 'digit'; available: echo" in line
    assert "task" not in line  # a module without a main is no experiment
    assert "no such file: gone.py" in refused("run", "gone.py")


def test_help_needs_neither_ray_nor_torch_nor_matplotlib() -> None:
    code = (
        "import sys, autolrs_ray.cli; print([name for name in ('ray', 'torch', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_help_names_every_command() -> None:
    text = invoke("--help")
    assert all(f" {name} " in text for name in ("run", "show", "plot", "export"))


# -- compare -------------------------------------------------------------------------------------------------------------


def run_that_ended_at(folder: Path, loss: float, **config: Any) -> Path:
    commits = [commit(0, 0, 30, 0.25, 2 * loss, 1.25), commit(1, 30, 60, 0.125, loss, 0.75)]
    return write(folder, "paper", [*commits, dict(event="done", step=60, loss=loss, checkpoint="/c/60")], **config)


def test_compare_prints_the_best_first_and_draws_one_figure(tmp_path: Path) -> None:
    folders = [run_that_ended_at(tmp_path / name, loss) for name, loss in (("wd-0", 0.75), ("wd-1e-2", 0.5))]
    text = invoke("compare", *folders, "--output", tmp_path / "both.svg")
    rows = [line for line in table(text) if line and line[0].startswith("wd-")]
    assert [(row[0], row[3]) for row in rows] == [("wd-1e-2", "0.5"), ("wd-0", "0.75")]
    assert text.splitlines()[-1] == str(tmp_path / "both.svg")
    assert (tmp_path / "both.svg").read_text().count("<svg") == 1
    found = json.loads(invoke("compare", *folders, "--json"))
    assert [row["run"] for row in found] == ["wd-1e-2", "wd-0"]


def test_accuracies_are_compared_as_they_were_reported_the_highest_first(tmp_path: Path) -> None:
    options: Event = {"metric": "val_accuracy", "mode": "max"}
    folders = [
        run_that_ended_at(tmp_path / part / "run", loss, **options) for part, loss in (("a", -0.75), ("b", -0.875))
    ]
    found = json.loads(invoke("compare", *folders, "--json"))
    assert [row["value"] for row in found] == [0.875, 0.75]
    assert [row["run"] for row in found] == [str(folders[1]), str(folders[0])]  # both are called "run"


def test_runs_of_different_metrics_are_not_compared(tmp_path: Path) -> None:
    one = run_that_ended_at(tmp_path / "one", 0.5)
    other = run_that_ended_at(tmp_path / "other", -0.5, metric="val_accuracy", mode="max")
    line = refused("compare", one, other)
    assert "different metrics: one has val_loss (min), other has val_accuracy (max)" in line
