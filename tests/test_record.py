"""The record of a run: its state is replaced whole, and nothing that a crash or a bad disk can do spoils it."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest

from autolrs_ray.record import mirror
from autolrs_ray.record.journal import FORMAT, JOURNAL_FILE, RecordWarning, read_journal, sealed
from autolrs_ray.record.mirror import LOCK_FILE, Mirror
from autolrs_ray.record.record import PREVIOUS_STATE_FILE, STATE_FILE, Record
from tests.crashes import dies_after_renames
from tests.records import EVENTS, without_time


def python(code, *args):
    """Run `code` in another process, which needs no torch for it."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, check=False
    )


# -- the state ---------------------------------------------------------------------------------------------------------


def test_the_state_comes_back_and_the_journal_is_cut_back_to_where_it_belongs(record):
    assert not record.exists()
    record.append(EVENTS[:1])
    record.write_state({"seed": 1}, {"step": 10, "nan": math.nan})
    record.append(EVENTS[1:])  # written, but its state was not: the run crashed in between
    loaded = record.load_state()
    assert record.exists()
    assert (loaded["config"], loaded["state"]) == ({"seed": 1}, {"step": 10, "nan": None})
    assert without_time(read_journal(record.folder)) == EVENTS[:1]


def test_a_line_cut_short_by_a_crash_does_not_spoil_the_next_one(record):
    record.append(EVENTS[:1])
    record.write_state({}, {"n": 1})
    with open(record.journal, "ab") as file:
        file.write(b'{"time":1,"event":"half')
    record.load_state()
    record.append(EVENTS[2:])
    assert without_time(read_journal(record.folder)) == [EVENTS[0], EVENTS[2]]


def test_a_journal_that_lost_its_end_goes_on_without_spoiling_the_next_line(record):
    record.append(EVENTS[:2])
    record.write_state({}, {"n": 1})
    os.truncate(record.journal, record.journal.stat().st_size - 10)
    with pytest.warns(RecordWarning, match="damaged|has lost its last"):
        record.load_state()
    record.append(EVENTS[2:])
    with pytest.warns(RecordWarning, match="1 damaged"):
        assert without_time(read_journal(record.folder)) == [EVENTS[0], EVENTS[2]]


@pytest.mark.parametrize("content", [b"", b"{}", b"nonsense", b"\xff\x00", None, "altered", "foreign"])
def test_a_damaged_state_falls_back_to_the_previous_one_and_its_part_of_the_journal(record, content):
    for i in range(3):
        record.append(EVENTS[i : i + 1])
        record.write_state({}, {"step": i})
    current = record.folder / STATE_FILE
    if content is None:
        current.unlink()
    elif content == "altered":
        current.write_text(current.read_text().replace('"step":2', '"step":7'))
    elif content == "foreign":
        current.write_text(sealed({"format": 99, "state": {}}))
    else:
        current.write_bytes(content)
    with pytest.warns(RecordWarning, match=PREVIOUS_STATE_FILE):
        loaded = record.load_state()
    assert loaded["state"] == {"step": 1}
    assert without_time(read_journal(record.folder)) == EVENTS[:2]


def test_without_any_readable_state_the_error_says_what_to_do(record):
    record.write_state({}, {})
    record.write_state({}, {})
    for name in (STATE_FILE, PREVIOUS_STATE_FILE):
        (record.folder / name).write_text("x")
    with pytest.raises(RuntimeError, match=f"cannot resume from {record.folder}: {STATE_FILE}.*Move the folder away"):
        record.load_state()


@pytest.mark.parametrize("survives", range(2))
def test_a_crash_between_any_two_steps_of_writing_leaves_a_state(record, survives):
    record.write_state({}, {"step": 0})
    record.write_state({}, {"step": 1})
    with dies_after_renames(survives):
        record.write_state({}, {"step": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordWarning)
        assert record.load_state()["state"] == {"step": 1}


@pytest.mark.parametrize("clock", [[100.0, 5.0, 50.0, 1.0, 7.0], [3.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]])
@pytest.mark.parametrize("lost", [(1,), (3,), (1, 3), (0, 4)])
def test_a_mended_journal_keeps_its_order_whatever_the_clock_did(record, monkeypatch, clock, lost):
    names = ["start", "proposal", "commit", "decision", "commit"]
    for i, (name, now) in enumerate(zip(names, clock, strict=True)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        record.append([{"event": name, "i": i}])
    record.write_state({}, {})
    lines = record.journal.read_bytes().splitlines()
    record.journal.write_bytes(b"\n".join(b"damaged" if i in lost else line for i, line in enumerate(lines)) + b"\n")
    repeated = [i for i, name in enumerate(names) if name in ("start", "commit")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordWarning)
        record.load_state()
        record.append([{"event": "done", "i": 5}])
        found = [event["i"] for event in read_journal(record.folder)]
    assert found == [i for i in range(6) if i in repeated or i not in lost]


def test_a_run_that_was_moved_or_copied_finds_its_checkpoints(tmp_path):
    record, elsewhere = Record(tmp_path / "a"), "/other/place/checkpoint"
    own, message = str(record.folder / "main_1" / "checkpoint_000001"), f"{record.folder}/main_1 was lost"
    record.begin({"event": "start", "config": {}})
    record.append([{"event": "commit", "checkpoint": own}, {"event": "commit", "checkpoint": elsewhere},
                   {"event": "warning", "message": message}])  # fmt: skip
    record.write_state({}, {"checkpoint": own, "previous": [3, own], "forks": {"1": {"path": elsewhere}}, "none": None})
    record.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = Record(tmp_path / "b")
    there = str(tmp_path / "b" / "main_1" / "checkpoint_000001")
    assert moved.load_state()["state"] == {
        "checkpoint": there, "previous": [3, there], "forks": {"1": {"path": elsewhere}}, "none": None,
    }  # fmt: skip
    moved.close()
    assert [event.get("checkpoint") for event in read_journal(tmp_path / "b")[1:3]] == [
        "./main_1/checkpoint_000001", elsewhere,
    ]  # fmt: skip
    assert read_journal(tmp_path / "b")[3]["message"] == message


@pytest.mark.parametrize("content", [
    {"format": 99}, {"format": FORMAT}, {"format": FORMAT, "config": {}, "state": {}, "journal_bytes": "7", "repeated": []},
    {"format": FORMAT, "config": {}, "state": {}, "journal_bytes": 0, "repeated": ["no line"]}, {"format": [1] * 99},
])  # fmt: skip
def test_a_state_with_a_good_checksum_that_is_none_is_refused_by_name(record, content):
    (record.folder / STATE_FILE).write_text(sealed(content))
    with pytest.raises(RuntimeError, match=f"cannot resume from {record.folder}: {STATE_FILE}: "):
        record.load_state()


# -- processes and disks -----------------------------------------------------------------------------------------------

OPEN = """
    import sys
    from autolrs_ray.record.record import Record
    try:
        Record(sys.argv[1])
    except RuntimeError as error:
        print(error)
    else:
        print("opened")
"""


def test_a_second_process_is_refused_until_the_first_has_closed(tmp_path):
    record = Record(tmp_path)
    assert "another process is driving the run" in python(OPEN, tmp_path).stdout
    assert str(tmp_path) in python(OPEN, tmp_path).stdout
    record.close()
    record.close()
    assert python(OPEN, tmp_path).stdout == "opened\n"


def test_a_process_that_was_killed_leaves_no_lock(tmp_path):
    code = (
        "import os, sys; from autolrs_ray.record.record import Record; r = Record(sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    assert python(code, tmp_path).returncode == -9
    Record(tmp_path).close()


FULL = """
    import resource, sys
    from autolrs_ray.record.record import Record
    record = Record(sys.argv[1])
    record.append([{"event": "start"}])
    record.write_state({}, {"step": 1})
    limit = record.journal.stat().st_size + 200
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # no file can grow past it, as on a full disk
    for write in (lambda: record.write_state({}, {"step": 2, "much": "x" * 10_000}),
                  lambda: record.append([{"event": "long", "much": "x" * 10_000}])):
        try:
            write()
        except OSError as error:
            print(type(error).__name__)
    record.append([{"event": "short"}])
"""


def test_a_full_disk_is_an_error_and_leaves_the_earlier_state_and_journal_intact(tmp_path):
    result = python(FULL, tmp_path)
    assert result.stdout == "OSError\nOSError\n", result.stderr
    assert without_time(read_journal(tmp_path)) == [{"event": "start"}, {"event": "short"}]
    record = Record(tmp_path)
    assert record.load_state()["state"] == {"step": 1}
    record.write_state({}, {"step": 2})  # the leftovers are in nobody's way
    assert record.load_state()["state"] == {"step": 2}
    record.close()


def test_an_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Record(Path(tmp_path, "file"))


# -- what others may lay in the folder ---------------------------------------------------------------------------------


def test_no_file_of_the_record_is_written_through_a_symbolic_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (STATE_FILE, PREVIOUS_STATE_FILE):
        (folder / name).symlink_to(victim)
        (folder / f"{name}.tmp").symlink_to(victim)
    record = Record(folder)
    record.append(EVENTS[:1])
    for step in range(2):
        record.write_state({}, {"step": step})
    assert not any(path.is_symlink() for path in (folder / STATE_FILE, folder / f"{STATE_FILE}.tmp"))
    record.journal.unlink()
    record.journal.symlink_to(victim)
    with pytest.raises(OSError, match=JOURNAL_FILE):
        record.append(EVENTS[:1])
    record.close()
    (folder / LOCK_FILE).unlink()
    (folder / LOCK_FILE).symlink_to(victim)
    with pytest.raises(OSError, match=LOCK_FILE):
        Record(folder)
    assert victim.read_text() == "precious"


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before(tmp_path):
    code = """
        import resource, signal, sys
        from autolrs_ray.record.stores import write_bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_bytes(sys.argv[1], b"y" * 2000)
        except OSError as error:
            print(type(error).__name__)
    """
    file = tmp_path / "report.html"
    file.write_text("good")
    assert python(code, file).stdout == "OSError\n"
    assert (file.read_text(), list(tmp_path.iterdir())) == ("good", [file])


class Store:
    """A store that fails at the `fails`-th request from 0 on, and holds nothing but what was written to it."""

    type_name = "fake"

    def __init__(self, fails):
        self.files, self.left = {}, fails

    def request(self):
        self.left -= 1
        if self.left == -1:
            raise OSError("the store does not answer")

    def create_dir(self, path):
        self.request()

    def delete_file(self, path):
        self.request()
        del self.files[path]

    def open_input_stream(self, path):
        self.request()
        if path not in self.files:
            raise FileNotFoundError(path)
        return io.BytesIO(self.files[path])

    @contextlib.contextmanager
    def open_output_stream(self, path):
        self.request()
        yield (buffer := io.BytesIO())
        self.files[path] = buffer.getvalue()


@pytest.mark.parametrize("fails", range(7))
def test_a_store_that_fails_while_the_record_is_opened_leaves_no_lock_and_no_folder(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(mirror, "SETTLE_S", 0.0)
    store = Store(fails)
    with pytest.raises(OSError, match="does not answer"):
        Record(tmp_path / "copy", Mirror(store, "bucket/run"))
    assert store.files == {}
    assert not (tmp_path / "copy").exists()
    Record(tmp_path / "copy", Mirror(store, "bucket/run")).close()
