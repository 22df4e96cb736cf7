"""Figures with their uncertainty: intervals, paired differences, and how well a judge agrees with the truth.

    python -c "from models.statistics import wilson; print(wilson(42, 60))"

Only numpy. A figure that the data cannot give (no items, one class only, all tied) is None, never made up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


@dataclass(frozen=True)
class Proportion:
    """A share of n items with its interval; `mean`, `low` and `high` are None when n is 0."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of (a - b) over n paired items with its interval and two-sided p; None when n is 0."""

    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int


@dataclass(frozen=True)
class Agreement:
    """Mean rank correlation within questions; `questions` counts those where both sides vary."""

    kendall: float | None
    spearman: float | None
    questions: int


def wilson(right: int, n: int, z: float = Z95) -> Proportion:
    """Wilson's score interval of a proportion (Wilson 1927); stays within [0, 1] and holds for small n."""
    if n == 0:
        return Proportion(None, None, None, 0)
    if not 0 <= right <= n:
        raise ValueError(f"{right} right of {n}: a count must lie between 0 and n")
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Proportion(share, 0.0 if right == 0 else float(low), 1.0 if right == n else float(high), n)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Difference:
    """Bootstrap of the mean difference of two systems on the same items (percentile interval, two-sided p).

    Resampling n items with replacement is drawing how often each distinct difference occurs, so answers that
    are only right or wrong need three counts a resample, whatever n is.
    """
    if len(a) != len(b):
        raise ValueError(f"paired items must match: {len(a)} against {len(b)}")
    n = len(a)
    if n == 0:
        return Difference(None, None, None, None, 0)
    values, counts = np.unique(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    means = draws @ values / n
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    smaller = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (smaller + 1) / (resamples + 1))
    return Difference(float(values @ counts / n), float(low), float(high), p, n)


def auc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Chance that a right item scores above a wrong one, ties counting half; None unless both kinds occur."""
    values, truth = np.asarray(scores, dtype=float), np.asarray(right, dtype=bool)
    positive, negative = int(truth.sum()), int((~truth).sum())
    if positive == 0 or negative == 0:
        return None
    rank_sum = float(ranks(values)[truth].sum())
    return (rank_sum - positive * (positive + 1) / 2) / (positive * negative)


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1; tied values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b, which corrects for ties; None if either side does not vary. Quadratic in length."""
    upper = np.triu_indices(len(a), k=1)
    signs_a = np.sign(np.subtract.outer(np.asarray(a, dtype=float), np.asarray(a, dtype=float)))[upper]
    signs_b = np.sign(np.subtract.outer(np.asarray(b, dtype=float), np.asarray(b, dtype=float)))[upper]
    norm = np.sqrt((signs_a != 0).sum() * (signs_b != 0).sum())
    return float((signs_a * signs_b).sum() / norm) if norm else None


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rho: Pearson's correlation of tied ranks; None if either side does not vary."""
    x, y = ranks(a), ranks(b)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def within_groups(groups: Sequence[Hashable], a: Sequence[float], b: Sequence[float]) -> Agreement:
    """Rank correlation inside each group (the paths of one question), averaged over groups that vary."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    taus, rhos = [], []
    for indices in members.values():
        left, right = [a[i] for i in indices], [b[i] for i in indices]
        tau, rho = kendall(left, right), spearman(left, right)
        if tau is not None and rho is not None:
            taus.append(tau)
            rhos.append(rho)
    if not taus:
        return Agreement(None, None, 0)
    return Agreement(float(np.mean(taus)), float(np.mean(rhos)), len(taus))
