"""Why trials crash: the exception and the user's line of code, and what follows for the run."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

PLAIN_MISTAKES = {"AttributeError", "ImportError", "IndexError", "KeyError", "ModuleNotFoundError", "NameError",
                  "NotImplementedError", "SyntaxError", "TypeError", "UnboundLocalError"}  # fmt: skip
"""Exceptions that no other learning rate, machine or try would have mended."""

_ARITHMETIC = {"FloatingPointError", "LinAlgError", "OverflowError", "ZeroDivisionError"}
_NUMERIC = re.compile(r"\b(nans?|infs?|infinite|infinity|(non|is|all)?_?-?finite|isnan|isinf|diverged?|diverges|exploded?|"
                      r"overflow(ed)?)\b", re.IGNORECASE)  # fmt: skip
_OF_NO_ARM = {"ActorDiedError", "ActorUnavailableError", "NodeDiedError", "OutOfMemoryError", "RayActorError",
              "WorkerCrashedError"}  # fmt: skip
_OF_STEPS = {
    "AssertionError",
    "Exception",
    "RuntimeError",
    "ValueError",
}  # and what a loop raises where a loss is too large
_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+)(, in (?P<function>.+))?$')
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NOT_THE_USERS = (
    str(Path(__file__).resolve().parents[1]),
    str(Path(ray.__file__).parent),
    *(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")),
)
_IN_GROUP = re.compile(
    r"^( *\|)+ ?|^ *\+ (?=Exception Group Traceback)"
)  # how Python draws the lines of an ExceptionGroup
_GROUP_RULE = re.compile(r"^[ |]*\+[-+]+")
_MISSING = re.compile(r"No such file or directory: '(?P<path>[^']+)'")
_LONGEST = 300
_UNKNOWN = "it raised an error"
_LEFT = (
    "Should not have reached here. The TuneController"  # Ray's words for a function that is gone, and has not returned
)
_CREATION = "because of an error raised in its creation task"  # Ray's words for an actor whose __init__ has raised
_EXIT = "SystemExit: the function was left by sys.exit() or StopIteration; it is to return, or to raise what is wrong"


@dataclass(frozen=True)
class Crash:
    """An exception that ended a trial. error: its line, "NameError: name 'x' is not defined". file, line, function and code:
    where in the user's own files it came from; empty where that is not known. in_creation: of the trial's actor, by `setup`."""

    error: str
    file: str = ""
    line: int = 0
    function: str = ""
    code: str = ""
    in_creation: bool = False

    @property
    def kind(self) -> str:
        """Name of the exception's type; "" where there was none to be read."""
        found = re.match(r"(?:\w+\.)*_*(\w+)(?:: |:?$)", self.error)
        return found[1] if found else ""

    @property
    def place(self) -> tuple[Any, ...]:
        """What two crashes have in common that are alike: the exception's type and the line of code."""
        return (self.kind, self.file, self.line) if self.file else (self.error,)

    @property
    def numeric(self) -> bool:
        """Whether it says what a loss of NaN would have said: the numbers left their range."""
        return self.kind in _ARITHMETIC or bool(self.kind and _NUMERIC.search(f"{self.error} {self.code}"))

    @property
    def of_the_cluster(self) -> bool:
        """Whether a process or a machine was lost, not the trial's own code to blame."""
        return self.kind in _OF_NO_ARM or not self.kind

    def __str__(self) -> str:
        where = f"{self.file}, line {self.line}" if self.file else ""
        where += f", in {self.function}" if self.function else ""
        where += f": {self.code}" if where and self.code else ""
        missing = _MISSING.search(self.error)
        hint = ""
        if missing and not Path(missing["path"]).is_absolute():
            hint = (
                ". The path is relative, and trials run in a folder of their own: give an absolute path (in config, or by "
                "os.path.abspath before the run), or set RAY_CHDIR_TO_TRIAL_DIR=0 in the environment"
            )
        return self.error + (f" ({where})" if where else "") + hint


def crash_of(trial: tune.experiment.Trial) -> Crash:
    """How `trial` has crashed last, read from its error file."""
    try:
        return parse(Path(trial.error_file).read_text())
    except (OSError, TypeError, AttributeError):
        return Crash(_UNKNOWN)


def parse(text: str) -> Crash:
    """The last exception in `text`, a traceback as Tune writes it."""
    lines = _COLOUR.sub("", text.rpartition("Failure # ")[2]).splitlines()
    lines = [_IN_GROUP.sub("", line) for line in lines if not _GROUP_RULE.match(line)]
    frames = [(i, found) for i, line in enumerate(lines) if (found := _FRAME.match(line))]
    after = frames[-1][0] + 1 if frames else 0
    rest = lines[after:] if frames else lines[1:] or lines
    begin = next((i for i, line in enumerate(rest) if re.match(r"[A-Za-z_][\w.]*(\(\w+\))?(:|$)", line)), None)
    if begin is None:
        begin = next((i for i, line in enumerate(rest) if line.strip()), None)
    if begin is None:
        return Crash(_UNKNOWN)
    message = " ".join(line.strip() for line in rest[begin:] if line.strip())
    message = re.sub(r"^[\w.]*\((\w+)\):", r"\1:", message)
    message = re.sub(r" class_name: .*? ip: \S+", "", message)  # of a lost process: what Ray calls it, and where it was
    if _LEFT in message:
        return Crash(_EXIT)
    error = message if len(message) <= _LONGEST else message[: _LONGEST - 3] + "..."
    for i, frame in reversed(frames):
        if not frame["file"].startswith(_NOT_THE_USERS) and not frame["file"].startswith("<"):
            code = lines[i + 1].strip() if i + 1 < len(lines) and lines[i + 1].startswith("    ") else ""
            return Crash(error, frame["file"], int(frame["line"]), frame["function"] or "", code, _CREATION in text)
    return Crash(error, in_creation=_CREATION in text)


class Crashes:
    """The crashes so far: where all trials end alike before anything is reported, no other learning rate will do better."""

    def __init__(self) -> None:
        self._arms: dict[tuple[Any, ...], set[str]] = {}  # place of a crash -> the arms that ended there
        self._last: dict[str, tuple[Any, ...]] = {}

    def hopeless(self, arm: str, crash: Crash, in_setup: bool) -> str:
        """Why the run is to end with a crash of `arm` in a run that has had no report yet; "" if it is not.

        A plain mistake of the code is enough by itself. What machines and files may be to blame for has to happen to two arms
        alike. What a learning rate that is too large may be to blame for is none of it, unless no step had been trained.
        """
        arms = self._arms.setdefault(crash.place, set())
        arms.add(arm)
        if crash.of_the_cluster or crash.numeric:
            return ""
        if crash.kind in PLAIN_MISTAKES:
            return f"the first trial raised {crash}"
        alike = len(arms) > 1 and len(self._arms) == 1
        return f"the first trials all raised {crash}" if alike and (in_setup or crash.kind not in _OF_STEPS) else ""

    def again(self, arm: str, crash: Crash) -> bool:
        """Whether `arm` has ended just so before: then a third try is no use. Lost processes and machines do not count."""
        before, self._last[arm] = self._last.get(arm), crash.place
        own = bool(crash.file) or crash.error == _EXIT or crash.kind in PLAIN_MISTAKES
        return before == crash.place and own and not crash.of_the_cluster
