"""A run of many stages: memory, open files, time per stage and storage do not grow with it."""

from __future__ import annotations

import contextlib
import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
import pytest

from autolrs_ray.record.journal import read_journal
from tests.faults.harness import LIMIT_S, SCALE, Driver, journal_text

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300 + 60 * SCALE)]

STAGES = min(500, 25 * SCALE)
FIRST = STAGES // 10
LATE_S = 3.0
"""A checkpoint may lie there for so long after it has ceased to be needed: it is deleted within a stage or two."""


def memory_and_files(pid: int) -> tuple[float, int]:
    """Resident memory in MB and number of open files of a process and of all its descendants: Ray's own and the workers."""
    memory, files = 0.0, 0
    driver = psutil.Process(pid)
    for process in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            memory, files = memory + process.memory_info().rss / 2**20, files + process.num_fds()
    return memory, files


def not_needed(run: Path, stage: int) -> set[Path]:
    """Checkpoints on storage beside the main trial's last two and those of the probes of `stage`."""
    main = sorted(run.glob("main_*/checkpoint_*"))
    probes = [
        folder for folder in run.glob("s*p*_*/checkpoint_*") if not folder.parent.name.startswith(f"s{stage:03d}p")
    ]
    return {*main[:-2], *probes}


def test_many_stages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: dict[int, tuple[float, int]] = {}
    since: dict[Path, float] = {}  # when a checkpoint that is not needed was first seen
    kept: list[int] = []
    options = json.dumps({"total_steps": 20 * STAGES})
    with Driver(tmp_path, ("--policy", "growth", "--options", options), limit_s=LIMIT_S + STAGES) as driver:

        def look() -> bool:
            stage, now = journal_text(tmp_path).count('"event":"commit"'), time.monotonic()
            if stage in range(FIRST, STAGES) and stage not in seen:
                seen[stage] = memory_and_files(driver.process.pid)
                kept.append(len(list(run.glob("*/checkpoint_*"))))
            left = not_needed(run, min(stage, STAGES - 1))
            for folder in [folder for folder in since if folder not in left]:
                del since[folder]
            late = [str(folder) for folder in left if now - since.setdefault(folder, now) > LATE_S]
            assert not late, f"in stage {stage} there still is {late}"
            return False

        driver.wait_until(look, every_s=0.2)
        assert driver.outcome()["done"]
    first, last = ([seen[stage] for stage in sorted(seen)][part] for part in (slice(FIRST), slice(-FIRST, None)))
    memory = median(look[0] for look in last) - median(look[0] for look in first)
    # the least of ten looks or more: a save, a restore or a trial that begins holds a dozen files for a moment, and
    # how many looks fall on such moments is chance; what leaks is there in every look
    files = min(look[1] for look in last) - min(look[1] for look in first)
    commits = [event["time"] for event in read_journal(run) if event["event"] == "commit"]
    times = [after - before for before, after in pairwise(commits)]
    tenth = len(times) // 10
    early, late = median(times[tenth // 2 : tenth // 2 + tenth]), median(times[-tenth:])
    print(f"{STAGES} stages: memory {memory:+.0f} MB, open files {files:+d} from stage {min(seen)} to {max(seen)}; "
          f"{early:.2f} s a stage at first, {late:.2f} s in the end; at most {max(kept)} checkpoints")  # fmt: skip
    assert len(commits) == STAGES
    assert memory < 100.0
    assert files < 5
    assert late < 1.5 * early + 0.1
    assert max(kept) <= 2 + 3 + 1
    assert not not_needed(run, STAGES - 1)
    assert len(list(run.glob("main_*/checkpoint_*"))) == 2
