"""What a run ran on: versions and hardware, for its journal. Nothing is decided by it, and no resume compares it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("autolrs-ray", "torch", "ray", "botorch", "gpytorch", "numpy")
_TYPE = "accelerator_type:"  # how Ray's resources begin that name a kind of GPU


def environment() -> dict[str, Any]:
    """As JSON values: "python", "platform" and "cpus" of this machine, "packages" (name -> version, of those installed), and
    of the Ray cluster, where there is one, "gpus" (their number) and "gpu_types" (their names)."""
    cluster = _cluster()
    return dict(
        python=platform.python_version(), platform=platform.platform(), cpus=os.cpu_count(),
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
        gpus=int(cluster.get("GPU", 0)),
        gpu_types=sorted(name.removeprefix(_TYPE) for name in cluster if name.startswith(_TYPE)),
    )  # fmt: skip


def _cluster() -> dict[str, float]:
    """The resources of the Ray cluster. It is asked, not torch: to ask for a GPU's name sets up CUDA in this process, which
    must not be forked any more then."""
    import ray

    return dict(ray.cluster_resources()) if ray.is_initialized() else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
