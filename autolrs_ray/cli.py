"""The command `autolrs`: run an experiment, and look at a run's journal as a table, plots or a schedule.

Imports of Ray, torch and matplotlib wait until a command needs them, so that `autolrs --help` answers at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from autolrs_ray.show.run_data import RunData

Row = dict[str, Any]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Automatic learning rates on Ray Tune: run experiments, and look at what a run found.

    A run folder (RUN_DIR) is what autolrs_ray.run or a Tuner with the AutoLRS pair leaves under its storage path; all
    that is shown here is read from the journal in it (autolrs.jsonl), also while the run goes on.

    A first run, in a clone of the repository: `autolrs run digits`, then `autolrs show runs/digits-anchored` and
    `autolrs report runs/digits-anchored`.
    """,
)

RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder of a run, or its URI: it holds autolrs.jsonl.")]


class Format(StrEnum):
    """What `export` writes."""

    JSON = "json"
    CSV = "csv"


def _fail(message: object) -> NoReturn:
    """One line on stderr, exit status 1."""
    typer.echo(f"autolrs: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(1)


def _load(folder: str) -> RunData:
    """The run in `folder`, or whose journal that is; exits with one line where there is none. Damage to the journal is told on
    stderr."""
    from autolrs_ray.record.journal import JOURNAL_FILE

    if os.path.basename(folder) == JOURNAL_FILE:
        folder = os.path.dirname(folder) or "."
    if "://" not in folder and not Path(folder).is_dir():
        _fail(f"no such folder: {folder}")
    from autolrs_ray.show.run_data import RunData

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            data = RunData.load(folder)
        except (OSError, ValueError, KeyError) as error:
            _fail(error)
    for warning in caught:
        typer.echo(f"autolrs: warning: {warning.message}", err=True)
    return data


@contextmanager
def _telling() -> Iterator[None]:
    """What goes wrong with files is one line; what libraries warn of while they draw is not the user's matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (OSError, ValueError) as error:
            _fail(error)


# -- run -----------------------------------------------------------------------------------------------------------------


def _experiments() -> dict[str, Path]:
    """Name -> file of every script in the package `experiments`: that of the working folder, or else the installed one."""
    spec = importlib.util.find_spec("experiments")
    folders = [Path.cwd() / "experiments", *map(Path, (spec and spec.submodule_search_locations) or [])]
    files = next((sorted(folder.glob("*.py")) for folder in folders if folder.is_dir()), [])
    return {
        file.stem: file.resolve() for file in files if re.search(r"^if __name__ == ", file.read_text(), re.MULTILINE)
    }


def _command(experiment: str) -> tuple[list[str], Path]:
    """Arguments of the interpreter that run `experiment`, and the folder that its imports start from."""
    if experiment.endswith(".py"):
        if not Path(experiment).is_file():
            _fail(f"no such file: {experiment}")
        return [experiment], Path.cwd()
    known = _experiments()
    name = experiment.removeprefix("experiments.")
    if name not in known:
        here = (
            f"available: {', '.join(known)}"
            if known
            else (
                "experiments are in a clone of the repository, not in the installed package: run this there, or give a .py file"
            )
        )
        _fail(f"unknown experiment {experiment!r}; {here}")
    return ["-m", f"experiments.{name}"], known[name].parent.parent


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    experiment: Annotated[
        str,
        typer.Argument(help="A .py file, or, in a clone of the repository, the name of a module in its experiments/."),
    ],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Passed on to it.")] = None,
) -> None:
    """Run a script, `autolrs run my_script.py`, or in a clone an experiment: `autolrs run digits` is `python -m
    experiments.digits`.

    All that follows the name belongs to the experiment (`autolrs run digits --help` shows its own help). Its exit status is
    this command's.
    """
    target, root = _command(experiment)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    command = [sys.executable, *target, *(arguments or [])]
    os.execve(
        sys.executable, command, environment
    )  # no process in between: Ctrl-C and SIGTERM reach the experiment itself


# -- show ----------------------------------------------------------------------------------------------------------------


def _number(value: Any, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else f"{value:,}"


def _print_table(header: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> None:
    """header: (title, whether its column holds numbers)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for title, numeric in header:
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(Text(title), justify=justify, overflow="fold")  # as it is: a metric may be called "[b]"
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[-1] == "won" else None)
    Console(highlight=False).print(table)


def _show_stages(found: Row) -> None:
    header = [(title, True) for title in ("stage", "steps", "LR", "forecast", found["metric"], "probes", "failed")]
    _print_table(header, (
        [str(row["stage"]), f"{row['start']:,}-{row['end']:,}", f"{row['lr']:.3g}", _number(row["forecast"]),
         _number(row["realised"]), str(row["tried"]), str(row["failed"])]
        for row in found["stages"]
    ))  # fmt: skip


def _show_trunks(found: Row) -> None:
    header = [("LR", True), ("last rung", True), ("score there", True), ("steps", True), ("fate", False)]
    _print_table(header, (
        [f"{row['lr']:.3g}", _number(row["rung"]), _number(row["score"]),
         _number(row["step"]), row["fate"]]
        for row in found["trunks"]
    ))  # fmt: skip


def _show_totals(found: Row) -> None:
    totals = found["totals"]
    done = (
        "finished" if found["done"] else f"not finished: at step {totals['main_steps']:,} of {totals['total_steps']:,}"
    )
    lines = [f"{found['policy']} policy, {done}; {found['metric']} {_number(found['value'])}"]
    if totals["compute"] is None:
        lines.append(
            f"steps: {totals['main_steps']:,} main; search and times not recorded (no segments in the journal)"
        )
    else:
        unit = "T" if found["done"] else "times the main run's steps so far"
        lines.append(f"steps: {totals['main_steps']:,} main + {totals['search_steps']:,} search; "
                     f"compute {totals['compute']:.2f} {unit}")  # fmt: skip
        lines.append(f"wall-clock: {totals['wall_s']:.1f} s = {totals['training_s']:.1f} s training "
                     f"+ {totals['probing_s']:.1f} s probing + {totals['overhead_s']:.1f} s overhead; "
                     f"at most {totals['max_concurrent']} trials at a time")  # fmt: skip
    if found["choice"]:
        lines.append(found["choice"]["text"])
    lines += [point["text"] for point in found["points"]]
    for message in found["warnings"]:
        lines.append(f"warning: {message}")
    typer.echo("\n".join(lines))


@app.command()
def show(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as one JSON object.")] = False,
) -> None:
    """Show what a run chose and what it cost.

    Paper policy: the stages, with the learning rate chosen, its forecast, the metric then realised, and the probes tried
    and failed (those that diverged among them). Anchored policy: the trunks of the race, with the last rung each
    reached, its score there, and its fate. Then the steps, the compute in T (the steps of one training), the wall-clock
    and the warnings.
    """
    from autolrs_ray.show.summary import summary

    found = summary(_load(run_dir))
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    (_show_trunks if "trunks" in found else _show_stages)(found)
    _show_totals(found)


# -- plot and export -----------------------------------------------------------------------------------------------------


@app.command()
def plot(
    run_dir: RunDir,
    output: Annotated[str | None, typer.Option(help="Folder to write to, or its URI (default: RUN_DIR/plots).")] = None,
    steps_per_epoch: Annotated[
        float | None, typer.Option(help="Optimizer steps per epoch, to draw accuracy over epochs.")
    ] = None,
) -> None:
    """Draw loss, learning rate, accuracy and the search, as PNG and SVG, and print the files written."""
    from autolrs_ray.show.plots import save_plots

    data = _load(run_dir)
    with _telling():
        files = save_plots(data, output, steps_per_epoch)
    if not files:
        _fail(f"nothing to plot yet in {run_dir}: no loss has been reported")
    for file in files:
        typer.echo(str(file))


@app.command()
def report(
    run_dir: RunDir,
    output: Annotated[
        str | None, typer.Option(help="HTML file to write, or its URI (default: RUN_DIR/report.html).")
    ] = None,
    steps_per_epoch: Annotated[
        float | None, typer.Option(help="Optimizer steps per epoch, to draw accuracy over epochs.")
    ] = None,
) -> None:
    """Write one HTML file with all there is to see of a run, to read in a browser or to send on; print its name.

    What it found, its figures and tables, its cost, its settings, and how to replay the schedule. It fetches nothing.
    """
    from autolrs_ray.show.page import save_report

    data = _load(run_dir)
    with _telling():
        typer.echo(save_report(data, output, steps_per_epoch))


@app.command()
def tensorboard(
    run_dir: RunDir,
    output: Annotated[str | None, typer.Option(help="Local folder to write to (default: RUN_DIR/tensorboard).")] = None,
) -> None:
    """Write the run for TensorBoard: one curve of the main run, what was tried in groups under it; print the folder."""
    from autolrs_ray.show.tensorboard import save_tensorboard

    data = _load(run_dir)
    with _telling():
        typer.echo(str(save_tensorboard(data, output)))


@app.command()
def compare(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="Folders of runs, or their URIs.")],
    output: Annotated[
        str, typer.Option(help="Figure to write: its ending, .png or .svg, says as what.")
    ] = "compare.png",
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, and draw nothing.")] = False,
) -> None:
    """Compare runs of one metric, of other settings or seeds: one table, the best first, and one figure; print its name.

    A run a setting, each under a name of its own: `autolrs_ray.run(..., config={"wd": 0.01}, name="wd-0.01")`.
    """
    from autolrs_ray.show.comparison import comparison, comparison_figure
    from autolrs_ray.show.style import style

    runs = [_load(folder) for folder in run_dirs]
    with _telling():
        rows = comparison(runs)
    if as_json:
        typer.echo(json.dumps(rows, indent=2, allow_nan=False))
        return
    header = [("run", False), ("policy", False), ("LR", True), (rows[0]["metric"], True), ("weights", False), ("steps", True),
              ("compute", True), ("time", True)]  # fmt: skip
    _print_table(header, (
        [row["run"], row["policy"] + ("" if row["done"] else ", not finished"), _number(row["peak_lr"], 3),
         _number(row["value"]), row["weights"], _number(row["steps"]),
         "-" if row["compute"] is None else f"{row['compute']:.2f} T", f"{row['wall_s']:.1f} s"]
        for row in rows
    ))  # fmt: skip
    with _telling(), style():
        figure = comparison_figure(runs)
        if figure is None:
            _fail("nothing to draw yet: none of these runs has reported its metric")
        figure.savefig(output)
    typer.echo(output)


@app.command()
def export(
    run_dir: RunDir,
    form: Annotated[
        Format | None,
        typer.Option("--format", help="Pieces as JSON, or rows step,lr as CSV (default: by OUTPUT's ending, or json)."),
    ] = None,
    output: Annotated[str | None, typer.Option(help="File to write, or its URI (default: standard output).")] = None,
    every: Annotated[int, typer.Option(min=1, help="CSV: a row for every N-th step, and the last.", metavar="N")] = 1,
) -> None:
    """Write the learned schedule, to train again without Ray.

    autolrs_ray.LearnedSchedule.load reads both formats (JSON is exact, and small), LearnedLRScheduler replays it in torch.
    """
    schedule = _load(run_dir).result.schedule
    from autolrs_ray.record.stores import write_bytes

    if not schedule.pieces:
        _fail(f"no schedule yet in {run_dir}: no stage has been committed")
    if form is None:
        form = Format.CSV if output is not None and output.endswith(".csv") else Format.JSON
    with _telling():  # of a folder that is not there, or an envelope that was a function of the user's own
        text = schedule.to_csv(every) if form is Format.CSV else schedule.to_json() + "\n"
        if output is not None:
            write_bytes(output, text.encode())
    if output is None:
        typer.echo(text, nl=False)


if __name__ == "__main__":
    app()
