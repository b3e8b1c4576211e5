"""The journal: every event is on disk before it counts, and a damaged line costs nothing but itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import warnings
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolrs_ray.record.journal import JOURNAL_FILE, RecordWarning, read_journal, sealed
from autolrs_ray.record.record import STATE_FILE
from tests.records import EVENTS, without_time

UNREADABLE = (  # with checksums that fit
    b'{"event":"commit","lr":NaN}', b'{"event":"commit","lr":-Infinity}', b'{"event":"commit","lr":1e999}',
    b'{"event":"commit","end":1%s}' % (b"0" * 400), b'{"event":"commit","end":1%s}' % (b"0" * 5000),
    b'{"event":"warning","message":"\\ud800"}', b'{"event":%s}' % (b"[" * 100_000 + b"]" * 100_000), b'{"event":["commit"]}',
)  # fmt: skip


def python(code, *args):
    """Run `code` in another process, which needs no torch for it."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, check=False
    )


def test_events_come_back_in_order_with_the_time(record):
    record.append(EVENTS[:2])
    record.append([])
    record.append(EVENTS[2:])
    events = read_journal(record.folder)
    assert without_time(events) == EVENTS == without_time(read_journal(record.journal))
    assert all(event["time"] > 1e9 for event in events)


def test_every_append_is_on_disk_before_it_returns(record, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    record.append(EVENTS)
    assert synced == [str(record.journal)]
    record.write_state({}, {})
    assert synced[1:] == [str(record.folder / (STATE_FILE + ".tmp")), str(record.folder)]


def test_nan_and_infinities_become_null_and_every_line_is_strict_json(record):
    record.append([{"event": "x", "a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1.0, math.nan)}])
    line = record.journal.read_text()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert without_time(read_journal(record.folder)) == [
        {"event": "x", "a": None, "b": [None, {"c": None}], "d": [1.0, None]}
    ]


def test_text_of_any_kind_survives(record):
    nasty = {"event": "w", "message": 'a "quoted"\nline,"crc":12}, ünïcødé \u2028 \x00', "crc": 5}
    record.append([nasty])
    assert without_time(read_journal(record.folder)) == [nasty]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],  # cut short
        lambda line: line.replace(b"0.1", b"0.2"),  # altered
        lambda line: b"\x00" * len(line),
        lambda line: b"\xff\xfe" + line,
        lambda line: b"{}",
        lambda line: b"not json at all",
        lambda line: line.rpartition(b',"crc":')[0] + b"}",
        lambda line: line[:-1] + b"9}",
        *(lambda line, body=body: b'%s,"crc":%d}' % (body[:-1], zlib.crc32(body)) for body in UNREADABLE),
    ],
)
def test_a_damaged_line_is_left_out_with_a_warning_and_the_others_stay(record, damage):
    record.append(EVENTS)
    lines = record.journal.read_bytes().split(b"\n")
    lines[1] = damage(lines[1])
    record.journal.write_bytes(b"\n".join(lines))
    with pytest.warns(RecordWarning, match=r"1 damaged line\(s\) left out"):
        events = read_journal(record.folder)
    assert without_time(events) == [EVENTS[0], EVENTS[2]]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_happens_to_one_byte_no_wrong_event_is_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("r")
    lines = [sealed(event).encode() for event in EVENTS]
    content = bytearray(b"\n".join(lines) + b"\n")
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    (folder / JOURNAL_FILE).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordWarning)
        events = read_journal(folder)
    assert all(event in EVENTS for event in events)
    assert len(events) >= 1


def test_halves_of_characters_in_a_file_name_are_written_as_escapes(record):
    record.append([{"event": "warning", "message": "cannot open caf\udce9 \ud83d, é", "\ud800": 1}])
    (event,) = read_journal(record.folder)
    assert (event["message"], event["\\ud800"]) == ("cannot open caf\\udce9 \\ud83d, é", 1)


def test_a_missing_journal_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no journal at {tmp_path}/{JOURNAL_FILE}.*folder of an AutoLRS run"):
        read_journal(tmp_path)
