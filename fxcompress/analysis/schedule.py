"""Points on the way from a whole network to a goal: how fast iterative pruning goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fxcompress.errors import OptionError, did_you_mean

#: What is left after a share of the way, given what there is at the start and at the goal. Each gives the start for a
#: share of 0 and the goal for 1.
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda start, goal, share: float(start * (goal / start) ** share),
    "linear": lambda start, goal, share: start + (goal - start) * share,
    "cubic": lambda start, goal, share: goal + (start - goal) * (1.0 - share) ** 3,
}


@dataclass(frozen=True)
class Way:
    """A point on the way from a start to a goal. Prints as "cubic:0.4".

    schedule: "constant" (every step of the way takes the same share of what is left), "linear" (the same amount) or
        "cubic" (much at first and little at the end: Zhu and Gupta, To prune, or not to prune, 2017).
    share: how much of the way it is, from 0 to 1.
    """

    schedule: str
    share: float

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            known = ", ".join(map(repr, SCHEDULES))
            hint = did_you_mean(self.schedule, SCHEDULES)
            raise OptionError(f"a schedule is one of {known}, not {self.schedule!r}{hint}")
        if not 0 <= self.share <= 1:
            raise OptionError(f"a share of the way is between 0 and 1, not {self.share!r}")

    def __str__(self) -> str:
        return f"{self.schedule}:{self.share!r}"

    def left(self, start: float, goal: float) -> float:
        """Return what is left at this point: a number between `start` and `goal`, both above 0."""
        return SCHEDULES[self.schedule](start, goal, self.share)

    def gone(self, amount: float) -> float:
        """Return which share of the whole is gone at this point, if `amount` is at the goal; at most six digits."""
        return round(1.0 - self.left(1.0, 1.0 - amount), 6)
