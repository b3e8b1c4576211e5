"""A process that dies in the middle of writing, pretended in this one; and a file that executes code when it is unpickled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Malice:
    """Unpickling it creates the file `flag`."""

    def __init__(self, flag: os.PathLike[str]) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


@contextmanager
def dies_after_renames(survives: int) -> Iterator[None]:
    """The rename after `survives` ones that succeed ends the block, by a KeyboardInterrupt; fails if it was not reached."""
    replace, left = os.replace, [survives]

    def dying(source: str, target: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying)
        try:
            yield
        except KeyboardInterrupt:
            return
    pytest.fail(f"no more than {survives} renames")
