"""Steps whose loss or gradient is far from the usual."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WATCHED = ("loss", "gradient_norm")
WARM_UP = 100  # steps of this process before anything is called unusual
DECAY = 0.98  # of the usual value and its deviation, per step: about the last fifty steps count
THRESHOLD = 6.0  # deviations above the usual value
MIN_DEVIATION = 0.01  # as a share of the usual value: a number that hardly moves may still move


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step with unusual numbers.

    Attributes:
        numbers: the step's numbers; empty if they are not finite.
        usual: the usual values of the watched numbers.
        keys: the keys of the step's samples.
    """

    step: int
    reason: str
    numbers: Mapping[str, float]
    usual: Mapping[str, float]
    keys: Sequence[str]


class Usual:
    """The exponentially weighted mean of a number over the last steps, and its standard deviation.

    A value above the threshold counts as the threshold itself. A single spike therefore moves the mean little; a new
    level is usual after about ten steps.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        self._variance = 0.0
        self._count = 0

    def is_spike(self, value: float) -> bool:
        """Return whether the value is a spike, and count it."""
        deviation = max(math.sqrt(self._variance), MIN_DEVIATION * abs(self.mean))
        warm = self._count >= WARM_UP
        highest = self.mean + THRESHOLD * deviation if warm else math.inf
        self._count += 1
        weight = max(1 - DECAY, 1 / self._count)
        difference = min(value, highest) - self.mean
        self.mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
        return value > highest


class Spikes:
    """Finds spikes. Ranks that see the same numbers find the same ones."""

    def __init__(self) -> None:
        self._usual = {name: Usual() for name in WATCHED}

    def find(self, step: int, numbers: Mapping[str, float], keys: Sequence[str]) -> Spike | None:
        """Return the spike if the step, all of whose numbers are finite, is one."""
        usual = {name: self._usual[name].mean for name in WATCHED}
        high = [name for name in WATCHED if self._usual[name].is_spike(numbers[name])]
        if not high:
            return None
        reason = ", ".join(f"{name} {numbers[name]:.4g}, usually {usual[name]:.4g}" for name in high)
        return Spike(step=step, reason=reason, numbers=numbers, usual=usual, keys=keys)

    def make_not_finite(self, step: int, reason: str, keys: Sequence[str]) -> Spike:
        """Return the spike of a step with numbers that are NaN or infinite."""
        usual = {name: usual.mean for name, usual in self._usual.items()}
        return Spike(step=step, reason=reason, numbers={}, usual=usual, keys=keys)
