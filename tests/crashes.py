"""A process that dies in the middle of writing, pretended in this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


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
