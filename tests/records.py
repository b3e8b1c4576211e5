"""What tests write into records, and how it reads."""

from __future__ import annotations

EVENTS = [
    {"event": "start", "n": 1},
    {"event": "probe", "lr": 0.1, "losses": [1.0, 2.0]},
    {"event": "done", "ok": True},
]


def without_time(events):
    return [{key: value for key, value in event.items() if key not in ("time", "line")} for event in events]
