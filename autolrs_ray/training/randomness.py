"""Random numbers that are functions of keys: of Python, NumPy and torch, for steps, epochs and rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

EPOCH, STEP, AUGMENT, VALIDATION, ROW, VALIDATION_ROW = range(6)  # streams that have nothing in common


def seed_of(*key: int) -> int:
    """63 bits for (seed, stream, index, ...); nearby keys give unrelated numbers."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(*key: int) -> torch.Generator:
    """A CPU generator for the key."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed the generators that everybody uses: Python's, NumPy's, torch's, and those of an accelerator.

    device: "cpu" or "cuda" leaves other accelerators alone; torch.manual_seed formats a stack trace for each at every call.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if device is None or device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def states_of_all() -> tuple[Any, ...]:
    """Where Python's and NumPy's generators are: equal as long as nobody draws from them."""
    state: tuple[Any, ...] = np.random.get_state()  # type: ignore[assignment]
    return random.getstate(), *(part.tobytes() if isinstance(part, np.ndarray) else part for part in state)


def reseed(generators: Iterable[Any], *key: int) -> None:
    """Seed generators that somebody made for himself: torch's, NumPy's and Python's, each by `key` and its place."""
    for place, generator in enumerate(generators):
        seed = seed_of(*key, -1 - place)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(seed & 0xFFFFFFFF)
        else:
            generator.seed(seed)


@contextmanager
def random_numbers_put_back() -> Iterator[None]:
    """The generators that everybody uses on the CPU as they were, afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
