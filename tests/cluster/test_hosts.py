"""Three hosts, each with a network address, process numbers and shared memory of its own, and one folder that all share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from autolrs_ray.record.journal import read_journal

pytestmark = [pytest.mark.slow, pytest.mark.hosts, pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
LOSES_SOON = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


class Hosts:
    """Network namespaces on one bridge, in a namespace of its own: nothing of the machine's own network is touched."""

    def __init__(self, stack: ExitStack, count: int) -> None:
        self._stack, mark = stack, uuid.uuid4().hex[:6]
        self.folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="alr", dir="/tmp", ignore_cleanup_errors=True))
        )
        self.names = [f"alr{mark}h{number}" for number in range(1, count + 1)]
        self.addresses = [f"10.77.0.{number}" for number in range(1, count + 1)]
        switch = f"alr{mark}s"
        self._namespace(switch)
        self._ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", switch, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            self._namespace(name)
            port = f"port{number}"
            self._ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            self._ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            self._ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")
        own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", **LOSES_SOON}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, **own, "PATH": path, "RAY_TMPDIR": str(self.folder)}

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def _namespace(self, name: str) -> None:
        self._ip("netns", "add", name)
        self._stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)

    def start(self, index: int, *words: str) -> subprocess.Popen[bytes]:
        """Run `words` on a host, which dies with this process."""
        alone = ["unshare", "--pid", "--fork", "--mount-proc", "--mount", "--kill-child=SIGKILL"]
        shell = ["bash", "-c", 'mount -t tmpfs tmpfs /dev/shm && "$@"', "host"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[index], *alone, *shell, *words],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(self.lose, process)
        return process

    def lose(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()

    def ask(self, *words: str, limit_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run `words` on the first host."""
        command = ["ip", "netns", "exec", self.names[0], *words]
        return subprocess.run(
            command, env=self.environment, text=True, capture_output=True, check=False, timeout=limit_s, cwd=ROOT
        )


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            yield Hosts(stack, 3)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs the right to make network namespaces ({error})")


def until(ready: object, limit_s: float, said: object) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline, said()  # type: ignore[operator]
        time.sleep(0.5)


def test_a_race_over_three_hosts_survives_the_loss_of_one(hosts: Hosts, tmp_path: Path) -> None:
    small = ("--block", "--num-cpus=1", "--object-store-memory=80000000")
    head = (f"--node-ip-address={hosts.addresses[0]}", "--port=6379", f"--temp-dir={hosts.folder}/1")
    began = time.monotonic()
    hosts.start(0, "ray", "start", "--head", "--dashboard-host=127.0.0.1", *head, *small)
    until(lambda: hosts.ask("ray", "status", "--address=10.77.0.1:6379").returncode == 0, 90, lambda: "no head")
    others = []
    for index in (1, 2):
        own = (f"--node-ip-address={hosts.addresses[index]}", f"--temp-dir={hosts.folder}/{index + 1}")
        others.append(hosts.start(index, "ray", "start", "--address=10.77.0.1:6379", *own, *small))
        cpus = f"/{index + 1}.0 CPU"
        until(lambda cpus=cpus: cpus in hosts.ask("ray", "status", "--address=10.77.0.1:6379").stdout, 90,
              lambda: hosts.ask("ray", "status", "--address=10.77.0.1:6379").stdout)  # fmt: skip
    print(f"three hosts up after {time.monotonic() - began:.0f} s")

    journal, jobs = tmp_path / "digits" / "autolrs.jsonl", ("ray", "job")
    run = ("autolrs", "run", "digits_job", "--storage", str(tmp_path), "--steps", "15000", "--num-lrs", "6")
    server = "--address=http://127.0.0.1:8265"
    submitted = hosts.ask(*jobs, "submit", server, "--submission-id=race", "--no-wait", "--working-dir=.", "--", *run)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    def log() -> str:
        return hosts.ask(*jobs, "logs", server, "race").stdout

    until(lambda: seen(tmp_path) == set(hosts.addresses), 120, log)
    hosts.lose(others[1])
    lost = time.monotonic()
    until(lambda: "succeeded" in hosts.ask(*jobs, "status", server, "race").stdout, 240, log)
    print(f"done {time.monotonic() - lost:.0f} s after a host was lost")
    events = read_journal(journal)
    assert events[-1]["event"] == "done"
    assert any("room for 2 trials at a time now, for 3 before" in event.get("message", "") for event in events)


def seen(storage: Path) -> set[str]:
    """Addresses of the hosts whose trials have reported."""
    lines = [line for file in (storage / "digits").glob("*/result.json") for line in file.read_text().splitlines()]
    return {json.loads(line)["node_ip"] for line in lines if line.endswith("}")}
