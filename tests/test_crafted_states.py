"""States of another making: one whose checksum fits may say anything; a run goes on with it, or is refused in a line."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolrs_ray import AutoLRSError
from autolrs_ray.record.journal import JOURNAL_FILE, sealed
from autolrs_ray.record.record import STATE_FILE
from tests.test_history import HOSTILE
from tests.test_settings import opened, train

RUNS: dict[str, dict[str, Any]] = {
    "paper": dict(policy="paper", total_steps=400, stage_steps=50, num_lrs=3),
    "anchored": dict(policy="anchored", total_steps=400, num_lrs=4),
}


@pytest.fixture(scope="module", autouse=True)
def _undamaged() -> Iterator[None]:
    """Checkpoints are names only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autolrs_ray.driver.stored.Stored.damage", lambda self, path: "")
        yield


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """By policy: the states, with the journals, of runs that have trained few segments, many, and all."""
    found: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for policy, options in RUNS.items():
        for segments in (2, 9, 1000):
            folder = tmp_path_factory.mktemp(policy)
            train(opened(folder, **options), segments)
            state = json.loads((folder / STATE_FILE).read_text())
            del state["crc"]
            found.setdefault(policy, []).append((state, (folder / JOURNAL_FILE).read_text()))
    return found


def spoilt(draw: st.DrawFn, value: Any) -> None:
    """Replace, delete, double or turn round something in `value`, a dict or a list, or in what it holds."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        inner = value[key]
        if not (isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3))):
            break
        value = inner
    act = draw(st.sampled_from(["replace", "replace", "replace", "delete", "double", "reverse"]))
    if act == "delete":
        del value[key]
    elif act == "double" and isinstance(value, list):
        value.append(copy.deepcopy(inner))
    elif act == "reverse" and isinstance(inner, list):
        inner.reverse()
    else:
        value[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_crafted_state_is_gone_on_with_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, states: dict[str, Any], data: st.DataObject
) -> None:
    policy = data.draw(st.sampled_from(sorted(RUNS)))
    whole, journal = data.draw(st.sampled_from(states[policy]))
    state = copy.deepcopy(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        spoilt(data.draw, {"config": state["config"], "state": state["state"]})
    folder = tmp_path_factory.mktemp("crafted")
    Path(folder, STATE_FILE).write_text(sealed(state))
    Path(folder, JOURNAL_FILE).write_text(journal)
    options = {**RUNS[policy], "total_steps": data.draw(st.sampled_from([400, 800]))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            train(opened(folder, extend=options["total_steps"] > 400, **options), 30)
            told = ""
        except (AutoLRSError, ValueError, RuntimeError) as error:
            told = str(error)
    assert "\n" not in told
    assert len(told) < 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["trunks"][1].update(step="far"), r"trunk.step cannot be 'far'"),
        (lambda state: state["trunks"][1].update(lr=[0.1]), r"trunk.lr cannot be \[0.1\]"),
        (lambda state: state["trunks"][1].update(status="tired"), "status must be one of"),
        (lambda state: state["trunks"][1].update(more=1), "trunk has an unknown more"),
        (lambda state: state["trunks"][0].pop("held"), "trunk lacks held"),
        (lambda state: state.update(trunks=[]), "learning rates must be at least 1, got 0"),
        (lambda state: state["plan"].update(steps=[8, 4]), "rungs of a race cannot be"),
        (lambda state: state.update(heir=99), "heir must be at most 3"),
        (lambda state: state.update(envelope="[/b]"), r"unknown envelope '\[/b\]'"),
    ],
)
def test_what_is_wrong_with_a_state_is_named(tmp_path: Path, states: dict[str, Any], change: Any, message: str) -> None:
    state, journal = copy.deepcopy(states["anchored"][1])
    change(state["state"])
    (tmp_path / STATE_FILE).write_text(sealed(state))
    (tmp_path / JOURNAL_FILE).write_text(journal)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **RUNS["anchored"])
