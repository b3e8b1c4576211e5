"""The field of the race: who begins, who joins later, and who comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

from autolrs_ray.core.envelopes import LogInterval, bin_centred_grid
from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.core.race.rule import FORK_FROM, Trunk, infill
from autolrs_ray.core.race.state import RaceState


@dataclass
class RaceField(RaceState):
    """The trunks of :class:`~autolrs_ray.core.race.policy.AnchoredPolicy`, which says what the options mean."""

    lr_interval: tuple[float, float] = (1e-5, 10.0)
    plan: RacePlan = field(default_factory=lambda: RacePlan.from_fractions(1000))
    num_lrs: int = 12
    infill: int = 0
    branches: int = 0

    @property
    def breadth(self) -> int:
        joining = self.infill if self.decided == 0 else 0
        return len(self._open()) + (joining or (self.branches if self._parent() else 0))

    def _new_trunk(self, x: float, infill: bool = False) -> Trunk:
        self.trunks.append(Trunk(LogInterval(*self.lr_interval).lr(x), x, infill=infill))
        return self.trunks[-1]

    def _fill_in(self) -> None:
        try:
            xs = infill(self.trunks, self.plan.rungs[0], 1.0 / self.num_lrs, self.infill)
        except Exception as error:  # numerical libraries raise many types, and no in-fill LR is worth the run
            self.emit("warning", stage=0, message=f"surrogate failed ({error}); no in-fill LR")
            return
        for x in xs:
            trunk = self._new_trunk(x, infill=True)
            self.emit("proposal", stage=0, probe=len(self.trunks) - 1, arm=self._arm(len(self.trunks) - 1), lr=trunk.lr,
                      infill=True)  # fmt: skip

    # -- branches ------------------------------------------------------------------------------------------------------

    @property
    def _fork_step(self) -> int | None:
        """Where branches begin; None if there are to be none, or the last rung comes before."""
        late = [rung for rung in self.plan.rungs if rung >= round(FORK_FROM * self.total_steps)]
        return late[0] if late and self.branches else None

    def _forked(self) -> bool:
        return any(trunk.parent is not None for trunk in self.trunks)

    def _parent(self) -> tuple[int, Trunk] | None:
        """The leader, from the decision at the fork until its branches have begun; None where there is nothing to wait for.

        A leader that has a later checkpoint, but none at the fork, gets no branches: that one could not be written.
        """
        fork = self._fork_step
        if fork is None or self.plan.rungs.index(fork) >= self.decided or self._forked():
            return None
        passed = [(number, trunk) for number, trunk in self._open() if fork in trunk.scores]
        if not passed:  # all that led have diverged, and another has started again
            return None
        number, leader = min(passed, key=lambda item: item[1].scores[fork])
        return None if leader.step > fork and number not in self.forks else (number, leader)

    def _branch(self) -> None:
        """Start the branches, once the fork's rung has been decided and the leader's checkpoint there is durable."""
        parent = self._parent()
        if parent is None or parent[0] not in self.forks:
            return
        number, leader = parent
        for x in bin_centred_grid(self.branches):
            lr = leader.lr * 4.0**x
            self.trunks.append(leader.branch(number, lr, LogInterval(*self.lr_interval).x(lr), self.forks[number]))
            self.emit("proposal", stage=0, probe=len(self.trunks) - 1, arm=self._arm(len(self.trunks) - 1), lr=lr,
                      parent=self._arm(number), start=self.forks[number][0])  # fmt: skip
        self.forks = {}

    # -- who comes back ------------------------------------------------------------------------------------------------

    def _revive(self) -> bool:
        """All that were left have diverged: start the best of those dropped below them again, if there is one."""
        bound = min((trunk.lr for trunk in self.trunks if trunk.status == "diverged"), default=0.0)
        fallen = [t for t in self.trunks if t.status == "dropped" and t.lr < bound and t.parent is None]
        if not fallen:
            return False
        trunk = min(fallen, key=lambda trunk: (-max(trunk.scores), trunk.scores[max(trunk.scores)]))
        self._start_again(self.trunks.index(trunk), "all other trunks diverged")
        return True
