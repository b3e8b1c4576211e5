"""Runs the Python blocks of a library's page, or of a section of docs/integrations.md, and watches the trials' optimizers."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import autolrs_ray

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "integrations.md"
OWN_PAGES = {"Lightning": "lightning.md", "Hugging Face Trainer": "huggingface.md"}


def blocks(section: str) -> list[str]:
    if section in OWN_PAGES:
        return re.findall(r"```python\n(.*?)```", (DOCS / OWN_PAGES[section]).read_text(), re.DOTALL)
    (part,) = (part for part in PAGE.read_text().split("\n## ") if part.startswith(f"{section}\n"))
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


def watched(train: Callable[[dict[str, Any]], None], folder: Path) -> Callable[[dict[str, Any]], None]:
    """`train`, whose optimizer writes the LR of every update to a file of its own in `folder`."""

    def call(config: dict[str, Any]) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        with open(folder / f"{uuid.uuid4().hex}.jsonl", "w", buffering=1) as file:
            print(json.dumps(config["autolrs"]), file=file)
            hook = register_optimizer_step_post_hook(
                lambda optimizer, *_: print(json.dumps(optimizer.param_groups[0]["lr"]), file=file)
            )
            try:
                train(config)
            finally:
                hook.remove()

    return call


def updates(folder: Path) -> list[tuple[dict[str, Any], list[float]]]:
    """(segment, LR of every update) of each time a trial was started."""
    files = [[json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")]
    return [(lines[0], lines[1:]) for lines in files if lines]


def check_every_update(folder: Path) -> None:
    """Every update was made at the LR of its step, counted from the checkpoint, and trials were restored."""
    seen = updates(folder)
    assert any(segment["start"] > 0 and lrs for segment, lrs in seen)
    for segment, lrs in seen:
        config = {"lr": segment["lr"], "autolrs": segment}
        expected = [autolrs_ray.lr_at(config, segment["start"] + i) for i in range(len(lrs))]
        assert lrs == pytest.approx(expected, rel=1e-9), segment["arm"]
        assert len(lrs) <= segment["boundaries"][-1] - segment["start"]


@contextmanager
def updates_here() -> Iterator[list[float]]:
    """The LR of every update of an optimizer in this process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    lrs: list[float] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: lrs.append(float(optimizer.param_groups[0]["lr"])))
    try:
        yield lrs
    finally:
        hook.remove()


def run_section(section: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Execute the blocks of `section` in one namespace, which is returned; their runs are watched, on one slot.

    "replayed" in it: the LR of every update made in this process, which is where the blocks replay.
    """
    run, log = autolrs_ray.run, folder / "updates"
    log.mkdir()

    def watched_run(train: Any, **given: Any) -> Any:
        builds = isinstance(train, type) or "return" in train.__annotations__  # a TrainingTask: not the loop itself
        return run(train if builds else watched(train, log), **{**given, "slots": 1, **options})

    monkeypatch.setattr(autolrs_ray, "run", watched_run, raising=False)
    namespace: dict[str, Any] = {"STORAGE": str(folder)}
    with updates_here() as namespace["replayed"]:
        for block in blocks(section):
            exec(compile(block, section, "exec"), namespace)
    return namespace


class TrialStub:
    """Stands in for Tune's session: keeps reports and copies of checkpoints, and gives out the one to restore."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from ray import tune

        self.reports: list[dict[str, Any]] = []
        self.source: Path | None = None
        self._folder = folder
        monkeypatch.setattr(tune, "report", self._report)
        monkeypatch.setattr(tune, "get_checkpoint", lambda: self.source and tune.Checkpoint(str(self.source)))

    def _report(self, report: dict[str, Any], checkpoint: Any = None) -> None:
        self.reports.append(report)
        if checkpoint is not None:
            shutil.copytree(checkpoint.path, self.checkpoint(report["step"]), dirs_exist_ok=True)

    def checkpoint(self, step: int) -> Path:
        return self._folder / f"step-{step}"


def trunk(start: int, *boundaries: int, lr: float = 0.1, **more: Any) -> dict[str, Any]:
    """The config of a trial that trains from `start` to the last of `boundaries` at `lr`."""
    segment = dict(arm="t00", role="trunk", stage=0, lr=lr, start=start, boundaries=boundaries, reports=1, **more)
    return {"lr": lr, "seed": 0, "autolrs": segment}
