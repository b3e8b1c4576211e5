"""The slots of a run: how many there are, and who holds how many."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Capacity:
    """least: workers of a trial that holds one slot, as far as the run knows. slots: trials that fit side by side; of trials
    that grow, the smallest. units: slots that a trial begins with next. busy: slots that trials hold, or are about to.
    places: trials that fit side by side as large as they are. begun: it is known how many fit; before that, nothing runs."""

    least: int = 1
    slots: int = 1
    units: int = 1
    busy: int = 0
    places: int = 1
    begun: bool = False
    _held: dict[str, int] = field(default_factory=dict)  # trial -> the slots that it holds when it trains

    @property
    def room(self) -> bool:
        """Whether one more trial fits."""
        return not self.busy or self.busy + self.units <= self.slots

    def held(self, trial_id: str) -> int:
        """Slots that the trial holds when it trains."""
        return self._held.get(trial_id, 1)

    def workers(self, trial_id: str) -> int:
        """Processes that train the trial together."""
        return self.least * self.held(trial_id)

    def take(self, trial_id: str, units: int | None = None) -> None:
        """The trial is to hold so many from its next start on; by default those that are to be begun with."""
        self._held[trial_id] = self.units if units is None else units

    def give_back(self, trial_id: str) -> None:
        self._held.pop(trial_id, None)

    def clear(self) -> None:
        """No trial is left."""
        self._held.clear()
        self.busy = 0

    def count(self, active: dict[str, bool]) -> None:
        """active: the trials that train or are about to; False for those that have ended, and keep their slots until these
        are wanted."""
        units = {trial_id: self.held(trial_id) for trial_id in active}
        self.busy = sum(held for trial_id, held in units.items() if active[trial_id])
        self.places = len(units) + max(0, self.slots - sum(units.values())) // self.units
