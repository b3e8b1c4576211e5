"""How much of the slots a run has held over its time so far, in one line of blocks."""

from __future__ import annotations

BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH = 32


class SlotUse:
    """Shares of the slots that trials held, in WIDTH stretches of time at most; two become one when these do not suffice."""

    def __init__(self) -> None:
        self._stretch_s = 1.0
        self._held: list[list[float]] = []  # slot-seconds held, and in all, of every stretch
        self._began: float | None = None
        self._last = (0.0, 0, 1)

    def sample(self, now: float, busy: int, slots: int) -> None:
        """At `now`, in seconds, `busy` of `slots` are held; until then it was as at the last call."""
        if self._began is None:
            self._began, self._last = now, (now, busy, slots)
        before, was_busy, were = self._last
        self._last = now, busy, slots
        while now - self._began >= self._stretch_s * WIDTH:
            pairs = [self._held[i : i + 2] for i in range(0, len(self._held), 2)]
            self._held = [[sum(part) for part in zip(*pair, strict=True)] for pair in pairs]
            self._stretch_s *= 2.0
        while before < now:
            index = int((before - self._began) / self._stretch_s)
            end = min(now, self._began + (index + 1) * self._stretch_s)
            end = end if end > before else now  # of a stretch that ends here, by rounding
            while len(self._held) <= index:
                self._held.append([0.0, 0.0])
            self._held[index][0] += min(was_busy, were) * (end - before)
            self._held[index][1] += were * (end - before)
            before = end

    @property
    def share(self) -> float:
        """Of all slot-seconds so far."""
        whole = sum(all_s for _, all_s in self._held)
        return sum(held_s for held_s, _ in self._held) / whole if whole else 0.0

    def line(self) -> str:
        """A block for every stretch, and the share of all of them."""
        shares = [held_s / all_s if all_s else 0.0 for held_s, all_s in self._held]
        return f"slots {''.join(BLOCKS[round(share * (len(BLOCKS) - 1))] for share in shares)} {self.share:.0%} held"
