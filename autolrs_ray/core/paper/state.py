"""What the paper's policy remembers: all that a restart needs, as JSON values, and the checkpoints it can go back to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from autolrs_ray.core.checks import conforming, require_int, require_one_of, validate_interval
from autolrs_ray.core.envelopes import EnvelopeSpec
from autolrs_ray.core.paper.plan import Stage, StagePlan
from autolrs_ray.core.paper.probes import best_of
from autolrs_ray.core.paper.proposals import Probe, ProposalRule
from autolrs_ray.core.policy import Point, Policy, way_on

MAIN = "main"
"""The arm of the run itself."""


@dataclass
class PaperState(Policy):
    """The state of :class:`~autolrs_ray.core.paper.policy.PaperPolicy`, which decides what becomes of it."""

    # options
    lr_interval: tuple[float, float] = (1e-3, 1e-1)
    plan: StagePlan = field(default_factory=lambda: StagePlan(8000, 1000, 8000, 100))
    num_lrs: int = 10
    kappa: float = 2.0
    initial: str = "grid"
    fit: str = "map"
    series: str = "authors"
    probe_reports: int = 16
    main_reports: int = 8
    promote: bool = True
    floor: float | None = 0.0
    envelope: EnvelopeSpec = None
    points_to_evaluate: Sequence[float] | None = None

    # durable state
    phase: str = "search"
    stage: Stage = field(init=False)
    step: int = 0
    checkpoint: str | None = None
    previous: dict[str, Any] | None = None
    loss: float | None = None  # where the stage started; `train_loss` likewise, where it is reported
    train_loss: float | None = None
    first_loss: float | None = None  # of the run, as far as it was measured
    q: int = 0
    interval: tuple[float, float] = field(init=False)
    rounds: int = 0
    rollbacks: int = 0
    probes: list[Probe] = field(default_factory=list)
    chosen: int | None = None

    # derived
    _rule: ProposalRule = field(init=False, repr=False)
    _stages: int = field(default=0, init=False, repr=False)

    # volatile
    _end: Point | None = field(default=None, init=False, repr=False)  # of a stage, until that is durable
    _points: dict[str, list[Point]] = field(default_factory=dict, init=False, repr=False)

    def _arm(self, index: int) -> str:
        return f"s{self.stage.index:03d}p{index:02d}"

    def _keep_leading(self) -> None:
        """Let go of all probes' checkpoints but the leading one's: `checkpoints` allows their deletion."""
        leading = self._leading()
        for i, probe in enumerate(self.probes):
            if i != leading:
                probe.checkpoint = None

    def _leading(self) -> int | None:
        return best_of(self.probes) if self.chosen is None else self.chosen

    @property
    def done(self) -> bool:
        return self.phase == "done"

    def is_open(self, arm: str) -> bool:
        if arm == MAIN:
            return not self.done
        return self.phase == "search" and any(
            self._arm(i) == arm and probe.status == "open" for i, probe in enumerate(self.probes)
        )

    def failures(self) -> list[float]:
        return [probe.lr for probe in self.probes if probe.status == "failed"] if self.phase == "search" else []

    def progress(self) -> dict[str, Any]:
        resolved = sum(probe.status != "open" for probe in self.probes)
        best = self._leading()
        return dict(
            phase=self.phase, stage=self.stage.index, stages=self._stages, resolved=resolved,
            trials=max(len(self.probes), (self.rounds + 1) * self.num_lrs),
            lr=self.probes[best].lr if best is not None else None, loss=self.loss, step=self.step,
            total_steps=self.total_steps,
        )  # fmt: skip

    def checkpoints(self) -> set[str]:
        leading = self._leading()
        paths = {self.checkpoint, self.probes[leading].checkpoint if leading is not None else None}
        if self.previous is not None:
            paths.add(self.previous["checkpoint"])
        return {path for path in paths if path is not None}

    def last_good(self, arm: str) -> str:
        return way_on(self.checkpoint, self.step, "the run was in its first stage")

    def _remember_stage(self, lr: float, forecast: float | None) -> None:
        """The stage that is being committed is the one to go back to, should the checkpoint at its end be lost."""
        self.previous = dict(stage=asdict(self.stage), step=self.step, checkpoint=self.checkpoint, lr=lr,
                             forecast=forecast, loss=self.loss, train_loss=self.train_loss)  # fmt: skip

    def _return_to_stage(self, back: dict[str, Any]) -> None:
        """Train the stage of `back`, which `_remember_stage` left, again at the LR it was trained at."""
        self.stage, self.step, self.checkpoint = Stage(**back["stage"]), back["step"], back["checkpoint"]
        self.loss, self.train_loss = back.get("loss"), back.get("train_loss")
        self.probes = [Probe(back["lr"], 0.0, "done", back["forecast"])]
        self.phase, self.chosen = "train", 0
        self.rounds = self.rollbacks = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(
            policy="paper", phase=self.phase, stage=asdict(self.stage), step=self.step, checkpoint=self.checkpoint,
            previous=self.previous, loss=self.loss, train_loss=self.train_loss, first_loss=self.first_loss, q=self.q,
            interval=list(self.interval),
            rounds=self.rounds, rollbacks=self.rollbacks, concurrency=self.concurrency,
            probes=[asdict(probe) for probe in self.probes], chosen=self.chosen,
        )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("policy") != "paper":
            raise ValueError(f"this state belongs to policy {state.get('policy')!r}, not to 'paper'")
        saved = conforming(
            "the state", {name: state.get(name) for name in _SAVED}, _SAVED
        )  # those of the past lack some
        phase, probes, chosen = saved["phase"], saved["probes"], saved["chosen"]
        require_one_of("phase", phase, ("warmup", "search", "train", "done"))
        for probe in probes:
            require_one_of("status", probe.status, ("open", "done", "diverged", "failed"))
        if chosen is None and phase == "train":
            raise ValueError("a stage is trained, and no probe is chosen")
        if chosen is not None:
            require_int("chosen", chosen, 0, len(probes) - 1)
        for stage in (saved["stage"], *([back.stage] if (back := saved["previous"]) else [])):
            if stage.index < 0 or stage.start < 0 or not 1 <= stage.probe_steps <= stage.steps:
                raise ValueError(f"a stage cannot be {stage}")
        self.phase, self.probes, self.chosen, self.stage = phase, probes, chosen, saved["stage"]
        self.step, self.checkpoint, self.loss, self.q = saved["step"], saved["checkpoint"], saved["loss"], saved["q"]
        self.train_loss, self.first_loss, self.previous = saved["train_loss"], saved["first_loss"], state["previous"]
        self.interval, self.rounds = validate_interval(saved["interval"]), require_int("rounds", saved["rounds"], 0)
        self.rollbacks = require_int("rollbacks", saved["rollbacks"], 0)
        self.concurrency = require_int("concurrency", saved["concurrency"], 1)  # it shapes the proposals: as they began
        self._issued, self._points, self._events, self._end = set(), {}, [], None


@dataclass
class _Previous:
    """What `_remember_stage` leaves."""

    stage: Stage
    step: int
    checkpoint: str | None
    lr: float
    forecast: float | None
    loss: float | None = None
    train_loss: float | None = None


_SAVED: dict[str, Any] = dict(
    phase=str, stage=Stage, step=int, checkpoint=str | None, previous=_Previous | None, loss=float | None,
    train_loss=float | None, first_loss=float | None, q=int, interval=tuple[float, float], rounds=int, rollbacks=int,
    concurrency=int, probes=list[Probe], chosen=int | None,
)  # fmt: skip
