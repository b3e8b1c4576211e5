"""AutoLRSScheduler: what Tune tells a scheduler, passed on to the coordinator. It keeps no durable state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Repeater

from autolrs_ray.driver.coordinator import Coordinator
from autolrs_ray.driver.searcher import PAIR_HELP, AutoLRSSearch
from autolrs_ray.private import controller_of

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


class AutoLRSScheduler(TrialScheduler):
    """Scheduler half of the pair; give it to Tune together with :class:`AutoLRSSearch`. It takes no arguments.

    With it every trial starts from the checkpoint its segment names, the main trial is paused so that its slot serves
    probes, finished probes' actors stay warm, and where nothing can make progress an error is raised that names the state.
    """

    _supports_buffered_results = False  # what a report decides is of the state that was reported

    def __init__(self) -> None:
        super().__init__()
        self._search: AutoLRSSearch | None = None
        self._coordinator: Coordinator | None = None  # from the first trial on
        self._properties: tuple[str | None, str | None] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Keep TuneConfig's metric and mode for the searcher: Tune tells it none where param_space is empty."""
        self._properties = (metric, mode)
        return True

    def _find_search(self, controller: TuneController) -> AutoLRSSearch:
        algorithm: Any = controller.search_alg
        search = algorithm
        while search is not None and not isinstance(search, AutoLRSSearch):
            if isinstance(search, Repeater):
                raise ValueError(
                    "a Repeater trains every learning rate several times: start runs with other seeds instead"
                )
            search = getattr(search, "searcher", None)
        if search is None:
            raise RuntimeError(f"AutoLRSScheduler runs with {type(algorithm).__name__}. {PAIR_HELP}")
        search.desk.take_metric(*self._properties)
        needed = search.policy.trials_needed
        if getattr(algorithm, "total_samples", needed) < needed:
            raise ValueError(
                f"num_samples={algorithm.total_samples} is too small: this run takes at least {needed} trials. "
                "Pass num_samples=-1; AutoLRS ends the run itself."
            )
        return search

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        controller = controller_of(tune_controller)
        if self._search is None:
            self._search = self._find_search(controller)
        if self._coordinator is None:
            self._coordinator = self._search.coordinate(controller, trial)
        self._coordinator.add(trial)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        if self._coordinator is not None:
            self._coordinator.crashed(trial)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        if self._coordinator is not None:
            self._coordinator.ended(trial, result)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        if self._coordinator is not None:
            self._coordinator.ended(trial)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        return self.STOP if self._coordinator is None else self._coordinator.report(trial, result)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        return None if self._coordinator is None else self._coordinator.next_trial()

    def debug_string(self) -> str:
        return "AutoLRS: not started" if self._search is None else self._search.debug_string()
