"""Tables, JSON and figure of the comparison at size, from its outcomes."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """The GPU, or the CPU by name with its number of cores and what of bfloat16 it has, and torch's version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    bf16 = " and ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores{f' ({bf16})' if bf16 else ''}, shared, torch {torch.__version__}"


def write_report(out: Path, results: Path, order: list[str]) -> None:
    raise NotImplementedError
