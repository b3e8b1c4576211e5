"""A training loop of one's own with DistributedDataParallel, without torchrun, whose trials grow into free slots.

`python -m experiments.own_ddp` runs it on this machine's cores. A Tune function starts one Ray actor per bundle of its trial's
resources, has them train up to the next report at the learning rates of `config["autolrs"]`, and reports. It is what
workers="elastic" asks of a trainable: train with as many workers as the trial has bundles, at the same global batch.
"""

from __future__ import annotations

import argparse
import io
import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import tune
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import autolrs_ray
from autolrs_ray.integrations.follower import Follower
from autolrs_ray.trial.device import own_device

BATCH = 32


def target(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x[:, :1] * x[:, 1:2]) + x[:, 2:3]


class Rank:
    """One of `world` processes, with its share of every batch. (Alone it lives in the trial's own process.)"""

    def __init__(self, rank: int, world: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.rank, self.world, self.seed = rank, world, seed
        self.device = own_device()  # a GPU if Ray has given one to this process, not any that is there
        self.model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.forward: nn.Module = self.model

    def address(self) -> str:
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, address: str) -> None:
        backend = "nccl" if self.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=address, rank=self.rank, world_size=self.world)
        self.forward = DistributedDataParallel(self.model)

    def rows(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step depends on the seed and the step; every process takes its rows of it."""
        x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(1_000_003 * self.seed + step))
        y, own = target(x), slice(self.rank, None, self.world)
        return x[own].to(self.device), y[own].to(self.device)

    def train(self, step: int, lrs: list[float]) -> float:
        total = 0.0
        for lr in lrs:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            x, y = self.rows(step)
            # DDP takes the mean over the processes: what a process has more or less than its share of the rows is weighed in
            loss = nn.functional.mse_loss(self.forward(x), y) * (len(x) * self.world / BATCH)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            step, total = step + 1, total + loss.item()
        return total / len(lrs)

    @torch.no_grad()
    def evaluate(self) -> float:
        x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        return float(nn.functional.mse_loss(self.model(x.to(self.device)), target(x).to(self.device)))

    def state(self) -> bytes:
        """As bytes, which the trial's own process can take that has no GPU."""
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def load(self, data: bytes) -> None:
        state = torch.load(io.BytesIO(data), map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Ranks:
    """All processes of the trial, one in each bundle of its placement group that is not empty."""

    def __init__(self, seed: int) -> None:
        group = get_current_placement_group()
        each = [bundle for bundle in tune.get_context().get_trial_resources().bundles if bundle]
        self.alone = Rank(0, 1, seed) if len(each) == 1 or group is None else None
        self.actors: list[Any] = []
        if self.alone is None:
            first = len(group.bundle_specs) - len(each)  # the trial's own process is in an empty bundle before them
            for rank, bundle in enumerate(each):
                place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=first + rank)
                options = dict(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), scheduling_strategy=place)
                self.actors.append(ray.remote(Rank).options(**options).remote(rank, len(each), seed))
            self.all("join", ray.get(self.actors[0].address.remote()))

    def all(self, method: str, *arguments: Any) -> Any:
        """Call `method` in every process; the mean of their numbers, or what the first one returns."""
        if self.alone is not None:
            return getattr(self.alone, method)(*arguments)
        waiting = answers = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        try:
            while waiting:  # one that has died is noticed at once, and not when the others are tired of waiting for it
                done, waiting = ray.wait(waiting)
                ray.get(done)
        except Exception:
            self.close()
            raise
        found = ray.get(answers)
        return sum(found) / len(found) if isinstance(found[0], float) else found[0]

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def train(config: dict[str, Any]) -> None:
    follow, ranks, step = Follower(config), Ranks(config["seed"]), 0
    try:
        if checkpoint := tune.get_checkpoint():
            with checkpoint.as_directory() as folder:
                saved = Path(folder, "state.pt").read_bytes()
                step = json.loads(Path(folder, "step.json").read_text())
            ranks.all("load", saved)
        end = follow.end or 1000
        while step < end:
            until = next(t for t in range(step + 1, end + 1) if follow.report_due(t))
            loss = ranks.all("train", step, [follow.lr_at(t) for t in range(step, until)])
            step = until
            metrics = {"val_loss": ranks.all("evaluate"), "train_loss": loss}
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "state.pt").write_bytes(ranks.all("state"))
                Path(folder, "step.json").write_text(json.dumps(step))
                tune.report(follow.report(step, metrics), checkpoint=tune.Checkpoint.from_directory(folder))
    finally:
        ranks.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    found = autolrs_ray.run(
        train, given.steps, workers=(1, BATCH), resources={"cpu": 1}, storage_path=given.storage, name="ddp"
    )
    sizes = sorted({event["workers"] for event in found.events if event["event"] == "workers"})
    print(json.dumps({"val_loss": found.metric, "workers": sizes, "compute": round(found.compute, 2)}))


if __name__ == "__main__":
    main()
