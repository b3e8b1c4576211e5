"""The state of a run while it goes on, instead of Tune's tables: one line, and the trunks still in the race below it.

In a terminal and in a notebook it is one display that is updated, elsewhere a line per change.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING, Any

from ray.tune import Callback
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autolrs_ray.core.race.policy import AnchoredPolicy
from autolrs_ray.driver.usage import SlotUse

if TYPE_CHECKING:
    from autolrs_ray.driver.searcher import AutoLRSSearch

INTERVAL_S = 0.25
MAX_TRUNKS = 8  # lines of the race; the rest are counted


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _notebook() -> Any | None:
    """IPython's module of displays, where this process is a notebook's; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return import_module("IPython.display")


class Stderr:
    """Standard error, and nothing once it could not be written: a run outlives whoever reads it, and a full disk."""

    def __init__(self) -> None:
        self._stream: Any = sys.stderr or sys.stdout
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        self._unless_lost("write", text)

    def flush(self) -> None:
        self._unless_lost("flush")

    def _unless_lost(self, verb: str, *given: str) -> None:
        if self._lost:
            return
        try:
            getattr(self._stream, verb)(*given)
        except (OSError, ValueError):  # a pipe that nobody reads, a full disk; a file that is closed
            self._lost = True


class _Cell:
    """One display in the output of a notebook's cell."""

    def __init__(self, displays: Any) -> None:
        self._displays, self._handle = displays, None

    def show(self, view: Any) -> None:
        console = Console(file=StringIO(), width=110, record=True, force_jupyter=False)
        console.print(view)
        html = self._displays.HTML(console.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))
        if self._handle is None:
            self._handle = self._displays.display(html, display_id=True)
        else:
            self._handle.update(html)


class LiveProgress(Callback):  # type: ignore[misc]
    """Shows stage, trials, learning rate, metric, slots and time left; a line per change where nothing can be updated."""

    def __init__(self, search: AutoLRSSearch) -> None:
        self._desk = search.desk
        stderr: Any = Stderr()
        self._console = Console(file=stderr)
        self._live: Live | None = None
        displays = _notebook()
        self._cell = None if displays is None else _Cell(displays)
        self._began, self._shown, self._first_step = time.monotonic(), 0.0, -1
        self._last: tuple[Any, ...] = ()
        self._use = SlotUse()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now - self._shown < INTERVAL_S or not self._desk.capacity.begun:
            return
        self._shown = now
        self._use.sample(now, self._desk.capacity.busy, self._desk.capacity.slots)
        progress = self._desk.policy.progress()
        if self._first_step < 0:
            self._first_step = progress["step"]
            name, slots = self._desk.settings.policy_name, self._desk.capacity.slots
            usual, most = self._desk.policy.usual(slots), self._desk.policy.cost(slots)
            together = self._desk.policy.usual(self._desk.settings.side_by_side(slots))[0] / slots
            elastic = self._desk.settings.elastic
            grown = f", {together:.2g} T where trials grow into all of them" if elastic else ""
            if self._desk.told:
                self._console.print(f"AutoLRS: {self._desk.told}", highlight=False, soft_wrap=True, markup=False)
            words = f"{usual[0]:.1f} T of compute and {usual[1]:.1f} T of wall-clock on {slots} slots{grown}"
            told = (
                f"at most {words}"
                if usual == most
                else f"mostly about {words}; at most {most[0]:.1f} and {most[1]:.1f} T"
            )
            self._console.print(f"AutoLRS {name}: {told} (T = {progress['total_steps']} steps)",
                                highlight=False, soft_wrap=True, markup=False)  # fmt: skip
        if self._cell is not None:
            self._cell.show(self.view(progress))
        elif self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, transient=True, auto_refresh=False)
                self._live.start()
            self._live.update(self.view(progress), refresh=True)
        else:
            change = tuple(progress[name] for name in ("phase", "stage", "resolved", "lr", "step"))
            if change != self._last:
                self._last = change
                self._console.print(self.line(progress), highlight=False, soft_wrap=True, markup=False)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if self._cell is not None and self._desk.capacity.begun:
            self._cell.show(self.view(self._desk.policy.progress()))
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._desk.policy.done and self._desk.trained_steps:
            policy, first = self._desk.policy, max(0, self._first_step)
            since = f" since it was resumed at step {first}" if first else ""
            took = f"{self._desk.trained_steps / policy.total_steps:.1f} T of compute{since}"
            told = (
                f"AutoLRS {self._desk.settings.policy_name}: took {took}, {_duration(time.monotonic() - self._began)}"
            )
            self._console.print(told, highlight=False, soft_wrap=True, markup=False)

    def view(self, progress: dict[str, Any]) -> Group:
        """The line, another of what share of the slots was held when, and under the anchored policy the trunks in the race: LR,
        score at the last rung, steps trained."""
        policy = self._desk.policy
        line = Text(f"{self.line(progress)}\n  {self._use.line()}")
        if not isinstance(policy, AnchoredPolicy):
            return Group(line)
        racing = policy.race.standing()
        table = Table.grid(padding=(0, 2))
        for lr, score, reached in racing[:MAX_TRUNKS]:
            table.add_row(f"  lr {lr:.3g}", self._metric(score), ProgressBar(policy.total_steps, reached, width=30))
        more = len(racing) - MAX_TRUNKS
        return Group(line, table, Text(f"  and {more} more")) if more > 0 else Group(line, table)

    def _metric(self, loss: float | None) -> str:
        """The metric as it was reported, of a loss that the policy goes by."""
        settings = self._desk.settings
        name = "loss" if settings.loss_key == "val_loss" else settings.loss_key
        return f"{name} -" if loss is None else f"{name} {settings.sign * loss:.4g}"

    def line(self, progress: dict[str, Any]) -> str:
        """The line for one state of the policy."""
        desk = self._desk
        parts = [f"AutoLRS {desk.settings.policy_name}"]
        if desk.settings.policy_name == "paper":
            parts.append(f"stage {progress['stage'] + 1}/{progress['stages']} {progress['phase']}")
            parts.append(f"probes {progress['resolved']}/{progress['trials']}")
        else:
            parts.append(f"rung {progress['stage']}/{progress['stages']}")
            parts.append(f"{progress['trials'] - progress['resolved']} of {progress['trials']} LRs in the race")
        parts.append(f"lr {progress['lr']:.3g}" if progress["lr"] is not None else "lr -")
        parts.append(self._metric(progress["loss"]))
        parts.append(f"step {progress['step']}/{progress['total_steps']}")
        parts.append(f"{desk.capacity.busy}/{desk.capacity.slots} slots")
        elapsed = time.monotonic() - self._began
        left = self._left_s(progress, elapsed)
        parts.append(f"{_duration(elapsed)} gone" + ("" if left is None else f", about {_duration(left)} left"))
        return " | ".join(parts)

    def _left_s(self, progress: dict[str, Any], elapsed_s: float) -> float | None:
        """By what a step has taken so far: of the wall-clock that runs take, what has not gone; in the end, the steps left."""
        desk, total, step_s = self._desk, progress["total_steps"], self._desk.step_s
        if step_s is None:
            return None
        wall = desk.policy.usual(desk.capacity.places)[1]
        still = wall * (total - max(0, self._first_step)) * step_s - elapsed_s
        return max(still, (total - progress["step"]) * step_s)
