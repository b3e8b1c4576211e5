"""Where the checkpoints of a run are stored, and whether they are whole there."""

from __future__ import annotations

from pathlib import Path

from autolrs_ray.record.checkpoints import MANIFEST_FILE, CheckpointError, verify_checkpoint
from autolrs_ray.record.mirror import Mirror


class Stored:
    """The store of a run, where its folder is not a local one, and what its trainable writes."""

    def __init__(self) -> None:
        self._mirror: Mirror | None = None
        self._manifests = False

    @property
    def mirror(self) -> Mirror | None:
        """The run's folder on a store; None where that is a local one."""
        return self._mirror

    def keep_on(self, mirror: Mirror) -> None:
        """The record and the checkpoints belong to a store; the first one named counts."""
        self._mirror = self._mirror or mirror

    def expect_manifests(self, always: bool) -> None:
        """`always`: every checkpoint has a manifest, or is damaged."""
        self._manifests = always

    def has_manifest(self, path: str) -> bool:
        """Whether the checkpoint in the local folder `path` has a manifest, or is damaged if it has not."""
        return self._manifests or Path(path, MANIFEST_FILE).exists()

    def damage(self, path: str) -> str:
        """What is wrong on storage with the checkpoint at `path`; "" if nothing. Raises OSError if a store does not answer."""
        try:
            if self._mirror is not None:
                self._mirror.verify(path, self._manifests)
            elif self.has_manifest(path) or not Path(path).is_dir():
                verify_checkpoint(path)
        except CheckpointError as error:
            return str(error)
        return ""
