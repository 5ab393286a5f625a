"""Steps whose loss or gradient is far above what is usual, to be found again by the keys of their samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WATCHED = ("loss", "gradient_norm")
WARM_UP = 100  # steps, of this process, before anything is called unusual
DECAY = 0.98  # of the usual value and its deviation, per step: they remember about fifty
THRESHOLD = 6.0  # deviations above the usual value
LEAST_DEVIATION = 0.01  # share of the usual value: a number that hardly moves may still move


@dataclass(frozen=True, kw_only=True)
class Spike:
    """One step that was not as usual.

    Attributes:
        numbers: of the step, as far as they are finite.
        usual: what the watched numbers usually are.
        keys: of the step's samples.
    """

    step: int
    reason: str
    numbers: Mapping[str, float]
    usual: Mapping[str, float]
    keys: Sequence[str]


class Usual:
    """The mean of a number over the last steps and its deviation from it, weighted exponentially.

    A value beyond the threshold counts as one that is just there: a single one moves little, a level that stays is
    usual after about ten steps.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        self._variance = 0.0
        self._count = 0

    def exceeded_by(self, value: float) -> bool:
        """Whether the value is a spike; either way it counts from now on."""
        deviation = max(math.sqrt(self._variance), LEAST_DEVIATION * abs(self.mean))
        warm = self._count >= WARM_UP
        highest = self.mean + THRESHOLD * deviation if warm else math.inf
        self._count += 1
        weight = max(1 - DECAY, 1 / self._count)
        difference = min(value, highest) - self.mean
        self.mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
        return value > highest


class Spikes:
    """Finds spikes. Ranks that are shown the same numbers find the same ones."""

    def __init__(self) -> None:
        self._usual = {name: Usual() for name in WATCHED}

    def look(self, step: int, numbers: Mapping[str, float], keys: Sequence[str]) -> Spike | None:
        """The step's spike, if it is one; all its numbers are finite."""
        usual = {name: self._usual[name].mean for name in WATCHED}
        high = [name for name in WATCHED if self._usual[name].exceeded_by(numbers[name])]
        if not high:
            return None
        reason = ", ".join(f"{name} {numbers[name]:.4g}, usually {usual[name]:.4g}" for name in high)
        return Spike(step=step, reason=reason, numbers=numbers, usual=usual, keys=keys)

    def not_finite(self, step: int, reason: str, keys: Sequence[str]) -> Spike:
        """A step with numbers that are NaN or infinite."""
        usual = {name: usual.mean for name, usual in self._usual.items()}
        return Spike(step=step, reason=reason, numbers={}, usual=usual, keys=keys)
