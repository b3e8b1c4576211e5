"""A run that is begun again, driven without Ray: the same one goes on, another is refused by name."""

from __future__ import annotations

import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from autolrs_ray import AutoLRSError, AutoLRSSearch
from autolrs_ray.driver import coordinator
from tests.fake_tune import RACE, Begin, FakeTune, Trainable, first_step

# -- one run, one process, one search ----------------------------------------------------------------------------------


def test_a_cell_that_was_interrupted_goes_on_in_the_same_process(begin: Begin) -> None:
    run = begin()
    trial = run.start()
    run.report(trial, 1, 1.0)
    again = begin()  # Tune has swallowed the Ctrl-C, and the folder is still open
    again.start()
    assert [event["event"] for event in begin.events if event["event"] in ("start", "resume")] == ["start", "resume"]
    run.search_alg.desk.warn("from the grave")
    run.search_alg.desk.persist()
    assert not begin.told("from the grave")


@pytest.mark.parametrize("policy", ["anchored", "paper"])
def test_it_says_what_it_continues_and_what_had_failed_and_tries_that_again(begin: Begin, policy: str) -> None:
    options: dict[str, Any] = {}
    if policy == "paper":
        for name in ("envelope", "warmup"):
            begin.monkeypatch.delitem(RACE, name)
        options = dict(policy="paper", stage_steps=100, probe_steps=20)
    run = begin(cpus=2, **options)
    run.report(run.start(), 1, 1.0)
    lost = run.start()
    arm, lr = run.search_alg.desk.arm(lost.trial_id), run.search_alg.desk.segment(lost.trial_id).lr
    run.crash(lost, "RuntimeError: no such data set", again=False)
    assert run.search_alg.policy.failures() == [lr]
    run.search_alg.desk.persist()
    run.search_alg.close()
    again = begin(cpus=2, **options)
    again.start()
    again.start()
    desk = again.search_alg.desk
    found = f"continuing {begin.folder}/run at step 0 of 200; 1 learning rate had failed: {lr:.3g}"
    assert desk.told == f"{found}; all will be tried again"
    assert arm in {desk.arm(trial_id) for trial_id in desk.trials}
    assert again.search_alg.policy.failures() == []


def test_a_race_that_has_ended_for_want_of_learning_rates_says_why_when_it_is_begun_again(begin: Begin) -> None:
    run = begin()

    def diverge() -> None:
        for _ in range(9):
            run.report(run.start(), 1, math.nan)

    with pytest.raises(AutoLRSError, match="no learning rate is left in the race"):
        diverge()
    with pytest.raises(
        AutoLRSError, match=r"nothing left to train: no learning rate is left .* Start anew under another"
    ):
        begin().start()


def test_a_run_that_another_thread_drives_is_refused_in_these_words(begin: Begin) -> None:
    run, hold, ready = begin(), threading.Event(), threading.Event()

    def drive() -> None:
        run.start()
        ready.set()
        hold.wait(60)

    thread = threading.Thread(target=drive)
    thread.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match="another thread of this process drives the run"):
        begin().start()
    hold.set()
    thread.join()
    begin().start()  # its thread is gone: nobody drives it any more


def test_a_search_is_used_once(begin: Begin, tmp_path: Path) -> None:
    run = begin()
    run.start()
    other = FakeTune(tmp_path / "other", begin.monkeypatch, run.search_alg, 2)
    with pytest.raises(RuntimeError, match="has driven a run already: make a new one"):
        other.start()
    finished = begin(config={"a": 1}).search_alg
    finished.desk.policy.phase = "done"
    assert finished.suggest("a") == "FINISHED"
    with pytest.raises(RuntimeError, match="has driven a run already: make a new one"):
        finished.suggest("b")


def test_tunes_own_resume_is_refused(tmp_path: Path) -> None:
    search = AutoLRSSearch(100, num_lrs=2)
    with pytest.raises(RuntimeError, match=r'Tuner.restore: run the same command .*resume="auto"') as refused:
        search.restore_from_dir(str(tmp_path))
    with pytest.raises(RuntimeError, match=re.escape(str(refused.value))):
        search.suggest("a")  # Tune has logged the first one, and begins anew


# -- another run of the same name ----------------------------------------------------------------------------------------


class Other(Trainable):
    width = 64


def trained(begin: Begin, **options: Any) -> None:
    """A run that has a checkpoint."""
    run = begin(**options)
    trial = run.start()
    folder = begin.folder / "run" / trial.trial_id / "checkpoint_000000"
    folder.mkdir(parents=True)
    (folder / "w.json").write_text("[]")
    step = first_step(run, trial)
    run.report(trial, step, 1.0)
    run.search_alg.policy.saved(run.search_alg.desk.arm(trial.trial_id), step, str(folder))
    run.search_alg.desk.persist()
    run.search_alg.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"config": {"width": 64}}, "config width: 8 -> 64"),
        ({"config": {}}, "config width: 8 -> None"),
        ({"config": {"width": 8, "wd": 0.1}}, 'config wd: None -> "0.1"'),
        ({"config": {"width": 8}, "trainable": Other}, "trainable: Trainable -> Other"),
    ],
)
def test_another_config_or_trainable_under_the_same_name_is_refused_by_name(
    begin: Begin, options: dict[str, Any], told: str
) -> None:
    trained(begin, config={"width": 8})
    with pytest.raises(ValueError, match=r"goes on with something else .*Choose another name") as raised:
        begin(**options).start()
    assert told in str(raised.value)
    begin(config={"width": 8}).start()  # the same one goes on
    coordinator._driving.clear()


def test_who_insists_gets_it_and_a_warning(begin: Begin) -> None:
    trained(begin, config={"width": 8})
    begin(config={"width": 64}, resume=True).start()
    assert begin.told("resumed with something else: config width: 8 -> 64")


def test_what_has_trained_nothing_may_be_mended(begin: Begin) -> None:
    run = begin(config={"data": "/wrong"})
    run.start()
    run.search_alg.close()
    begin(config={"data": "/right"}).start()


def test_code_may_be_mended_while_a_run_goes_on_and_not_when_it_is_finished(begin: Begin) -> None:
    class Mended(Trainable):
        width = 5

    Mended.__qualname__ = "Trainable"
    trained(begin)
    run = begin(trainable=Mended)
    run.start()
    assert begin.told("the code of Trainable", "has changed since the run began")
    run.search_alg.policy.phase = "done"
    run.search_alg.desk.warn("the end")
    run.search_alg.close()
    begin.monkeypatch.setattr(Mended, "width", 6)
    again = begin(trainable=Mended)
    again.start()
