"""The disk fills up under a run: a clear error within a minute, and the run goes on once there is space again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Driver, journal_text

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk: Path, leave: int) -> Iterator[None]:
    """Inside the block, `disk` has `leave` bytes free (in pages of 4,096), and what is deleted there makes no room again."""
    ballast, enough = disk / "ballast", threading.Event()

    def fill(file: RawIOBase, leave: int) -> None:
        while not enough.is_set():
            status = os.statvfs(disk)
            free = status.f_bavail * status.f_bsize
            leave = min(leave, free)
            with contextlib.suppress(OSError):  # the run may take the last pages first
                for _ in range((free - leave) // 4096):
                    file.write(bytes(4096))
            time.sleep(0.0005)

    with open(ballast, "wb", buffering=0) as file:
        filling = threading.Thread(target=fill, args=(file, leave))
        filling.start()
        try:
            yield
        finally:
            enough.set()
            filling.join()
    os.remove(ballast)


@pytest.mark.parametrize(("policy", "event", "leave", "message"), [
    ("paper", '"event":"choice","stage":1', 0, "cannot write the record of the run"),
    # some writes still succeed
    ("paper", '"arm":"s001p01","lr"', 12288, "cannot write the record of the run|failed for good"),
    ("anchored", '"event":"decision","step":64', 0, "cannot write the record of the run"),
])  # fmt: skip
def test_full_disk_is_a_clear_error_and_the_run_resumes(
    small_disk: Path,
    tmp_path: Path,
    cluster: str,
    undisturbed: Callable[[str], dict[str, Any]],
    policy: str,
    event: str,
    leave: int,
    message: str,
) -> None:
    command = ("--policy", policy, "--address", cluster, "--config", json.dumps({"pause_s": 0.1}))
    with Driver(small_disk, command, outputs=tmp_path) as driver:
        assert driver.wait_until(lambda: event in journal_text(small_disk))
        with filled(small_disk, leave):
            began = time.monotonic()
            assert driver.finish() == 1
        assert time.monotonic() - began < 60.0
        last = driver.errors.read_text().splitlines()[-1]
        assert re.search(f"AutoLRSError: .*({message}).*No space left on device", last), last
    with Driver(small_disk, command, outputs=tmp_path) as driver:
        driver.ends_as(undisturbed(policy))
