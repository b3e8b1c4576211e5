"""The HTML report: what is in it, that it fetches nothing and escapes everything, and how a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from autolrs_ray.cli import app
from autolrs_ray.outcome.schedule import LearnedSchedule
from autolrs_ray.record.journal import read_journal
from autolrs_ray.record.record import Record
from autolrs_ray.show.choice import choice
from autolrs_ray.show.page import number, render, save_report, seconds
from autolrs_ray.show.run_data import RunData
from tests.test_plots import PAPER, write_reports, write_run

HOSTILE = "<script>alert('$x_{')</script>"


class Page(HTMLParser):
    """The tags, the attributes and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.code: list[str] = []
        self._style = self._code = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style, self._code = tag == "style", tag == "pre"

    def handle_data(self, data: str) -> None:
        if self._code:
            self.code.append(data)
            self._code = False
        if not self._style:
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("paper"), "paper", 60, (1e-3, 1.0), **PAPER)


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("anchored"), "anchored", 100, (1e-3, 1e3), num_lrs=6)
    rows = [dict(step=step, val_loss=1.0, val_accuracy=step / 200, node_ip="10.0.0.1", pid=7) for step in (50, 100)]
    write_reports(folder, RunData.load(folder).arm, rows)
    return folder


def test_a_paper_run_shows_stages_surrogate_and_forecasts(paper: Path) -> None:
    page = Page(render(RunData.load(paper)))
    commits = RunData.load(paper).history.stages
    for row in commits:
        cells = [str(row["stage"]), f"{row['start']}–{row['end']}", number(row["lr"], 3), number(row["forecast"])]
        assert " ".join([*cells, number(row["loss"])]) in page.text
    schedule, loss, surrogate, forecast = (str(image["alt"]) for image in page.all("img"))
    assert f"The learning rate of every step, {len(commits)} stages, over the interval from 0.001 to 1 " in schedule
    assert f"to {number(commits[-1]['loss'])}." in loss
    assert surrogate.startswith(f"{4 * len(commits)} probes")
    assert f" of {len(commits)} promised more than came true" in forecast
    assert "policy paper, finished" in page.text
    assert "began" in page.text
    assert "num_lrs 4" in page.text
    assert "averaged" not in page.text


def test_an_anchored_run_shows_the_race_and_who_won(anchored: Path) -> None:
    data = RunData.load(anchored)
    html = render(data)
    page = Page(html)
    schedule, loss, accuracy, race = (str(image["alt"]) for image in page.all("img"))
    assert f"{data.result.schedule.peak_lr:.3g} at its peak" in schedule
    assert "averaged weights from" in loss
    assert accuracy.startswith("Validation accuracy from ")
    assert race.endswith(f"{data.result.schedule.peak_lr:.3g} won. Dotted: where they were compared.")
    chosen = choice(data)
    assert chosen is not None
    assert f"How sure the choice is. {chosen.sentence('val_loss')}" in page.text
    assert html.count('<tr class="won">') == 1
    (piece,) = data.result.schedule.pieces
    words = f"times the envelope quadratic, after {piece.warmup_steps} steps of warm-up"
    assert piece.warmup_steps > 0
    assert f"{number(piece.lr, 3)} peak learning rate {words}" in page.text
    assert "1 machine(s), 1 worker process(es)" in page.text
    assert f"{number(data.result.loss)} val_loss final, of averaged weights" in page.text
    assert "val_loss there (raw or averaged)" in page.text


def test_the_environment_is_that_of_the_run_and_not_of_the_machine_that_writes_the_report(tmp_path: Path) -> None:
    def shown(*events: dict[str, Any]) -> str:
        folder = tmp_path / str(len(events))
        config = dict(total_steps=20, policy="paper", lr_interval=None, metric="val_loss", mode="min", time_attr="step")
        start, *more = events
        record = Record(folder)
        record.append([{"event": "start", "config": {**config, "options": {}}, **start}, *more])
        record.close()
        return Page(render(RunData.load(folder))).text.partition("Environment")[2]

    before = dict(python="3.9.1", platform="Plan9", cpus=7, gpus=8, gpu_types=["K80"], packages={"torch": "0.4.1"})
    after = {**before, "packages": {"torch": "1.0.0", "ray": "0.8"}}
    told = shown({"environment": before})
    assert "python 3.9.1 platform Plan9 torch 0.4.1 driver's CPUs 7 cluster's GPUs 8 K80" in told
    told = shown({"environment": before}, {"event": "resume", "step": 3, "environment": after})
    assert "torch 0.4.1, then 1.0.0 " in told
    assert "ray none, then 0.8" in told
    assert "torch" not in shown({}, {"event": "resume", "step": 3}, {"event": "note"})  # a journal without it


def test_the_schedule_in_the_report_is_the_learned_one(anchored: Path) -> None:
    words = Page(render(RunData.load(anchored))).text
    start = words.index('{"format"')
    schedule, _ = json.JSONDecoder().raw_decode(words[start:])
    assert LearnedSchedule.from_json(json.dumps(schedule)) == LearnedSchedule.load(anchored)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_code_that_it_gives_for_a_replay_runs(
    averaged: bool, paper: Path, anchored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = anchored if averaged else paper
    page = Page(render(RunData.load(run)))
    in_torch, under_tune, _ = page.code
    model = torch.nn.Linear(1, 1)
    names: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}
    exec(in_torch, names)
    schedule = LearnedSchedule.load(run)
    assert ("averages" in names) == averaged == ("This run ended in averaged weights" in page.text)
    assert names["scheduler"].get_last_lr() == [schedule.lr_at(0)]
    called: list[Any] = []
    monkeypatch.setattr("ray.tune.run", lambda *arguments, **options: called.append((arguments, options)))
    exec(under_tune, {**names, "trainable": "mine"})
    ((arguments, options),) = called
    assert (arguments, options["config"]) == (("mine",), {"seed": 1, "averaging": True} if averaged else {"seed": 1})
    steps = schedule.total_steps
    assert options["scheduler"].debug_string() == f"AutoLRS replay: {len(schedule.pieces)} pieces, {steps} steps"


def test_it_fetches_nothing_and_runs_the_one_script_that_copies(paper: Path) -> None:
    html = render(RunData.load(paper))
    page = Page(html)
    assert {name for name, _ in page.tags}.isdisjoint({"link", "iframe", "object", "embed"})
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sources = [attributes[key] for _, attributes in page.tags for key in ("src", "srcset", "href") if key in attributes]
    images, (download,) = (
        [str(s) for s in sources if "image/" in str(s)],
        [str(s) for s in sources if "image/" not in str(s)],
    )
    assert len(images) == 8
    assert all(image.startswith("data:image/svg+xml;base64,") for image in images)
    content = base64.b64decode(download.removeprefix("data:application/json;base64,")).decode()
    assert LearnedSchedule.from_json(content) == LearnedSchedule.load(paper)
    policy = next(tag for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    for button in page.all("button"):
        assert f'id="{button["data-copies"]}"' in html


def test_whatever_the_user_names_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    config: dict[str, Any] = dict(total_steps=20, policy="paper", lr_interval=[1e-3, 1.0], metric=HOSTILE, mode="min",
                                  time_attr="step", seed=0, options={"num_lrs": 2})  # fmt: skip
    commit = dict(stage=0, start=0, end=20, lr=0.1, loss=1.0, forecast=1.1, warmup=False, checkpoint="c")
    record = Record(folder)
    record.append([{"event": "start", "config": config}, {"event": "warning", "stage": 0, "message": HOSTILE},
                   {"event": "commit", **commit}])  # fmt: skip
    record.close()
    html = render(RunData.load(folder))
    page = Page(html)
    assert html.count("<script") == 1
    assert (
        page.text.count(HOSTILE) >= 4
    )  # the metric's name at its value, in the table and in the settings; the warning
    assert "not finished: step 20 of 20" in page.text


def test_a_run_that_has_only_started_has_a_report_too(tmp_path: Path) -> None:
    for policy in ("paper", "anchored"):
        config: dict[str, Any] = dict(total_steps=20, policy=policy, lr_interval=None, metric="val_loss", mode="min",
                                      time_attr="step", seed=0, options={})  # fmt: skip
        record = Record(tmp_path / policy)
        record.append([{"event": "start", "config": config}])
        record.close()
        text = Page(render(RunData.load(tmp_path / policy))).text
        assert "No loss has been reported yet" in text
        assert "There is no schedule to replay" in text


@pytest.mark.parametrize("policy", ["paper", "anchored"])
def test_a_run_that_was_ended_says_by_what(policy: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = read_journal(request.getfixturevalue(policy))
    record = Record(tmp_path / "ended")
    record.append([*whole[: 2 * len(whole) // 3], {"event": "advice", "message": "look at the data"}])
    record.append([{"event": "error", "message": "none of the <learning rates> gave a finite loss"}])
    record.close()
    data = RunData.load(tmp_path / "ended")
    last = data.history.rows[-1]
    assert data.result.loss == min(last["loss"], last.get("averaged_loss", last["loss"]))  # of the better weights
    text = Page(render(data)).text
    assert "the run was ended: none of the <learning rates> gave a finite loss" in text
    assert "look at the data" in text


def test_the_command_writes_the_file_it_prints(paper: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen.html"
    for arguments, file in (([], paper / "report.html"), (["--output", str(chosen)], chosen)):
        result = CliRunner().invoke(app, ["report", str(paper), *arguments])
        assert result.stdout.strip() == str(file), result.output
        assert file.read_text().startswith("<!DOCTYPE html>")


def test_mistakes_are_refused(paper: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no journal"):
        save_report(tmp_path)
    with pytest.raises(ValueError, match="steps_per_epoch must be positive, got -1"):
        save_report(paper, steps_per_epoch=-1)
    result = CliRunner().invoke(app, ["report", str(paper), "--output", str(tmp_path / "nowhere" / "report.html")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1


def test_numbers_and_durations_are_short() -> None:
    assert [number(value) for value in (None, 12345, 0.123456, "a")] == ["–", "12,345", "0.1235", "a"]
    assert [seconds(value) for value in (None, 1.26, 125.0, 3725.0)] == ["–", "1.3 s", "2:05 min", "1:02:05 h"]


# -- in a browser --------------------------------------------------------------------------------------------------------


def chromium() -> str:
    """Its path. A machine without it skips the test, but fails it under CI=true, where `make browser` has to come first."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        message = "no Chromium on the PATH: `make browser` installs it (as root, with apt-get)"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return found


def browse(file: Path, *arguments: str) -> str:
    """What headless Chromium prints."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
    profile = f"--user-data-dir={file.parent / 'profile'}"
    command = [chromium(), *flags, profile, *arguments, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


PROBE = """<iframe id="phone" src="report.html" width="390" height="800"></iframe><pre id="told"></pre><script>
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element, style) => {
    const colour = style(element).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(element.parentElement, style) : colour; };
  const contrast = (element, style) => {
    const [low, high] = [light(style(element).color), light(behind(element, style))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05); };
  onload = () => {
    const page = document.getElementById("phone").contentDocument, style = page.defaultView.getComputedStyle;
    const texts = [...page.body.querySelectorAll("*")].filter(element =>
      [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
    const tables = [...page.querySelectorAll(".scroll")];
    document.getElementById("told").textContent = JSON.stringify({
      width: page.documentElement.scrollWidth, tables: tables.every(table => table.scrollWidth <= table.clientWidth),
      images: [...page.images].map(image => image.naturalWidth > 0 && image.complete),
      narrow: [...page.images].every(image => image.currentSrc !== image.src),
      dark: matchMedia("(prefers-color-scheme: dark)").matches, page: style(page.body).backgroundColor,
      legible: texts.every(element => contrast(element, style) >= 4.5),
      large: texts.every(element => parseFloat(style(element).fontSize) >= 12)}); };
</script>"""


@pytest.mark.parametrize("policy", ["paper", "anchored"])
def test_on_a_phone_all_fits_and_can_be_read_in_the_light_and_in_the_dark(
    policy: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    save_report(request.getfixturevalue(policy), tmp_path / "report.html")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE)
    flags = ("--allow-file-access-from-files", "--virtual-time-budget=10000", "--dump-dom")
    told = [
        json.loads(browse(probe, *flags, *scheme).split('<pre id="told">')[1].split("</pre>")[0])
        for scheme in ((), ("--blink-settings=preferredColorScheme=0",))
    ]
    light, dark = ({"dark": False, "page": "rgb(255, 255, 255)"}, {"dark": True, "page": "rgb(20, 23, 26)"})
    common = {"width": 390, "tables": True, "images": [True] * 4, "narrow": True, "legible": True, "large": True}
    assert told == [{**common, **light}, {**common, **dark}]


def test_the_buttons_copy_in_a_browser(anchored: Path, tmp_path: Path) -> None:
    save_report(anchored, tmp_path / "report.html")
    (tmp_path / "press.html").write_text("""<iframe id="page" src="report.html"></iframe><pre id="told"></pre><script>
      onload = () => {
        const page = document.getElementById("page").contentDocument, buttons = [...page.querySelectorAll("button")];
        const shown = buttons.map(button => !button.hidden);
        document.getElementById("told").textContent = JSON.stringify([shown, typeof buttons[0].onclick]); };
    </script>""")
    flags = ("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    told = browse(tmp_path / "press.html", *flags).split('<pre id="told">')[1].split("</pre>")[0]
    assert json.loads(told) == [[True, True], "function"]  # the page's policy lets the script run


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_browser_is_no_silent_pass_where_it_counts(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="`make browser` installs it"):
        chromium()
