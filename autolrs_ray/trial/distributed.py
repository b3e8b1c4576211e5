"""One trial trained by several processes: torch's DistributedDataParallel inside a Tune trial.

The trial's actor holds no model. It starts one worker per bundle of the trial's own placement group, so that Tune counts and
places the whole trial, and tells all of them the same learning rates and the same checkpoint. Each step's batch is the one
that a single process would train on, shared row by row.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.record.checkpoints import read_checkpoint, snapshot, write_checkpoint
from autolrs_ray.training.batches import Batch
from autolrs_ray.training.data import Data
from autolrs_ray.training.optimizers import parameters_of
from autolrs_ray.training.task import TrainingTask
from autolrs_ray.training.trainer import Trainer
from autolrs_ray.trial.batch_norm import synchronised
from autolrs_ray.trial.device import own_device

LOOPBACK = "127.0.0.1"


class DistributedTrainer(Trainer):
    """A Trainer that is one of `world` processes of an initialised process group; all must make the same calls.

    Every process takes each world-th row of a batch, and counts as much as it has rows. Rows are augmented as in one process.

    Raises ValueError where there are fewer rows in a batch than processes, or for an optimizer that cannot be shared.
    """

    def __init__(
        self, build: Callable[[], TrainingTask], seed: int = 0, averaging: bool = False, device: str | None = None
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        super().__init__(build, seed, averaging, device)
        size = self.task.batch_size
        if size < self.world:
            raise ValueError(f"batch_size={size} is shared by {self.world} workers: every one needs a row")
        self._train_forward = DistributedDataParallel(self._forward)
        inside = {id(parameter) for parameter in self.model.parameters()}
        self._outside = [p for p in parameters_of(self._optimizers) if id(p) not in inside]

    def batch(self, step: int) -> Batch:
        size = self.feed.rows.size(step)
        self._share = len(range(size)[self.feed.own()]) * self.world / size
        return super().batch(step)

    def _prepared(self, model: nn.Module) -> nn.Module:
        return synchronised(model, self.device) if self.task.sync_batch_norm else model

    def _share_gradients(self) -> None:
        for parameter in self._outside:  # of a loss, or of further modules
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world

    def train(self, until: int, lr_at: Callable[[int], float]) -> float:
        loss = super().train(until, lr_at)
        statistics = self.averages.statistics() if self.averages is not None else []
        for buffer in (*self._whole.buffers(), *statistics):  # batch-norm statistics are of each rank's own share
            dist.broadcast(buffer, 0)
        return self._summed({"loss": loss / self.world})["loss"]

    def _metrics(self, data: Data | None) -> dict[str, float]:
        return self._summed(super()._metrics(data))

    def _summed(self, values: dict[str, float]) -> dict[str, float]:
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def fingerprint(self) -> str:
        """SHA-256 of all parameters and buffers of this rank, averaged ones too."""
        averages = self.averages.state_dict()["weights"] if self.averages is not None else []
        digest = hashlib.sha256()
        for state in (self._whole.state_dict(), *averages):
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    flat = tensor.detach().cpu().contiguous().reshape(-1)
                    digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def rendezvous(host: str, world: int) -> TCPStore:
    """The store through which `world` processes find each other. It listens at `host` alone, at a free port; one that torch
    opens by itself listens at all addresses of the machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port: int = listener.getsockname()[1]
    return TCPStore(host, port, world, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


class _Worker:
    """The actor of one rank."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.trainer: DistributedTrainer

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def serve(self, near: bool) -> tuple[str, int]:
        """Open the rendezvous, on rank 0; its address. near: all ranks are on this node."""
        host = LOOPBACK if near else ray.util.get_node_ip_address()
        self._store = rendezvous(host, self.world)
        return host, self._store.port

    def join(self, address: tuple[str, int], backend: str | None) -> None:
        if self.rank:
            self._store = TCPStore(*address, self.world, is_master=False)
        if address[0] == LOOPBACK:
            names = [name for _, name in socket.if_nameindex()]
            os.environ.setdefault("GLOO_SOCKET_IFNAME", next(name for name in names if name in ("lo", "lo0")))
        backend = backend or ("nccl" if own_device() == "cuda" else "gloo")
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.world)

    def build(self, build: Callable[[], TrainingTask], seed: int, averaging: bool) -> tuple[int, float, bool, str]:
        trainer = self.trainer = DistributedTrainer(build, seed, averaging, own_device())
        return trainer.steps_per_epoch, trainer.val_batches, trainer.averaging, trainer.held_out

    def train(self, until: int, lrs: list[float]) -> float:
        first = self.trainer.step
        return self.trainer.train(until, lambda step: lrs[step - first])

    def evaluate(self, averaged: bool) -> tuple[dict[str, float], str | None]:
        return self.trainer.evaluate(averaged=averaged), self.trainer.trouble

    def state_dict(self) -> dict[str, Any]:
        return dict(snapshot(self.trainer.state_dict()))

    def fingerprint(self) -> str:
        return self.trainer.fingerprint()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)

    def reset(self) -> None:
        self.trainer.reset()

    def grow(self, growth: BatchGrowth) -> None:
        self.trainer.grow(growth)


class WorkerGroup:
    """Does what a Trainer does, with all workers of the trial it is created in.

    build: () -> TrainingTask, called once in every worker. workers: processes; each gets one bundle of the trial's
    placement group. backend: of torch.distributed (None: "nccl" where the workers have GPUs, else "gloo").

    Raises RuntimeError if the trial's placement group has too few bundles, or if the ranks' weights drift apart.
    """

    def __init__(
        self, build: Callable[[], TrainingTask], seed: int, averaging: bool, workers: int, backend: str | None = None
    ) -> None:
        self.seed, self.step = seed, 0
        self.trouble: str | None = None
        self._growth = BatchGrowth()
        group = get_current_placement_group()
        bundles = group.bundle_specs if group is not None else []
        if group is None or len(bundles) < workers:
            raise RuntimeError(
                f"{workers} workers per trial need a bundle each, but the trial's resources have {len(bundles)}: use "
                "autolrs_ray.run(..., workers=...), or tune.with_resources(trainable, worker_resources(workers, ...))"
            )
        actor = ray.remote(_Worker)
        self._workers = [
            actor.options(**_placed(group, len(bundles) - workers + rank)).remote(rank, workers)
            for rank in range(workers)
        ]
        near = len(set(self._all("node"))) == 1
        address = ray.get(self._workers[0].serve.remote(near))
        self._all("join", address, backend)
        built = self._all("build", build, seed, averaging)
        self.steps_per_epoch, self.val_batches, self.averaging, self.held_out = built[0]
        if len({held_out for *_, held_out in built}) > 1:
            raise RuntimeError(
                f"build holds out other rows in every one of the {workers} workers: seed generators of your own with a fixed "
                "number; those of random, NumPy and torch are seeded before build is called"
            )

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Call `method` on every rank at once; their answers, in order of rank.

        Raises as soon as one fails, and ends all: where one has died the others may wait for it as long as torch lets them, and
        this process's own end would wait for them.
        """
        waiting = answers = [getattr(worker, method).remote(*arguments) for worker in self._workers]
        try:
            while waiting:
                done, waiting = ray.wait(waiting)
                ray.get(done)
        except Exception:
            self.close()
            raise
        return list(ray.get(answers))

    @property
    def epoch(self) -> float:
        """As Trainer.epoch."""
        return self._growth.first(self.step) / self.steps_per_epoch

    def grow(self, growth: BatchGrowth) -> None:
        """As Trainer.grow."""
        self._growth = growth
        self._all("grow", growth)

    def train(self, until: int, lr_at: Callable[[int], float]) -> float:
        """As Trainer.train; the loss is the mean over the ranks."""
        lrs = [lr_at(step) for step in range(self.step, until)]
        loss: float = self._all("train", until, lrs)[0]
        self.step = max(self.step, until)
        return loss

    def evaluate(self, averaged: bool = False) -> dict[str, float]:
        """As Trainer.evaluate on the validation data, each rank on its share of it."""
        values: dict[str, float]
        values, self.trouble = self._all("evaluate", averaged)[0]
        return values

    def state_dict(self) -> dict[str, Any]:
        """The state of rank 0, once all ranks are found to have the same weights."""
        fingerprints = self._all("fingerprint")
        if len(set(fingerprints)) > 1:
            raise RuntimeError(
                f"the weights of the {len(fingerprints)} workers differ at step {self.step}: {fingerprints}"
            )
        state: dict[str, Any] = ray.get(self._workers[0].state_dict.remote())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._all("load_state_dict", ray.put(state))
        self.step = state["step"]

    def save(self, folder: str | os.PathLike[str], flush: bool = True) -> None:
        """As Trainer.save."""
        write_checkpoint(self.state_dict(), folder, flush)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """As Trainer.load."""
        self.load_state_dict(read_checkpoint(folder))

    def reset(self) -> None:
        """Back to step 0 and the initial weights."""
        self._all("reset")
        self.step = 0

    def close(self) -> None:
        """End the workers. They end with the trial's actor in any case."""
        for worker in self._workers:
            ray.kill(worker)


def _placed(group: PlacementGroup, index: int) -> dict[str, Any]:
    """Actor options that give a worker all of the bundle at `index`."""
    amounts = dict(group.bundle_specs[index])
    own = {"num_cpus": amounts.pop("CPU", 0), "num_gpus": amounts.pop("GPU", 0), "memory": amounts.pop("memory", None)}
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {**own, "resources": amounts, "scheduling_strategy": strategy}


def worker_resources(workers: int, each: dict[str, float] | None = None, together: bool = False) -> Any:
    """The PlacementGroupFactory of a trial with `workers` processes; each: resources of one (default: one CPU). together: all
    on one node."""
    from ray.tune import PlacementGroupFactory

    names = {"cpu": "CPU", "gpu": "GPU"}
    bundle = {names.get(name, name): amount for name, amount in (each or {"cpu": 1}).items() if amount > 0}
    return PlacementGroupFactory([{}, *[bundle] * workers], strategy="STRICT_PACK" if together else "PACK")
