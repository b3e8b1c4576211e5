"""One run of the anchored race on scikit-learn's digits, on the Ray cluster it finds: the job of docs/cluster.md.

    python -m experiments.digits_job --storage /shared/runs        (or s3://bucket/runs)
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- autolrs run digits_job --storage /shared/runs

Submitted once more under the same name it continues where it was; a finished run prints its result again.
"""

from __future__ import annotations

import argparse
import json
import os

import ray

import autolrs_ray
from experiments.digits_task import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True, help="folder that all nodes share, or a URI")
    parser.add_argument("--name", default="digits", help="name of the run in it (default digits)")
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps of the main training (default 1600)")
    parser.add_argument("--num-lrs", type=int, default=12, help="learning rates that start (default 12)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per trial; fractions share one (default 0)")
    arguments = parser.parse_args()
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="warning")
    result = autolrs_ray.run(
        build,
        arguments.steps,
        num_lrs=arguments.num_lrs,
        name=arguments.name,
        storage_path=arguments.storage,
        resources={"cpu": 1, "gpu": arguments.gpus},
    )
    lr = result.rows[-1]["lr"]
    print(json.dumps({"done": result.done, "lr": lr, "loss": result.loss, "checkpoint": result.checkpoint}))


if __name__ == "__main__":
    main()
