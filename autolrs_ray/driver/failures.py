"""What follows when a trial crashes: for its arm, and for the run."""

from __future__ import annotations

import re
from collections import Counter

from ray.tune.experiment import Trial

from autolrs_ray.core.policy import AutoLRSError
from autolrs_ray.driver.crashes import Crash, Crashes
from autolrs_ray.driver.desk import Desk

_NO_RESET = "Trainable runner reuse requires reset_config() to be"  # Tune's words


def no_reset(trial: Trial, crash: Crash) -> AutoLRSError | None:
    """What ends the run where Tune cannot reuse the actors of `trial`, which has crashed so; None for any other crash."""
    if _NO_RESET not in crash.error:
        return None
    name = re.sub("-[0-9a-f]{8}$", "", trial.trainable_name)  # `run` has added that
    return AutoLRSError(
        f"{name} cannot be reused: its reset_config returns False. Implement it (take the new config, return "
        "True) or run with reuse_actors=False."
    )


class Failures:
    """Books crashes on the desk as what they say: of the code, of a learning rate, or of nothing but bad luck.

    max_failures: how often an arm may fail before it runs; negative: as often as it likes.
    """

    def __init__(self, desk: Desk, max_failures: int) -> None:
        self._desk, self._max_failures = desk, max_failures
        self._crashes = Crashes()
        self._restarts: Counter[str] = Counter()  # arm -> its trials that failed before they ran

    def judge(self, trial: Trial, crash: Crash, step: int | None) -> bool:
        """Take in a crash of `trial`, which is on the desk. step: of its last report, None if there was none.

        True if it says nothing by itself and the trial had not run yet: it was given an idle actor, which had died, or which
        cannot be reset.
        """
        desk, trial_id = self._desk, trial.trial_id
        arm, in_setup = desk.arm(trial_id), trial.status == Trial.PENDING
        hopeless = self._crashes.hopeless(arm, crash, in_setup or crash.in_creation) if desk.untouched else ""
        if error := no_reset(trial, crash):
            desk.fail(error)
        elif hopeless:
            desk.fail(AutoLRSError(f"{hopeless}. Mend it, and run the same command again"))
        elif crash.numeric and not in_setup:
            desk.book_divergence(trial_id, desk.segment(trial_id).start if step is None else step, str(crash))
        elif self._crashes.again(arm, crash):
            desk.book_failure(trial_id, f"{crash}, twice")
        elif in_setup:
            self._start_again(trial_id)
            return True
        return False

    def _start_again(self, trial_id: str) -> None:
        """Within max_failures, have the arm of a trial that failed before it ran asked for anew: Tune only retries trials that
        fail while they run."""
        desk, arm = self._desk, self._desk.arm(trial_id)
        if 0 <= self._max_failures <= self._restarts[arm]:
            return
        self._restarts[arm] += 1
        desk.warn(f"{arm} failed before it ran, and starts again: {desk.reason(trial_id)}")
        desk.forget(trial_id)
