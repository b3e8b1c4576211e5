"""What an installation holds: sdist and wheel, with and without extras, and what happens where these are missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import autolrs_ray
from autolrs_ray import INSTALL_TUNE
from autolrs_ray.record.record import Record

ROOT = Path(__file__).resolve().parent.parent

BLOCK = """
import sys

class Hiding:
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

sys.meta_path[:] = [Hiding()]
"""

REPLAY = """
import sys, torch, autolrs_ray
from autolrs_ray import LearnedLRScheduler, LearnedSchedule, lr_range_test
from autolrs_ray.integrations.follower import Follower
from autolrs_ray.record.record import Record
from autolrs_ray.outcome.schedule import Piece

folder = sys.argv[1]
schedule = LearnedSchedule(10, (Piece(0, 10, 0.5, "linear"),))
open(f"{folder}/s.json", "w").write(schedule.to_json())
schedule.write_csv(f"{folder}/s.csv")
record = Record(f"{folder}/run")
options = {"total_steps": 10, "policy": "anchored", "options": {"envelope": "linear"}}
commit = {"event": "commit", "arm": "t0", "stage": 0, "start": 0, "end": 10, "lr": 0.5, "loss": 1.0}
record.append([{"event": "start", "config": options}, commit, {"event": "done", "arm": "t0", "lr": 0.5, "loss": 1.0}])
record.close()
for source in ("s.json", "s.csv", "run"):
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = LearnedLRScheduler(optimizer, LearnedSchedule.load(f"{folder}/{source}"))
    lrs = []
    for _ in range(10):
        lrs.append(round(scheduler.get_last_lr()[0], 9))
        optimizer.step()
        scheduler.step()
    assert lrs == [0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05], (source, lrs)
model = torch.nn.Linear(1, 1)
batches = [(torch.ones(2, 1), torch.zeros(2, 1))]
assert lr_range_test(model, torch.optim.SGD(model.parameters(), lr=1.0), torch.nn.functional.mse_loss, batches).suggestion
assert Follower({"lr": 0.1}).lr_at(3) == 0.1
for name in ("AutoLRSSearch", "AutoLRSScheduler", "AutoLRSTrainable", "run", "trainable_for", "lr_at"):
    try:
        getattr(autolrs_ray, name)
    except ImportError as error:
        assert str(error) == f"autolrs_ray.{name} needs ray, which is not installed: {autolrs_ray.INSTALL_TUNE}", error
    else:
        raise AssertionError(f"{name} came without Ray")
print("replayed")
"""

OPTIONAL = ["accelerate", "botorch", "gpytorch", "lightning", "matplotlib", "mlflow", "pyarrow", "ray", "rich", "scipy",
            "sklearn", "tensorboardX", "transformers", "typer"]  # fmt: skip

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
CONSOLE = "import sys\nfrom {} import {} as main\nsys.argv[0] = 'autolrs'\nmain()".format(
    *SCRIPTS["autolrs"].split(":")
)


def python(*arguments: str | Path, executable: str | Path = sys.executable) -> str:
    """Standard output of a Python with no path but its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(executable), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_schedule_replays_without_any_extra_and_ray_parts_name_the_mend(tmp_path: Path) -> None:
    assert "replayed" in python("-c", BLOCK.format(names=OPTIONAL) + REPLAY, tmp_path)


def test_only_what_the_extra_brings_is_said_to_be_missing() -> None:
    code = BLOCK.format(names=["torch"]) + (
        "import autolrs_ray\n"
        "try:\n    autolrs_ray.LearnedSchedule\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    assert python("-c", code).strip() == "No module named 'torch'"


def command(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script, in a Python that has run `before`."""
    return subprocess.run(
        [sys.executable, "-c", before + CONSOLE, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("missing", [OPTIONAL, ["ray"]])
def test_the_command_without_the_extra_is_one_line_that_names_the_mend(missing: list[str], tmp_path: Path) -> None:
    record = Record(tmp_path)
    config = dict(total_steps=20, policy="paper", lr_interval=None, metric="val_loss", mode="min", time_attr="step")
    record.append([{"event": "start", "config": {**config, "options": {}}}])
    record.close()
    result = command(BLOCK.format(names=missing), "tensorboard", str(tmp_path))
    package = "typer" if "typer" in missing else "ray"
    assert result.stderr == f"autolrs: {package} is not installed: {INSTALL_TUNE}\n"
    assert (result.returncode, result.stdout) == (1, "")


def test_the_command_with_the_extra_is_the_whole_command() -> None:
    result = command("", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Automatic learning rates" in result.stdout


def test_every_third_party_import_is_declared() -> None:
    extras = ("", "tune", "cluster", "lightning", "huggingface")
    declared = {name.replace("-", "_") for extra in extras for name in direct_requirements(extra)} | {"autolrs_ray"}
    declared |= {
        "cycler",
        "jinja2",
        "linear_operator",
        "pyarrow",
        "tensorboardX",
    }  # of matplotlib, torch, gpytorch, ray
    imports = re.compile(r"^\s*(?:from|import) ([A-Za-z_]\w*)", re.MULTILINE)
    for path in (ROOT / "autolrs_ray").rglob("*.py"):
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        foreign = {name for name in imports.findall(code) if name not in sys.stdlib_module_names}
        assert foreign <= declared, f"{path.name} imports {sorted(foreign - declared)}"


def direct_requirements(extra: str) -> set[str]:
    """Names that the installed package's metadata asks for with `extra` ("": without any)."""
    requirements = map(Requirement, importlib.metadata.requires("autolrs-ray") or [])
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})}


# -- the wheel ---------------------------------------------------------------------------------------------------------


def closure(requirements: list[str], extra: str) -> set[str]:
    """Names of all distributions that `requirements` bring along, as they are installed here."""
    found: set[str] = set()
    waiting = [(Requirement(text), {"", extra}) for text in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in extras):
            continue
        name = requirement.name.lower()
        if name in found and not requirement.extras:
            continue
        found.add(name)
        if name != "autolrs-ray":
            more = importlib.metadata.requires(name) or []
            waiting += [(Requirement(text), {"", *requirement.extras}) for text in more]
    return found - {"autolrs-ray"}


def environment(folder: Path, wheel: Path, extra: str) -> Path:
    """The Python of a new virtual environment with `wheel` and what its metadata asks for, linked in from this one."""
    python("-m", "venv", folder)
    executable = folder / "bin" / "python"
    python(
        "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel, executable=executable
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    asked = re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)
    for name in closure(asked, extra):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return executable


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sdist and wheel, as `python -m build` makes them: the wheel out of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    isolation = ["--no-isolation"] if find_spec("hatchling") else []  # with it, the backend is downloaded
    python("-m", "build", *isolation, "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("autolrs_ray-*.whl")
    return path


@pytest.mark.slow
def test_the_sdist_holds_what_git_does_and_nothing_else(dist: Path) -> None:
    (path,) = dist.glob("autolrs_ray-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {""}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    assert names == {*(name for name in listed.stdout.splitlines() if (ROOT / name).exists()), "PKG-INFO"}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_says_that_it_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("autolrs_ray/")}
        tops = {name.split("/")[0].split("-")[0] for name in archive.namelist()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "autolrs_ray").rglob("*.py")}
    assert names >= sources | {"autolrs_ray/py.typed"}
    assert tops == {"autolrs_ray"}


@pytest.mark.slow
def test_the_wheel_replays_in_a_clean_environment_without_extras(wheel: Path, tmp_path: Path) -> None:
    executable = environment(tmp_path / "venv", wheel, "")
    present = python("-c", f"import importlib.util as u; print([n for n in {OPTIONAL!r} if u.find_spec(n)])",
                     executable=executable)  # fmt: skip
    assert present.strip() == "[]"
    assert "replayed" in python("-c", REPLAY, tmp_path, executable=executable)
    told = subprocess.run([executable.parent / "autolrs", "--help"], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (1, f"autolrs: typer is not installed: {INSTALL_TUNE}\n")
    assert wheel.name in INSTALL_TUNE


@pytest.mark.slow
def test_the_wheel_has_all_public_names_in_a_clean_environment_with_the_extra_tune(wheel: Path, tmp_path: Path) -> None:
    executable = environment(tmp_path / "venv", wheel, "tune")
    code = "import autolrs_ray as a; print([getattr(a, n).__name__ for n in a.__all__] == a.__all__, a.__file__)"
    answer, file = python("-c", code, executable=executable).split()
    assert answer == "True"
    assert Path(file).is_relative_to(tmp_path)
    assert "Automatic learning rates" in python(executable.parent / "autolrs", "--help", executable=executable)
    (tmp_path / "mine.py").write_text("import sys, autolrs_ray\nprint(autolrs_ray.__version__, sys.argv[1:])\n")
    script = python(executable.parent / "autolrs", "run", tmp_path / "mine.py", "--seed", "1", executable=executable)
    assert script == f"{autolrs_ray.__version__} ['--seed', '1']\n"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [executable.parent / "autolrs", "run", "digits"]
    told = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert told.returncode == 1, told.stdout
    assert told.stderr.startswith("autolrs: unknown experiment 'digits'; experiments are in a clone of the repository")


EVERYTHING = "cluster,experiments,huggingface,lightning"
WITH_EVERYTHING = """
import autolrs_ray, autolrs_ray.integrations.huggingface, autolrs_ray.integrations.lightning
import accelerate, lightning, prodigyopt, schedulefree, sklearn, transformers
from ray.dashboard import dashboard
"""


@pytest.mark.slow
@pytest.mark.parametrize(("extras", "code"), [("tune", ""), (EVERYTHING, WITH_EVERYTHING)], ids=["tune", "everything"])
def test_an_installer_finds_all_that_the_extras_need(extras: str, code: str, wheel: Path, tmp_path: Path) -> None:
    """A real installation, out of the cache that `make` has filled: no network."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("no uv beside this Python; `make` installs it")
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    environment = {**os.environ, "UV_OFFLINE": "1", "VIRTUAL_ENV": str(tmp_path / "venv")}
    environment |= {"UV_FIND_LINKS": links} if links else {}  # as make does
    shim, versions = ROOT / "tools" / "torchvision-cpu-shim", ROOT / "constraints.txt"
    for command in (["venv", tmp_path / "venv", "--python", sys.executable],
                    ["pip", "install", "--constraint", versions, f"{wheel}[{extras}]", shim]):  # fmt: skip
        done = subprocess.run([uv, "--quiet", *command], env=environment, capture_output=True, text=True, timeout=240)
        if "not found in the cache" in done.stderr or "network was disabled" in done.stderr:
            pytest.skip(f"uv's cache no longer holds what .venv was made of: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr
    executable = tmp_path / "venv" / "bin" / "python"
    names = "import autolrs_ray as a\nprint([getattr(a, n).__name__ for n in a.__all__] == a.__all__, a.__file__)\n"
    answer, file = python("-c", code + names, executable=executable).split()
    assert answer == "True"
    assert Path(file).is_relative_to(tmp_path)
    assert "Automatic learning rates" in python(executable.parent / "autolrs", "--help", executable=executable)
