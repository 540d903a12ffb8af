"""Means over seeds, and the paired comparison of two methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Summary:
    """Of some numbers: NaN where there are too few of them (a deviation takes two)."""

    count: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class Paired:
    """The difference of two methods, seed by seed.

    Attributes:
        by_seed: the difference on each seed that both have.
        mean: of them; NaN without any.
        low, high: the 95 % t interval of the mean; None with fewer than two seeds.
    """

    by_seed: dict[int, float]
    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool | None:
        return None if self.low is None else self.low > 0 or self.high < 0

    def holds(self, difference: float) -> bool | None:
        return None if self.low is None else self.low <= difference <= self.high


def summarize(values: Iterable[float | None]) -> Summary:
    """Mean and sample standard deviation of the numbers among `values`."""
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    mean = statistics.fmean(numbers) if numbers else math.nan
    return Summary(len(numbers), mean, statistics.stdev(numbers) if len(numbers) > 1 else math.nan)


def signed(difference: float) -> str:
    """With one decimal and a sign, such as −1.4."""
    text = f"{difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def paired_difference(first: Mapping[int, float], second: Mapping[int, float], level: float = 0.95) -> Paired:
    """`first` minus `second` over the seeds that both have."""
    by_seed = {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}
    summary = summarize(by_seed.values())
    if summary.count < 2:
        return Paired(by_seed, summary.mean, None, None)
    margin = float(stats.t.ppf((1 + level) / 2, summary.count - 1)) * summary.deviation / math.sqrt(summary.count)
    return Paired(by_seed, summary.mean, summary.mean - margin, summary.mean + margin)
