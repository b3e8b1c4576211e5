"""A run of many stages: memory, open files, time per stage and storage do not grow with it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from autolrs_ray.journal import read_journal
from tests.faults.harness import LIMIT_S, SCALE, Driver, journal_text

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300 + 60 * SCALE)]

STAGES = min(500, 25 * SCALE)
FIRST = STAGES // 10


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024.0


def test_many_stages(tmp_path: Path, cluster: str) -> None:
    seen: dict[int, tuple[float, int]] = {}
    kept: list[int] = []
    options = json.dumps({"total_steps": 20 * STAGES})
    command = ("--policy", "growth", "--address", cluster, "--options", options)
    with Driver(tmp_path, command, limit_s=LIMIT_S + STAGES) as driver:
        pid = driver.process.pid

        def look() -> bool:
            stage = journal_text(tmp_path).count('"event":"commit"')
            if stage in range(FIRST, STAGES) and stage not in seen:
                seen[stage] = memory_mb(pid), len(list(Path(f"/proc/{pid}/fd").iterdir()))
                kept.append(len(list((tmp_path / "run").glob("*/checkpoint_*"))))
            return False

        driver.wait_until(look, every_s=0.1)
        assert driver.outcome()["done"]
    # medians of ten looks or more: at any moment the few trials alive hold some files each
    first, last = ([seen[stage] for stage in sorted(seen)][part] for part in (slice(FIRST), slice(-FIRST, None)))
    memory, files = (median(look[i] for look in last) - median(look[i] for look in first) for i in (0, 1))
    commits = [event["time"] for event in read_journal(tmp_path / "run") if event["event"] == "commit"]
    times = [after - before for before, after in pairwise(commits)]
    tenth = len(times) // 10
    early, late = median(times[tenth // 2 : tenth // 2 + tenth]), median(times[-tenth:])
    print(f"{STAGES} stages: memory +{memory:.0f} MB, open files {files:+.0f} from stage {min(seen)} to {max(seen)}; "
          f"{early:.2f} s a stage at first, {late:.2f} s in the end; at most {max(kept)} checkpoints")  # fmt: skip
    assert len(commits) == STAGES
    assert memory < 100.0
    assert files < 5
    assert late < 1.5 * early + 0.1
    assert max(kept) <= 2 + 3 + 1
