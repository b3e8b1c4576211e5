"""Whole fields of learning rates: a race on one is the race that trains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autolrs_ray.training.local import run_local
from autolrs_ray.training.trainer import Trainer
from experiments import fields
from experiments.field_kinds import KINDS


@pytest.mark.parametrize("envelope", ["quadratic", "constant/0"])
def test_a_race_on_a_field_is_the_race_that_trains(envelope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = replace(KINDS["60 steps"], steps=30)
    monkeypatch.setitem(KINDS, "short", kind)
    field = fields.make("short", envelope, 0, num_lrs=4)
    found = fields.race(field)
    policy = fields.policy_of(kind, envelope, 4)
    trainer = Trainer(lambda: kind.build(0), 0, averaging=True)
    run = run_local(policy, trainer)
    assert [e for e in found.events if e["event"] == "decision"] == [e for e in run.events if e["event"] == "decision"]
    assert (found.lr, found.compute) == (run.events[-1]["lr"], run.trained_steps / 30)
    final = min(trainer.evaluate()["loss"], trainer.evaluate(averaged=True)["loss"])
    assert field.finals[field.lrs.index(found.lr)] == final
    assert found.regret == pytest.approx((final - min(field.finals)) / (field.start - min(field.finals)))
