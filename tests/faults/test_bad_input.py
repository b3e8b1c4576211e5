"""The table of bad constructor arguments in tests/test_misuse.py once more, so that `make faults` counts them. (The cases
that need Ray stay in `make test`.)"""

from __future__ import annotations

import pytest

from tests import test_misuse
from tests.faults.harness import COUNTS

pytestmark = pytest.mark.slow


def test_bad_arguments_are_named() -> None:
    for policy, options, message in test_misuse.ROWS:
        test_misuse.test_constructor_names_the_value_and_the_mend(policy, options, message)
        COUNTS["bad_inputs"] += 1
