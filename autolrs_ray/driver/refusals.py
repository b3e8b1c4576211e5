"""What of trials is refused before any starts."""

from __future__ import annotations

from ray.tune.experiment import Trial

from autolrs_ray.private import checkpoints_kept


def refuse_unfit(trial: Trial) -> None:
    """Raise ValueError for what Tune was given that no run gets through: it would delete checkpoints that trials start from."""
    if (kept := checkpoints_kept(trial)) is not None:
        raise ValueError(
            f"CheckpointConfig(num_to_keep={kept}) has Tune delete checkpoints that other trials start from: AutoLRS deletes "
            "checkpoints itself, leave num_to_keep out"
        )
