"""The tables of bad constructor arguments in tests/test_misuse.py once more, so that `make faults` counts them. (The cases
that need Ray stay in `make test`.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import test_misuse
from tests.faults.harness import COUNTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("test", [
    test_misuse.test_constructor_names_the_value_and_the_mend,
    test_misuse.test_anchored_constructor_names_the_value,
])  # fmt: skip
def test_bad_arguments_are_named(test: Callable[..., None]) -> None:
    (table,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    for options, message in table:
        test(options, message)
        COUNTS["bad_inputs"] += 1
