"""A run as one HTML file: tables, figures and the learned schedule, with nothing to fetch from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from textwrap import fill
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from autolrs_ray.core.events import Event
from autolrs_ray.record.stores import join, normal, printable, write_bytes
from autolrs_ray.show import captions
from autolrs_ray.show.cost_figures import slots_figure
from autolrs_ray.show.main_figures import accuracy_figure, learning_rate_figure, loss_figure
from autolrs_ray.show.race_figure import race_figure
from autolrs_ray.show.run_data import RunData
from autolrs_ray.show.search_figures import forecast_figure, surrogate_figure
from autolrs_ray.show.style import legend_below, show_names_as_they_are, style
from autolrs_ray.show.summary import summary

REPORT_FILE = "report.html"
NARROW_IN = 4.2  # inches: at the width of a phone the letters are then as large as the text around them
LETTERS = 30  # that fit into a title of that width

SCRIPT = """
for (const button of document.querySelectorAll("button[data-copies]")) {
  button.hidden = false;
  button.onclick = async () => {
    const source = document.getElementById(button.dataset.copies);
    let done = true;
    try { await navigator.clipboard.writeText(source.textContent); } catch {
      getSelection().selectAllChildren(source);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
}
"""  # all that runs: its hash stands in the page's policy

Row = dict[str, Any]
Draw = Callable[[RunData], Any | None]
Caption = Callable[[RunData], str]


def save_report(
    run: str | os.PathLike[str] | RunData,
    output: str | os.PathLike[str] | None = None,
    steps_per_epoch: float | None = None,
) -> str:
    """Write the report of `run`, a folder or its URI, finished or not; returns the file's path or URI.

    output: file to write, or its URI (default: report.html in the run's folder). steps_per_epoch: optimizer steps per epoch,
    for the accuracy's axis, where the trials do not report "epoch".

    Raises FileNotFoundError where there is no journal, ValueError if the run never started or steps_per_epoch <= 0.
    """
    if steps_per_epoch is not None and not steps_per_epoch > 0:
        raise ValueError(f"steps_per_epoch must be positive, got {steps_per_epoch}")
    data = RunData.of(run)
    target = join(os.fspath(data.history.folder), REPORT_FILE) if output is None else os.fspath(output)
    write_bytes(target, render(data, steps_per_epoch).encode())
    return target


def render(data: RunData, steps_per_epoch: float | None = None) -> str:
    """The report as HTML. Everything that comes from the run is escaped."""
    environment = Environment(
        loader=PackageLoader("autolrs_ray.show", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, lr=lambda value: number(value, 3), seconds=seconds)
    found = summary(data)
    main, search, cost = _figures(data, steps_per_epoch)
    schedule = _schedule(data)
    name = printable(os.path.basename(normal(data.history.folder)))
    return environment.get_template("report.html.j2").render(
        found=found, name=name, main=main, search=search, cost=cost, headline=_headline(data, found), averaged=_averaged(data),
        ends_averaged=data.result.weights == "averaged",
        settings=_settings(data), environment=_environment(data), schedule=schedule, folder=_quoted(data),
        download=None if schedule is None else _data_uri("application/json", schedule.encode()), script=SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )  # fmt: skip


def number(value: Any, digits: int = 4) -> str:
    """A table's cell: thousands separators for whole numbers, `digits` significant ones for others, a dash for None."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def seconds(value: float | None) -> str:
    """12.3 s, 4:05 min or 3:02:01 h."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 100.0:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def _headline(data: RunData, found: Row) -> list[tuple[str, str, str]]:
    """(value, what it is, a remark) of the few numbers that come first."""
    lrs = [piece.lr for piece in data.result.schedule.pieces]
    if not lrs:
        lr = ("–", "learning rate", "nothing committed yet")
    elif data.anchored:
        envelope = data.history.envelope
        ramp = data.result.schedule.pieces[0].warmup_steps
        lr = (number(lrs[0], 3), "peak learning rate", f"times the envelope {envelope}, after {ramp} steps of warm-up")
    else:
        lr = (f"{number(min(lrs), 3)} to {number(max(lrs), 3)}", "learning rates", f"{len(lrs)} pieces")
    when = "final" if found["done"] else "so far"
    value = (
        number(found["value"]),
        data.metric,
        f"{when}, of {data.result.weights} weights" if _averaged(data) else when,
    )
    totals = found["totals"]
    compute = ("–" if totals["compute"] is None else f"{totals['compute']:.2f} T", "compute",
               "T: one plain training" if found["done"] else "T: the main run's steps so far")  # fmt: skip
    wall = (seconds(totals["wall_s"]), "wall-clock", f"{number(totals['main_steps'])} steps")
    return [lr, value, compute, wall]


def _averaged(data: RunData) -> bool:
    """True where the race looked at averaged weights too: scores and the final value are of the better of both."""
    return data.anchored and any(event.get("averaged_loss") is not None for event in data.history.named(Event.RUNG))


def _settings(data: RunData) -> list[tuple[str, str]]:
    """The run's configuration as (name, JSON value)."""
    plain = {key: value for key, value in data.config.items() if key != "options" and value is not None}
    return [(key, _json(value)) for key, value in {**plain, **data.config["options"]}.items()]


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _environment(data: RunData) -> list[tuple[str, str]]:
    """When the run was, on how many machines, and what its journal says of software and hardware (older ones: nothing)."""
    times = [event["time"] for event in data.history.events if "time" in event]
    rows = [row for reports in data.reports.values() for row in reports]
    machines, processes = ({row.get(key) for row in rows} - {None} for key in ("node_ip", "pid"))
    told = [("began", _utc(times[0])), ("last entry", _utc(times[-1]))] if times else []
    if machines:
        told.append(("trained on", f"{len(machines)} machine(s), {len(processes)} worker process(es)"))
    lives = [_flat(life) for life in data.history.lives]
    for name in dict.fromkeys(name for life in lives for name in life):
        values = dict.fromkeys(life.get(name, "none") for life in lives)
        told.append((name, ", then ".join(values)))  # more than one where the run was resumed elsewhere
    return told


def _flat(environment: Row) -> dict[str, str]:
    """Name -> value of what a journal's "environment" tells."""
    told: dict[str, str] = {name: str(environment[name]) for name in ("python", "platform") if name in environment}
    told |= {name: str(version) for name, version in environment.get("packages", {}).items()}
    if environment.get("cpus"):
        told["driver's CPUs"] = str(environment["cpus"])
    if environment.get("gpus"):
        told["cluster's GPUs"] = " ".join([str(environment["gpus"]), *environment.get("gpu_types", [])])
    return told


def _utc(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _schedule(data: RunData) -> str | None:
    """The learned schedule as JSON; None before the first commit, or under an envelope of the user's own."""
    try:
        return data.result.schedule.to_json() if data.result.schedule.pieces else None
    except ValueError:
        return None


def _quoted(data: RunData) -> dict[str, str]:
    """The run folder as an argument of a shell and as a Python literal."""
    folder = printable(str(data.history.folder))
    return {"shell": shlex.quote(folder), "python": repr(folder)}


# -- figures -------------------------------------------------------------------------------------------------------------


def _figures(data: RunData, steps_per_epoch: float | None) -> tuple[list[Row], list[Row], list[Row]]:
    """What there is of the main run, of the search and of what it cost."""
    accuracy = partial(accuracy_figure, steps_per_epoch=steps_per_epoch)
    drawn: tuple[tuple[tuple[Draw, Caption], ...], ...] = (
        ((learning_rate_figure, captions.of_schedule), (loss_figure, captions.of_loss), (accuracy, captions.of_accuracy)),
        (
            (race_figure, captions.of_race), (surrogate_figure, captions.of_surrogate),
            (forecast_figure, captions.of_forecasts),
        ),
        ((slots_figure, captions.of_slots),),
    )  # fmt: skip
    with style():
        main, search, cost = (
            [picture for draw, caption in part if (picture := _picture(data, draw, caption))] for part in drawn
        )
    return main, search, cost


def _picture(data: RunData, draw: Draw, caption: Caption) -> Row | None:
    """A figure as two images, for wide and for narrow screens; None where there is nothing to draw."""
    figure = draw(data)
    if figure is None:
        return None
    show_names_as_they_are(figure)
    wide = _image(figure)
    _narrow(figure)
    return dict(caption=caption(data), wide=wide, narrow=_image(figure))


def _image(figure: Any) -> str:
    """An SVG image; as an image it cannot run scripts, and its ids do not clash with another's."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri("image/svg+xml", buffer.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _narrow(figure: Any) -> None:
    """Lay `figure` out anew for a narrow screen: panels below one another, legends in one or two columns."""
    from matplotlib.text import Text

    panels = [axes for axes in figure.axes if axes.get_visible() and axes.get_subplotspec() is not None]
    height = figure.get_figheight()
    if len(panels) > 1 and panels[0].get_gridspec().ncols > 1:
        grid = figure.add_gridspec(len(panels), 1)
        for i, axes in enumerate(panels):
            axes.set_subplotspec(grid[i])
        height = 1.8 + 2.4 * len(panels)
    figure.set_size_inches(NARROW_IN, max(height * 0.85, NARROW_IN))
    for legend in list(figure.legends):
        longest = max((len(text.get_text()) for text in legend.get_texts()), default=0)
        legend.remove()
        legend_below(figure, columns=2 if longest <= LETTERS // 2 else 1)
    titles = {axes.get_title(loc="left") for axes in figure.axes} | {figure.get_suptitle()}
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() in titles - {""}):
        text.set_text(fill(text.get_text(), LETTERS))
