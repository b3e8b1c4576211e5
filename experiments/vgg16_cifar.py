"""VGG16 (batch norm, one linear head) on CIFAR-10 and CIFAR-100: AutoLRS beside fixed schedules, at equal main training.

    python -m experiments.vgg16_cifar --data-dir DIR --download --policy anchored --epochs 50 --seeds 3
    python -m experiments.vgg16_cifar --data-dir DIR --policy paper --dataset cifar10 cifar100   # as published: 700 epochs
    python -m experiments.vgg16_cifar --data-dir DIR --policy linear constant --epochs 50 --seeds 3 --peaks .03 .1 .3
    python -m experiments.vgg16_cifar --report
    ray job submit --working-dir . -- python -m experiments.vgg16_cifar --data-dir /shared/data --out /shared/runs/vgg16

SGD, momentum 0.9, weight decay 5e-4, batch size 128, cross-entropy; 45,000 images to train on, 5,000 to choose on; the
accuracy of the last model, whose test images are read once. `paper`: LRs in [1e-3, 1e-1], 10 probes a stage, tau 1,000
doubling to 8,000, training loss forecast until then and validation loss after; 350 epochs of training and as many of
search. Its plots, journal and reports lie in the run folder. Every finished run is kept under --out; the same command goes on.

Results: experiments/results/vgg16_cifar.md. So far on 2 CPU cores only (torch 2.13, width 0.25, 5,000 images, 6 epochs, 2
seeds): test accuracy on CIFAR-10 52.8 % anchored, 42.6 % paper, 51.0 % linear tuned in 4 full runs, 52.4 % constant tuned in 4
with averaged weights, 17.4 % linear from an untuned 0.1; on CIFAR-100 in the same order 12.7, 6.4, 11.3, 12.4 and 1.5 %.
On a GPU nothing has been run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

import autolrs_ray
from autolrs_ray.core.envelopes import ENVELOPES
from autolrs_ray.core.policy import finite_or_inf
from autolrs_ray.training.trainer import Trainer
from experiments import vgg16_report
from experiments.full_runs import full_run
from experiments.vgg16_task import BATCH_SIZE, CLASSES, DEFAULT_PEAK, PADDINGS, Settings, build, read_cifar

SEARCHES = vgg16_report.SEARCHES
EPOCHS = {"paper": 350}
DEFAULT_EPOCHS = 50


def multistep(u: float) -> float:
    """A tenth after half of the run, a hundredth after three quarters."""
    return 1.0 if u < 0.5 else 0.1 if u < 0.75 else 0.01


SHAPES: dict[str, Callable[[float], float]] = {
    **{name: ENVELOPES[name] for name in ("linear", "cosine", "constant")},
    "multistep": multistep,
}
AVERAGED = ("constant",)  # the final model is the best of the averages: a constant LR alone is no control


@dataclass(frozen=True)
class Job:
    """One policy at one seed. peaks: of a fixed schedule; more than one: the best on the validation images is taken.

    options: of the search policy. resources, slots: of its trials.
    """

    settings: Settings
    policy: str
    epochs: int
    seed: int
    peaks: tuple[float, ...] = (DEFAULT_PEAK,)
    options: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=lambda: {"cpu": 1.0})
    slots: int | None = None

    @property
    def steps(self) -> int:
        return self.epochs * self.settings.steps_per_epoch

    @property
    def searches(self) -> bool:
        return self.policy in SEARCHES

    def name(self, *peaks: float) -> str:
        """Names everything the outcome depends on; the last part is a hash of the details."""
        s = self.settings
        details = {**asdict(s), "data_dir": None, "device": device_name(), **self.options}
        digest = hashlib.blake2b(json.dumps(details, sort_keys=True).encode(), digest_size=4).hexdigest()
        label = "-".join([self.policy, *(f"lr{peak:g}" for peak in peaks)])
        return f"{s.dataset}-{label}-w{s.width:g}-n{s.train_images}-e{self.epochs}-s{self.seed}-{digest}"


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# -- fixed schedules ---------------------------------------------------------------------------------------------------


def train_fixed(job: Job, peak: float, out: Path) -> dict[str, Any]:
    """One full run in a plain loop, or what is kept of it: validation metrics and seconds; its weights lie beside."""
    epoch = job.settings.steps_per_epoch

    def make() -> Trainer:
        return Trainer(lambda: build(asdict(job.settings)), job.seed, averaging=job.policy in AVERAGED)

    run = full_run(make, lambda step: peak * SHAPES[job.policy](step / job.steps), range(epoch, job.steps + 1, epoch),
                   out / "fixed" / job.name(peak))  # fmt: skip
    val = run["val"]
    return {**run, "peak": peak, "val_loss": val["loss"], "val_accuracy": val["accuracy"]}


def run_fixed(job: Job, out: Path) -> dict[str, Any]:
    """The peak that is best on the validation images, and its model's test metrics."""
    runs = [train_fixed(job, peak, out) for peak in job.peaks]
    best = min(runs, key=lambda run: finite_or_inf(run["val_loss"]))
    state = torch.load(best["weights"], map_location="cpu", weights_only=True)
    return dict(
        lrs=[best["peak"]], val_accuracy=best["val_accuracy"], compute=float(len(runs)),
        seconds=sum(run["seconds"] for run in runs), weights="averaged" if job.policy in AVERAGED else "raw",
        **test_metrics(job, state),
    )  # fmt: skip


def test_metrics(job: Job, state: dict[str, Any]) -> dict[str, float]:
    """Loss and accuracy of the model `state` on the 10,000 test images."""
    trainer = Trainer(lambda: build(asdict(job.settings)), job.seed)
    trainer.model.load_state_dict(state)
    found = trainer.evaluate(read_cifar(job.settings.dataset, job.settings.data_dir, train=False))
    return {f"test_{name}": value for name, value in found.items()}


# -- AutoLRS -----------------------------------------------------------------------------------------------------------


def run_search(job: Job, out: Path) -> dict[str, Any]:
    """A run of the pair on Ray, its plots, and its final model's test metrics."""
    result = autolrs_ray.run(
        build, job.steps, policy=job.policy, config=asdict(job.settings), name=job.name(), storage_path=out,
        seed=job.seed, resources=job.resources, slots=job.slots, **job.options,
    )  # fmt: skip
    from autolrs_ray.show.plots import save_plots

    save_plots(result.folder)
    accuracy = "averaged_accuracy" if result.weights == "averaged" else "val_accuracy"
    return dict(
        lrs=[row["lr"] for row in result.rows] if job.policy == "paper" else [result.rows[-1]["lr"]],
        val_accuracy=last_report(result, accuracy), compute=result.compute,
        seconds=result.timing.training_s + result.timing.probing_s, weights=result.weights,
        **test_metrics(job, result.model_state()),
    )  # fmt: skip


def last_report(result: autolrs_ray.RunResult, key: str) -> float | None:
    """The last value of `key` that the main run's trial reported, if its reports are still there."""
    from autolrs_ray.show.run_data import RunData

    rows = RunData.load(result.folder).main_rows()
    return next((row[key] for row in reversed(rows) if key in row), None)


# -- command line ------------------------------------------------------------------------------------------------------


def run_job(job: Job, out: Path) -> dict[str, Any]:
    """Run `job`, or return its kept outcome."""
    peaks = () if job.searches else job.peaks
    file = out / "outcomes" / f"{job.name(*peaks)}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    found = run_search(job, out) if job.searches else run_fixed(job, out)
    images = round(found["compute"] * job.steps * BATCH_SIZE)
    outcome = dict(
        **{**asdict(job.settings), "data_dir": None}, policy=job.policy, tuned=len(peaks) > 1, peaks=peaks,
        epochs=job.epochs, steps=job.steps, seed=job.seed, options=job.options, slots=job.slots, **found,
        train_images_per_s=images / found["seconds"], device=device_name(), hardware=vgg16_report.hardware(),
        date=date.today().isoformat(),
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    vgg16_report.replace(file, json.dumps(outcome))
    print(f"{file.stem}: test accuracy {outcome['test_accuracy']:.2%}, {found['seconds'] / 60:.1f} min", flush=True)
    return outcome


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", choices=sorted(CLASSES), default=["cifar10"])
    parser.add_argument("--policy", nargs="+", choices=[*SEARCHES, *SHAPES], default=["anchored"])
    parser.add_argument("--data-dir", default="data", help="torchvision's root folder (default data)")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch what is not there")
    parser.add_argument("--epochs", type=int, help=f"of the main training (default {DEFAULT_EPOCHS}; paper: 350)")
    parser.add_argument("--seeds", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--peaks", type=float, nargs="+", default=[DEFAULT_PEAK],
                        help="of fixed schedules; several: the best on the validation images (default 0.1)")  # fmt: skip
    parser.add_argument("--width", type=float, default=1.0, help="factor of the channels (default 1)")
    parser.add_argument("--train-images", type=int, default=45_000)
    parser.add_argument("--val-images", type=int, default=5_000)
    parser.add_argument("--padding", choices=PADDINGS, default="zero")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on GPUs)")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="(default: on GPUs)")
    parser.add_argument("--compile", nargs="?", const=True, default=False, metavar="MODE",
                        help='torch.compile, in its mode MODE if given ("reduce-overhead": CUDA graphs)')  # fmt: skip
    parser.add_argument("--stage-steps", type=int, default=1000, help="paper: tau (default 1000)")
    parser.add_argument("--max-stage-steps", type=int, default=8000, help="paper: its maximum (default 8000)")
    parser.add_argument("--reports", type=int, help="paper: validations per probe")
    parser.add_argument("--gpus-per-trial", type=float, help="(default: 0.1 where the cluster has any)")
    parser.add_argument("--cpus-per-trial", type=float, default=1.0)
    parser.add_argument("--slots", type=int, help="trials at the same time (default: as many as fit)")
    parser.add_argument("--address", default=default_address(),
                        help='of the Ray cluster ("auto": the one whose job this is, which is the default there; else "local": '
                        "a new one on this machine)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/vgg16"),
                        help="folder of the runs, on a cluster one that all nodes share (default runs/vgg16)")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="write the tables of all finished runs to --results")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    return parser.parse_args(argv)


def options_of(policy: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the search policies. paper: nothing handed on from probes, so that search costs what training does."""
    if policy == "paper":
        reports = {} if arguments.reports is None else {"probe_reports": arguments.reports}
        stages = {"stage_steps": arguments.stage_steps, "max_stage_steps": arguments.max_stage_steps}
        return {"lr_interval": (1e-3, 1e-1), "num_lrs": 10, "series": "authors", "promote": False, **stages, **reports}
    if policy == "anchored":
        return {"lr_interval": (1e-5, 10.0)}
    return {}


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    resources = resources_of(arguments.cpus_per_trial, arguments.gpus_per_trial, 0.1)
    on_gpu = "gpu" in resources or torch.cuda.is_available()
    autocast, channels_last = (
        on_gpu if given is None else given for given in (arguments.autocast, arguments.channels_last)
    )
    return [
        Job(
            Settings(dataset, os.path.abspath(arguments.data_dir), arguments.width, arguments.train_images,
                     arguments.val_images, arguments.padding, autocast, channels_last, arguments.compile),
            policy, arguments.epochs or EPOCHS.get(policy, DEFAULT_EPOCHS), seed, tuple(arguments.peaks),
            options_of(policy, arguments), resources, arguments.slots,
        )
        for seed in range(arguments.seeds) for dataset in arguments.dataset for policy in arguments.policy
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.report:
        vgg16_report.write_report(arguments.out, arguments.results)
        return
    if any(policy in SEARCHES for policy in arguments.policy):
        start_ray(arguments.address)
    jobs = jobs_of(arguments)
    for dataset in arguments.dataset:
        read_cifar(dataset, arguments.data_dir, train=False, download=arguments.download)
    source = arguments.out / "source"
    source.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    for file in (*here.glob("vgg16_*.py"), here / "full_runs.py"):
        shutil.copy(file, source)
    for job in jobs:
        run_job(job, arguments.out)


def resources_of(cpus: float, gpus: float | None, share: float) -> dict[str, float]:
    """Of a trial. gpus: None for `share` of one where the cluster that was joined has any, though its head may have none."""
    import ray

    if gpus is None:
        gpus = share if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0
    return {"cpu": cpus, **({"gpu": gpus} if gpus else {})}


def default_address() -> str:
    """ "auto" in a job of a cluster, else "local": a Ray of one's own."""
    return "auto" if "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ else "local"


def start_ray(address: str) -> None:
    import ray

    if ray.is_initialized():
        return
    local = {"include_dashboard": False, "object_store_memory": 200_000_000} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level="warning", **local)


if __name__ == "__main__":
    main()
