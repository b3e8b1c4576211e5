"""The names of what a run's journal tells, each with the fields that come with it."""

from __future__ import annotations

from enum import StrEnum


class Event(StrEnum):
    """What has happened. Losses are to be minimised (a metric of mode "max" is negated), steps are optimizer steps.

    Every event has "time" as well, in seconds since 1970.
    """

    START = "start"  # a run begins: config, environment, subject (what is trained)
    RESUME = "resume"  # it goes on in another process: step, environment, subject
    EXTEND = "extend"  # it goes on to more steps: total_steps, step, lr
    PROPOSAL = "proposal"  # a learning rate is to be tried: arm, probe, stage, lr
    TRIAL = "trial"  # one keeps checkpoints of an arm: arm, folder (of the trial, in the run's)
    SEGMENT = "segment"  # a trial has trained from start to end: arm, role, stage, lr, workers, began, busy_s (seconds)
    WORKERS = (
        "workers"  # a trial trains with so many from here on: arm, step, workers, slots (so many there is room for)
    )
    COMMIT = "commit"  # a checkpoint counts: arm or stage, start, end, lr, loss, checkpoint
    CHOICE = "choice"  # a stage or the race has chosen: stage, lr
    DONE = "done"  # the run is over: arm, step, loss, checkpoint
    WARNING = "warning"  # something went wrong and was mended: message
    ADVICE = "advice"  # something to know for the next run: message
    ERROR = "error"  # the run has ended with it: message
    # of the paper's policy
    STAGE = "stage"  # a stage begins: stage, start, steps, probe_steps, concurrency
    PROBE = "probe"  # one has ended: stage, probe, arm, lr, status, forecast, stderr, method, series, steps, losses
    SAVED = "saved"  # the leading probe's end state is durable: stage, arm, step, checkpoint
    ROLLBACK = "rollback"  # a stage that diverged or rose is trained again: stage, step, lr, new_lr
    # of the race
    RUNG = (
        "rung"  # a trunk has come to one: arm, probe, lr, step, rung (a share), score, loss, averaged_loss, train_loss
    )
    DECISION = "decision"  # a rung is decided: step, rung, leader, score, judged, kept
    TRUNK = "trunk"  # one joins, waits or has left the race: arm, probe, lr, status, step
