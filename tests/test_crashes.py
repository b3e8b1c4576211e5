"""Why a trial crashed, out of Tune's error files: the exception's own line, the user's line of code, and what follows."""

from __future__ import annotations

import pytest

from autolrs_ray.driver.crashes import Crash, Crashes, parse

RAY = "/somewhere/site-packages/ray/tune/trainable/function_trainable.py"


def traceback(error: str, *frames: tuple[str, int, str, str]) -> str:
    lines = [f'  File "{file}", line {line}, in {where}\n    {code}' for file, line, where, code in frames]
    head = ["Failure # 1 (occurred at 2026-11-26_20-00-00)", "\x1b[36mray::ImplicitFunc.train()\x1b[39m (pid=1)"]
    return "\n".join([*head, *lines, error])


USERS = ("/home/me/train.py", 5, "train", "model.train()")


def test_the_exceptions_line_and_the_users_line_of_code_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autolrs_ray.driver.crashes._NOT_THE_USERS", ("/somewhere/site-packages",))
    text = traceback("NameError: name 'model' is not defined", (RAY, 45, "<lambda>", "self._trainable_func()"), USERS,
                     ("/somewhere/site-packages/torch/nn.py", 1, "call", "x"))  # fmt: skip
    crash = parse(text)
    assert crash == Crash("NameError: name 'model' is not defined", "/home/me/train.py", 5, "train", "model.train()")
    assert str(crash) == "NameError: name 'model' is not defined (/home/me/train.py, line 5, in train: model.train())"
    assert parse(text.replace("NameError", "ray.exceptions.RayTaskError(NameError)")).kind == "NameError"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("RuntimeError: Error(s) in loading state_dict for Linear:\n\tsize mismatch for weight\n\tsize mismatch for bias\n",
         "RuntimeError: Error(s) in loading state_dict for Linear: size mismatch for weight size mismatch for bias"),
        ("KeyError: 'width'", "KeyError: 'width'"),
        ("AssertionError", "AssertionError"),
        ("ValueError: first\n\nAdditional notes:\nlast line", "ValueError: first Additional notes: last line"),
        ("my.package.Trouble: [bold]50 %[/bold]", "my.package.Trouble: [bold]50 %[/bold]"),
        ("ValueError: " + "x" * 1000, "ValueError: " + "x" * 285 + "..."),
    ],
)  # fmt: skip
def test_an_error_of_several_lines_begins_with_its_first(error: str, shown: str) -> None:
    assert parse(traceback(error, USERS)).error == shown


def test_the_last_of_several_exceptions_and_of_several_failures_counts() -> None:
    first = traceback("KeyError: 'a'", USERS)
    second = 'Traceback (most recent call last):\n  File "/home/me/train.py", line 9, in load\n    raise ValueError(1)'
    chained = (
        f"{first}\n\nDuring handling of the above exception, another exception occurred:\n\n{second}\nValueError: 1"
    )
    assert (parse(chained).error, parse(chained).line) == ("ValueError: 1", 9)
    assert parse(first + "\n" + traceback("OSError: two", USERS)).error == "OSError: two"


def test_a_group_of_exceptions_is_read_like_one() -> None:
    text = """Failure # 1 (occurred)
  + Exception Group Traceback (most recent call last):
  |   File "/home/me/train.py", line 3, in load
  |     raise ExceptionGroup("many", [ValueError("a"), KeyError("b")])
  | ExceptionGroup: many (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | ValueError: a
    +---------------- 2 ----------------
    | KeyError: 'b'
    +------------------------------------
"""
    crash = parse(text)
    assert crash.kind == "ExceptionGroup"
    assert (crash.file, crash.line) == ("/home/me/train.py", 3)
    assert crash.error == "ExceptionGroup: many (2 sub-exceptions) ValueError: a KeyError: 'b'"


def test_of_a_lost_process_it_is_told_why_and_not_what_ray_calls_it() -> None:
    text = (
        "Failure # 1 (occurred)\nThe actor died unexpectedly before finishing this task.\n\tclass_name: T\n"
        "\tactor_id: 87c3\n\tpid: 1810\n\tnamespace: 2341\n\tip: 127.0.0.1\nThe actor is dead because it was killed."
    )
    told = "The actor died unexpectedly before finishing this task. The actor is dead because it was killed."
    assert parse(text).error == told


@pytest.mark.parametrize("text", ["", "\n\n", "Failure # 1 (occurred)\n", "no traceback at all"])
def test_a_file_without_an_exception_is_one_too(text: str) -> None:
    assert parse(text).of_the_cluster
    assert str(parse(text))


def test_a_lost_process_is_the_clusters() -> None:
    crash = parse(
        "Failure # 1 (occurred at now)\nThe actor died unexpectedly before finishing this task.\n\tclass_name: T\n"
    )
    assert crash.of_the_cluster
    assert parse("Failure # 1 (x)\nray.exceptions.ActorDiedError: The actor died.\n").of_the_cluster


@pytest.mark.parametrize(
    ("error", "code", "numeric"),
    [
        ("AssertionError", "assert torch.isfinite(loss)", True),
        ("AssertionError: loss is nan", "", True),
        ("RuntimeError: probability tensor contains either `inf`, `nan` or element < 0", "", True),
        ("ValueError: non-finite loss at step 5", "", True),
        ("RuntimeError: training diverged", "", True),
        ("FloatingPointError: underflow", "", True),
        ("OverflowError: math range error", "", True),
        ("torch._C._LinAlgError: the input is not positive-definite", "", True),
        ("RuntimeError: CUDA error: out of memory", "", False),
        ("RuntimeError: no such file: data.bin", "", False),
        ("ValueError: information of the final inference", "", False),
        ("AssertionError", "assert batch is not None", False),
    ],
)
def test_what_says_the_same_as_a_loss_of_nan(error: str, code: str, numeric: bool) -> None:
    assert Crash(error, "/home/me/train.py", 5, "train", code).numeric is numeric


@pytest.mark.parametrize(("path", "told"), [("data.npy", True), ("../x/data.npy", True), ("/data/x.npy", False)])
def test_a_relative_path_that_is_not_found_comes_with_the_mend(path: str, told: bool) -> None:
    crash = Crash(f"FileNotFoundError: [Errno 2] No such file or directory: '{path}'")
    assert ("trials run in a folder of their own" in str(crash)) is told
    assert ("RAY_CHDIR_TO_TRIAL_DIR=0" in str(crash)) is told


def crash(kind: str, line: int = 5) -> Crash:
    return Crash(f"{kind}: it", "/home/me/train.py", line, "train", "x")


@pytest.mark.parametrize(
    ("kind", "in_setup", "after"),
    [("NameError", False, 1), ("TypeError", True, 1), ("OSError", False, 2), ("Trouble", True, 2), ("RuntimeError", True, 2),
     ("RuntimeError", False, None), ("AssertionError", False, None), ("FloatingPointError", True, None),
     ("ActorDiedError", True, None)],
)  # fmt: skip
def test_a_run_whose_first_trials_end_alike_ends(kind: str, in_setup: bool, after: int | None) -> None:
    crashes = Crashes()
    told = [bool(crashes.hopeless(f"t{i}", crash(kind), in_setup)) for i in range(3)]
    assert told == [after is not None and i + 1 >= after for i in range(3)]
    assert [bool(Crashes().hopeless("t0", crash("OSError"), True)) for _ in range(3)] == [False] * 3  # one arm


def test_trials_that_end_in_different_ways_end_no_run() -> None:
    crashes = Crashes()
    assert not any(crashes.hopeless(f"t{i}", crash("OSError", line=i), True) for i in range(4))


def test_the_same_crash_of_an_arm_twice_is_enough_unless_a_machine_was_lost() -> None:
    crashes = Crashes()
    assert [crashes.again(arm, crash("ValueError", line)) for arm, line in (("a", 1), ("a", 2), ("b", 2), ("a", 2))] == [
        False, False, False, True,
    ]  # fmt: skip
    assert not any(crashes.again("c", Crash("ActorDiedError: it")) for _ in range(3))
    assert not any(crashes.again("d", Crash("OSError: a store that does not answer")) for _ in range(3))
    assert [crashes.again("e", Crash("NotImplementedError")) for _ in range(2)] == [False, True]  # no save_checkpoint


def test_a_function_that_was_left_by_an_exit_is_told_so_and_is_tried_twice_at_most() -> None:
    text = (
        "RuntimeError: Should not have reached here. The TuneController should not have scheduled another `train` call."
    )
    left = parse(traceback(text, (RAY, 131, "step", "raise RuntimeError(")))
    assert "the function was left by sys.exit() or StopIteration" in str(left)
    assert left.kind == "SystemExit"
    crashes = Crashes()
    assert [crashes.again("a", left) for _ in range(2)] == [False, True]
    assert [bool(crashes.hopeless(arm, left, False)) for arm in ("a", "b")] == [False, True]
