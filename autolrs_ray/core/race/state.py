"""What the race remembers: its trunks, all that a restart needs, and the checkpoints it can go back to."""

from __future__ import annotations

from dataclasses import dataclass, field

from autolrs_ray.core.policy import Point, Policy, way_on
from autolrs_ray.core.race.rule import Trunk


@dataclass
class RaceState(Policy):
    """The state of :class:`~autolrs_ray.core.race.policy.AnchoredPolicy`, which decides what becomes of it."""

    # durable state
    trunks: list[Trunk] = field(default_factory=list)
    decided: int = 0
    phase: str = "race"
    forks: dict[int, tuple[int, str]] = field(default_factory=dict)  # trunk -> its checkpoint where branches begin
    warmup_steps: int = field(init=False)  # of the run as it began: extending it changes none of them

    # volatile
    _points: dict[str, list[Point]] = field(default_factory=dict, init=False, repr=False)
    _crossings: dict[str, list[Point]] = field(default_factory=dict, init=False, repr=False)
    _unsaved: set[str] = field(default_factory=set, init=False, repr=False)

    @property
    def done(self) -> bool:
        return self.phase == "done"

    def _arm(self, index: int) -> str:
        return f"t{index:02d}"

    def _open(self) -> list[tuple[int, Trunk]]:
        return [(i, trunk) for i, trunk in enumerate(self.trunks) if trunk.status == "open"]

    def _end(self, index: int, status: str) -> None:
        trunk = self.trunks[index]
        trunk.status = status
        self.forks.pop(index, None)  # its checkpoint there may be deleted now, and should it start again, it is gone
        self._forget(self._arm(index))
        self.emit("trunk", arm=self._arm(index), probe=index, lr=trunk.lr, status=status, step=trunk.step)

    def _forget(self, arm: str) -> None:
        self._points.pop(arm, None)
        self._crossings.pop(arm, None)
        self._unsaved.discard(arm)

    def is_open(self, arm: str) -> bool:
        return not self.done and self.trunks[int(arm[1:])].status == "open"

    def lost(self, path: str) -> None:
        for index, trunk in enumerate(self.trunks):
            if trunk.previous and trunk.previous[1] == path:
                trunk.previous = None
            if trunk.held and trunk.held[1] == path:
                trunk.held = None
            if self.forks.get(index, (0, ""))[1] == path:
                del self.forks[index]
            if trunk.origin and trunk.origin[1] == path:
                trunk.origin = None
            if trunk.checkpoint == path and trunk.status in ("open", "won"):
                self._go_back(index, trunk)

    def _go_back(self, index: int, trunk: Trunk) -> None:
        """To the checkpoint before the last, which is lost. A branch that has none left leaves the race: it has no beginning
        of its own. If it was the last trunk, its parent starts again."""
        path, back = trunk.checkpoint, trunk.previous or trunk.origin
        if trunk.status == "won":
            trunk.status, self.phase = "open", "race"
        if back is None and trunk.parent is not None:
            self._end(index, "failed")
            if not self._open():
                self._start_again(trunk.parent, "all other trunks have lost their checkpoints")
            return
        trunk.step, trunk.checkpoint = back or (0, None)
        trunk.previous = None
        self._forget(self._arm(index))
        self.emit("warning", stage=0, message=f"checkpoint {path} is unreadable; back to step {trunk.step}")

    def _start_again(self, index: int, reason: str) -> None:
        self.trunks[index].restart()
        message = f"{reason}; LR {self.trunks[index].lr:.3g} starts again"
        self.emit("warning", stage=0, arm=self._arm(index), message=message)

    def last_good(self, arm: str) -> str:
        trunk = self.trunks[int(arm[1:])]
        return way_on(trunk.checkpoint, trunk.step, "it had not reached its first rung")

    def checkpoints(self) -> set[str]:
        alive = [trunk for trunk in self.trunks if trunk.status in ("open", "won")]
        paths = {trunk.checkpoint for trunk in alive} | {trunk.previous[1] for trunk in alive if trunk.previous}
        paths |= {trunk.held[1] for trunk in alive if trunk.held}
        paths |= {trunk.origin[1] for trunk in alive if trunk.origin}
        paths |= {path for number, (_, path) in self.forks.items() if self.trunks[number] in alive}
        return {path for path in paths if path is not None}
