"""The line of blocks in the live view: what share of the slots was held over the time so far."""

from __future__ import annotations

import random

import pytest

from autolrs_ray.driver.usage import BLOCKS, WIDTH, SlotUse


def test_it_shows_who_held_how_much_when() -> None:
    use = SlotUse()
    assert use.line() == "slots  0% held"
    for now, busy in ((0.0, 8), (2.0, 0), (3.0, 4), (4.0, 4)):
        use.sample(now, busy, 8)
    assert use.line() == f"slots ██{BLOCKS[0]}{BLOCKS[4]} 62% held"


@pytest.mark.parametrize("seed", range(5))
def test_however_long_it_goes_on_the_line_stays_short_and_nothing_is_lost(seed: int) -> None:
    generator, use = random.Random(seed), SlotUse()
    now, busy, held, whole = 1e5, 0, 0.0, 0.0
    use.sample(now, busy, 4)
    for _ in range(500):
        step = generator.choice([0.01, 0.7, 3.0, 1000.0])
        held, whole, now = held + step * busy, whole + 4 * step, now + step
        busy = generator.randrange(5)
        use.sample(now, busy, 4)
        assert len(use.line().split("slots ")[1].rsplit(" ", 2)[0]) <= WIDTH
    assert use.share == pytest.approx(held / whole)
