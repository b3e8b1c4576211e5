"""In which dtype forward passes run under autocast."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)


def autocast_dtype(wanted: bool | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype that `wanted` of a TrainingTask means on `device`; None: no autocast.

    True is bfloat16 where the device computes in it. Where torch only emulates it (GPUs before Ampere, CPUs without AVX-512), a
    convolution takes more than ten times as long as in float32: there True is no autocast, and a warning says so.
    """
    if wanted is True and _emulates_bfloat16(device):
        kind = "GPU" if device.type == "cuda" else "CPU"
        logger.warning(
            "autocast=True: this %s does not compute in bfloat16, so training is in the dtype of the weights, which is faster "
            "there; autocast=torch.bfloat16 insists", kind,
        )  # fmt: skip
        return None
    if isinstance(wanted, bool):
        return torch.bfloat16 if wanted else None
    return wanted


def _emulates_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return not (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False
