"""What a journal says of a run: who won, and what was committed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def committed_rows(events: Iterable[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """The commits of `arm` in a journal, in order of steps. Where a run lost a checkpoint and went back, the later count.

    A branch begins with the commits of its parent.
    """
    events, kept = list(events), list[dict[str, Any]]()
    for event in events:
        if event["event"] == "proposal" and event.get("arm") == arm and "parent" in event:
            parents = committed_rows(events, event["parent"])
            kept = [row for row in parents if row["end"] <= event["start"]]
        if event["event"] == "commit" and event.get("arm", "main") == arm:
            start = event.get("start", event["end"] - 1)
            kept = [*(earlier for earlier in kept if earlier["end"] <= start), event]
    return kept


def winner(events: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The arm that is the main run: "main" (paper), the winning trunk, or the leader so far (anchored)."""
    if config["policy"] == "paper":
        return "main"
    for event in reversed(events):
        if event["event"] == "done":
            return str(event["arm"])
    rungs = [event for event in events if event["event"] == "rung"]
    ended = {event["arm"] for event in events if event["event"] == "trunk"}
    alive = [event for event in rungs if event["arm"] not in ended]
    return str(min(alive, key=lambda event: (-event["step"], event["score"]))["arm"]) if alive else "t00"


def start_of(events: Iterable[dict[str, Any]], folder: object) -> dict[str, Any]:
    """The configuration in a journal's "start" event; ValueError, naming `folder`, without one."""
    config: dict[str, Any] | None = next((event["config"] for event in events if event["event"] == "start"), None)
    if config is None:
        raise ValueError(f"the journal in {folder} has no start: its first line is damaged")
    return config
