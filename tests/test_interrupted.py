"""Ctrl-C, sent to a real process, and what continues the run: the same command, and not Tune's own resume."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autolrs_ray import read_journal

STEPS = 100
PROGRAM = """
import sys
import ray
from ray import tune
import autolrs_ray
from autolrs_ray import AutoLRSScheduler, AutoLRSSearch
from tests.trainables import Enveloped

ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False, logging_level="ERROR")
options = dict(num_lrs=2, lr_interval=(0.1, 1.5))
config = {"pause_s": 0.2, "seed": 0}
try:
    autolrs_ray.run(Enveloped, int(sys.argv[2]), name="run", storage_path=sys.argv[1], config=config, progress=False, **options)
except KeyboardInterrupt as interruption:
    print("#", interruption, flush=True)
for resume in (True, False):
    search = AutoLRSSearch(int(sys.argv[2]), resume="auto", **options)
    try:
        tune.run(Enveloped, name="run", storage_path=sys.argv[1], config=config, search_alg=search, verbose=0, resume=resume,
                 scheduler=AutoLRSScheduler(), metric="val_loss", mode="min", num_samples=-1, reuse_actors=True)
    except RuntimeError as refusal:
        print("#", refusal, flush=True)
print("#", autolrs_ray.RunResult.load(sys.argv[1] + "/run").done)
"""


def committed(folder: Path) -> list[tuple[str, int]]:
    if not (folder / "autolrs.jsonl").exists():
        return []
    return [(event["arm"], event["end"]) for event in read_journal(folder) if event["event"] == "commit"]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::autolrs_ray.record.journal.RecordWarning")  # read while it is written
def test_ctrl_c_says_where_the_run_stands_and_what_continues_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(STEPS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(committed(tmp_path / "run")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=240)
    lines = [line.removeprefix("# ") for line in output.splitlines() if line.startswith("# ")]  # others are Tune's
    assert lines[-1] == "True", errors[-3000:]
    interrupted, refusal, _ = lines
    assert "is not continued by resume=True of tune.run" in refusal
    assert interrupted.endswith(f"of {STEPS}; the same command continues")
    events, found = read_journal(tmp_path / "run"), committed(tmp_path / "run")
    assert [event["event"] for event in events].count("resume") == 1
    assert interrupted.split()[3] == str(next(event["step"] for event in events if event["event"] == "resume"))
    assert len({*found}) == len(found)  # nothing that was committed is trained again
