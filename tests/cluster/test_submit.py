"""The commands of docs/cluster.md, on two Ray nodes of this machine: a token, a head, a worker, a job, its result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from autolrs_ray.record.journal import read_journal
from tests.cluster.conftest import free_port, wait_for_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cluster.md"
SMALL = ["--num-cpus=2", "--num-gpus=2", "--object-store-memory=80000000", "--block"]
SENT_AT_MOST_B = 8_000_000  # twice the files of the repository; an environment is hundreds of times as much


def commands() -> list[str]:
    """Every line of the page's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def command(start: str) -> str:
    (found,) = [line for line in commands() if line.startswith(start)]
    return found


def test_there_are_ten_commands_and_their_files_exist() -> None:
    until_image = PAGE.read_text().split("## What a trial gets")[0]
    lines = [
        line
        for block in re.findall(r"^```\n(.*?)^```", until_image, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    assert len(lines) == 10
    for line in commands():
        for file in re.findall(r"docker/[\w./]+", line):
            assert (ROOT / file).exists(), file
    assert (ROOT / "experiments" / "digits_job.py").exists()


@dataclass
class Machine:
    """What the page's reader has: a shell with these variables, and these ports instead of Ray's usual ones."""

    environment: dict[str, str]
    port: int
    dashboard: int
    storage: Path
    folder: Path
    prefix: tuple[str, ...] = ()

    def said(self, line: str) -> str:
        """`line` of the page as it is run here."""
        for usual, here in (
            ("6379", self.port),
            ("8265", self.dashboard),
            ("/shared/runs", self.storage),
            ("HEAD", "127.0.0.1"),
        ):
            line = line.replace(usual, str(here))
        return line

    def export(self, line: str) -> None:
        name, value = self.said(line).removeprefix("export ").split("=", 1)
        self.environment[name] = value

    def run(self, line: str, limit_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.said(line), shell=True, cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=limit_s, check=False,
        )  # fmt: skip

    def follow(self, line: str, text: str) -> tuple[float, subprocess.CompletedProcess[str]]:
        """As `run`, with the seconds until it said `text`."""
        began, said, lines = time.monotonic(), float("nan"), []
        options: dict[str, Any] = dict(shell=True, cwd=ROOT, env=self.environment, text=True)
        with subprocess.Popen(self.said(line), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
            assert process.stdout is not None
            for output in process.stdout:
                lines.append(output)
                if text in output:
                    said = time.monotonic() - began
        return said, subprocess.CompletedProcess(line, process.returncode, "".join(lines))

    @contextmanager
    def serving(self, line: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """`line`, which starts Ray, in the foreground of a process that ends with the block."""
        words = [*self.prefix, *self.said(line).split(), *SMALL, *options]
        process = subprocess.Popen(words, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    def wait_for(self, line: str, answer: str, process: subprocess.Popen[bytes], limit_s: float = 90.0) -> None:
        deadline = time.monotonic() + limit_s
        while answer not in (output := self.run(line).stdout):
            assert process.poll() is None, f"{process.args} ended with status {process.returncode}"
            assert time.monotonic() < deadline, output
            time.sleep(0.5)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A head and a worker with two GPUs each, started by the page's commands, with a token."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="alr", dir="/tmp", ignore_cleanup_errors=True))
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"
        }
        own = {
            "HOME": folder,
            "PATH": path,
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        (Path(folder) / "ray").mkdir()
        found = Machine(
            {**kept, **own}, free_port(), free_port(), tmp_path_factory.mktemp("shared") / "runs", Path(folder)
        )
        generated = found.run(command("ray get-auth-token"))
        assert generated.returncode == 0, generated.stdout
        found.export(command("export RAY_AUTH_MODE"))
        found.export(command("export RAY_API_SERVER_ADDRESS"))
        began = time.monotonic()
        agent = free_port()
        own_ports = (f"--dashboard-port={found.dashboard}", f"--dashboard-agent-listen-port={agent}")
        head = stack.enter_context(found.serving(command("ray start --head"), *own_ports))
        found.wait_for("ray job list", "[", head)
        wait_for_port(agent, head)
        other = (f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}/other")  # as on another machine
        worker = stack.enter_context(found.serving(command("ray start --address"), *other))
        found.wait_for(f"ray status --address 127.0.0.1:{found.port}", "/4.0 GPU", worker)
        print(f"cluster up after {time.monotonic() - began:.0f} s")
        yield found


SHORT = " --steps 120 --num-lrs 5"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_page_from_the_token_to_the_schedule(machine: Machine) -> None:
    submit = command("ray job submit --working-dir . -- autolrs") + SHORT
    began = time.time()
    accepted, submitted = machine.follow(submit, "submitted successfully")
    assert submitted.returncode == 0, submitted.stdout
    working_dir = machine.folder / "ray" / "session_latest" / "runtime_resources" / "working_dir_files"
    sent = sum(file.stat().st_size for file in working_dir.glob("*/**/*"))
    assert 0 < sent < SENT_AT_MOST_B
    print(f"{sent:,} bytes sent")
    outcome = next(json.loads(line) for line in submitted.stdout.splitlines() if line.startswith('{"done"'))
    assert outcome["done"]
    events = read_journal(machine.storage / "digits")
    first = min(event["began"] for event in events if event["event"] == "segment")
    ended = time.time() - began
    print(f"job accepted after {accepted:.0f} s, first probe step after {first - began:.0f} s, end after {ended:.0f} s")

    again = machine.run(submit)
    assert again.returncode == 0, again.stdout
    assert f'"loss": {outcome["loss"]}' in again.stdout

    shown = machine.run(command("autolrs show"))
    assert "anchored policy, finished" in shown.stdout, shown.stdout
    drawn = machine.run(command("autolrs plot"))
    assert (machine.storage / "digits" / "plots" / "race.png").exists(), drawn.stdout
    exported = machine.run(command("autolrs export"))
    assert json.loads((machine.storage / "schedule.json").read_text())["total_steps"] == 120, exported.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_stopped_job_submitted_again_resumes(machine: Machine) -> None:
    submit = command("ray job submit --working-dir . -- autolrs") + " --name stopped --steps 600 --num-lrs 5"
    no_wait = submit.replace(" --working-dir", " --submission-id=first --no-wait --working-dir")
    assert machine.run(no_wait).returncode == 0
    deadline = time.monotonic() + 120
    journal = machine.storage / "stopped" / "autolrs.jsonl"
    while not (journal.exists() and '"event":"rung"' in journal.read_text()):
        assert time.monotonic() < deadline, machine.run("ray job logs first").stdout
        time.sleep(0.2)
    assert machine.run("ray job stop first").returncode == 0
    submitted = machine.run(submit)
    assert submitted.returncode == 0, submitted.stdout
    events = [event["event"] for event in read_journal(journal)]
    assert "resume" in events
    assert events.count("done") == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_failed_run_is_a_failed_job(machine: Machine) -> None:
    failed = machine.run(command("ray job submit --working-dir . -- autolrs") + " --name failed --steps 0")
    assert failed.returncode == 1
    assert "total_steps must be at least 2, got 0" in failed.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_vgg16_experiment_is_a_job_on_the_cluster(machine: Machine) -> None:
    """On small files instead of CIFAR's own. It joins the cluster: a Ray of its own would not hold two GPUs per trial."""
    line = command("ray job submit --working-dir . -- python -m experiments.vgg16_cifar")
    small = (
        " --policy anchored --width .125 --train-images 256 --val-images 40 --epochs 5 --reports 1 --slots 1 --no-autocast"
        " --gpus-per-trial 2 --cpus-per-trial 1"
    )
    data = machine.storage.parent / "data"
    line = line.replace("experiments.vgg16_cifar", "tests.cifar_files").replace("/shared/data", str(data))
    submitted = machine.run(line + small, limit_s=400)
    assert submitted.returncode == 0, submitted.stdout
    (file,) = (machine.storage / "vgg16" / "outcomes").glob("*.json")
    outcome = json.loads(file.read_text())
    assert (outcome["policy"], outcome["steps"], outcome["epochs"]) == ("anchored", 10, 5)
    assert 0.0 <= outcome["test_accuracy"] <= 1.0
    assert f"test accuracy {outcome['test_accuracy']:.2%}" in submitted.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_nobody_submits_without_the_token(machine: Machine) -> None:
    stranger = replace(machine, environment={**machine.environment, "HOME": str(machine.storage)})
    stranger.environment["RAY_AUTH_MODE"] = "disabled"
    refused = stranger.run("ray job submit -- true")
    assert refused.returncode != 0
    assert "401" in refused.stdout or "Unauthorized" in refused.stdout or "uthenticat" in refused.stdout, refused.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_node_that_does_not_share_the_folder_is_named(machine: Machine) -> None:
    parent = str(machine.storage.parent)
    alone = ("unshare", "--mount", "bash", "-c", f'mount -t tmpfs tmpfs {parent} && exec "$@"', "alone")
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    options = (f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={machine.folder}/third")
    with replace(machine, prefix=alone).serving(command("ray start --address"), *options) as node:
        machine.wait_for(f"ray status --address 127.0.0.1:{machine.port}", "/6.0 GPU", node)
        submitted = machine.run(command("ray job submit --working-dir . -- autolrs") + " --name unshared" + SHORT)
    assert submitted.returncode == 1
    assert re.search(r"RuntimeError: the run folder \S+ is not there on 1 of the cluster's nodes", submitted.stdout), (
        submitted.stdout
    )
