"""On which device a trial trains."""

from __future__ import annotations

import ray
import torch


def own_device() -> str:
    """ "cuda" where this process may use it: under Ray only if Ray has given it a GPU, or a share of one, else "cpu".

    Ray (2.60) leaves all GPUs of a node visible to a process that asked for none: all such trials would meet on the first one.
    """
    asked = not ray.is_initialized() or bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
    return "cuda" if asked and torch.cuda.is_available() else "cpu"
