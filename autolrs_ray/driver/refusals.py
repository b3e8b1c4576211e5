"""What of trials is refused before any starts."""

from __future__ import annotations

import math
from typing import Any

from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from autolrs_ray.core.checks import require_float
from autolrs_ray.private import checkpoints_kept


def require_amounts(resources: dict[str, Any] | PlacementGroupFactory) -> None:
    """Raise TypeError or ValueError that names it for an amount that is no finite number >= 0: Ray's raylet dies of it."""
    for bundle in resources.bundles if isinstance(resources, PlacementGroupFactory) else [resources]:
        for name, amount in bundle.items():
            require_float(f"resources[{name!r}]", amount, 0.0, math.inf)


def refuse_unfit(trial: Trial) -> None:
    """Raise ValueError for what Tune was given that no run gets through: resources that no node can have, and deletions of
    checkpoints that trials start from."""
    require_amounts(trial.placement_group_factory)
    if (kept := checkpoints_kept(trial)) is not None:
        raise ValueError(
            f"CheckpointConfig(num_to_keep={kept}) has Tune delete checkpoints that other trials start from: AutoLRS deletes "
            "checkpoints itself, leave num_to_keep out"
        )
