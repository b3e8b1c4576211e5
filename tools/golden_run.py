"""Writes a small run of each policy as this version's record has it, for tests/golden: `tools/golden_run.py FOLDER`.

Wanted once for every FORMAT of autolrs_ray/record/journal.py; PYTHONPATH may name an older checkout. Nothing is trained: the
losses are a formula, and what the policy decides goes through its record as a driver writes it.
"""

import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from autolrs_ray import AutoLRSSearch
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point, Verdict

KEPT = ("autolrs.jsonl", "autolrs_state.json", "autolrs_state.previous.json")
STEPS, INTERVAL = 40, (1e-3, 1.0)
OPTIONS = {"paper": dict(stage_steps=20, num_lrs=3, max_stage_steps=20), "anchored": dict(num_lrs=5)}


def record_of(folder):
    for home in ("record.record", "record.journal", "journal"):
        try:
            return import_module(f"autolrs_ray.{home}").Record(folder)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise SystemExit("no Record in this version")


def described(search):
    return search.describe() if hasattr(search, "describe") else search.desk.settings.describe()


def loss_of(lr, step):
    """Falls the faster, the larger the LR; above .5 it blows up after step 10."""
    return 50.0 if lr > 0.5 and step > 10 else 0.1 + 1.0 / (1.0 + 30.0 * lr * step)


def drive(policy, folder, write):
    while not policy.done:
        segment = policy.wanted()[0]
        policy.issue(segment.arm)
        step = segment.start
        while True:
            step += 1
            loss = loss_of(segment.lr, step)
            verdict = policy.report(segment.arm, Point(step, loss, loss, loss))
            if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
                policy.saved(segment.arm, step, f"{folder}/{segment.arm}_trial/checkpoint_{step:06d}")
            if verdict not in (Verdict.CONTINUE, Verdict.SAVE):
                break
        policy.withdraw(segment.arm)
        write()


def main(out):
    for name, options in OPTIONS.items():
        folder = Path(tempfile.gettempdir(), "golden", "run")
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        config = described(AutoLRSSearch(STEPS, policy=name, lr_interval=INTERVAL, **options))
        policy, record = make_policy(name, STEPS, lr_interval=INTERVAL, **options), record_of(folder)

        def write(policy=policy, record=record, config=config):
            record.append(policy.drain_events())
            record.write_state(config, policy.state_dict())

        start = {"event": "start", "config": config}
        record.begin(start) if hasattr(record, "begin") else record.append([start])
        drive(policy, folder, write)
        record.close()
        (out / name).mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copy(folder / file, out / name / file)
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
