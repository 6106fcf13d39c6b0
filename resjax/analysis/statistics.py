"""Statistics over seeds: intervals of a mean, and paired differences between settings.

The seed is the unit of replication. Runs of one seed at several depths are averaged before seeds
are compared, so that depth does not pass for repetition.

Two intervals answer how well a handful of seeds determines a mean. Student's t interval holds its
level at any number of seeds if the values are normal. The percentile bootstrap (Efron 1979) assumes
no distribution, but with few seeds it is too narrow: with three it is the range of the values,
which covers the mean in about 75 % of cases and not in 95 %.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from resjax.analysis.runs import REPEATS, primary_metrics, varying
from resjax.analysis.setting_names import describe_setting, setting_names

LEVEL = 0.95
"""Confidence level of all intervals."""

FEWEST_SEEDS = 3
"""The smallest number of seeds from which anything is concluded."""

EXACT = 7
"""The largest number of values for which all resamples are enumerated (1,716 distinct ones)."""

RESAMPLES = 10_000

Interval = tuple[float, float]


class Estimate(NamedTuple):
    """The mean of some values, one for each seed, and its confidence intervals."""

    mean: float
    deviation: float  # sample standard deviation, NaN for a single value
    seeds: int
    interval: Interval  # Student's t
    bootstrap: Interval  # percentile

    @property
    def outer(self) -> Interval:
        """The smallest interval that contains both intervals."""
        return min(self.interval[0], self.bootstrap[0]), max(self.interval[1], self.bootstrap[1])


def estimate(values: ArrayLike) -> Estimate:
    """Returns the mean of the finite values with its intervals at `LEVEL`, NaN where undefined."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    mean = float(array.mean()) if len(array) else math.nan
    deviation = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return Estimate(mean, deviation, len(array), t_interval(array), bootstrap_interval(array))


def t_interval(values: ArrayLike) -> Interval:
    """Returns Student's confidence interval of the mean; NaN for fewer than two values."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return math.nan, math.nan
    quantile = stdtrit(len(array) - 1, (1 + LEVEL) / 2)
    half = float(quantile * array.std(ddof=1) / math.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half


def bootstrap_interval(values: ArrayLike) -> Interval:
    """Returns the percentile bootstrap interval of the mean; NaN for fewer than two values.

    Up to `EXACT` values, the means of all resamples are enumerated with their probabilities. For
    more values, `RESAMPLES` resamples are drawn from a fixed seed. Either way the same values give
    the same interval.
    """
    array = np.sort(np.asarray(values, np.float64))
    if len(array) < 2:
        return math.nan, math.nan
    means, weights = _resampled_means(array)
    order = np.argsort(means, kind="stable")
    cumulated = np.cumsum(weights[order])
    tail = (1 - LEVEL) / 2
    ends = np.searchsorted(cumulated, [tail, 1 - tail]).clip(max=len(means) - 1)
    low, high = means[order][ends]
    return float(low), float(high)


def _resampled_means(array: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns means of resamples and their probabilities, shape (resamples,) each."""
    count = len(array)
    if count > EXACT:
        return array[_random_picks(count)].mean(axis=1), np.full(RESAMPLES, 1 / RESAMPLES)
    picks = np.array(list(itertools.combinations_with_replacement(range(count), count)))
    times = (picks[:, :, None] == np.arange(count)).sum(axis=1)
    factorials = np.array([math.factorial(n) for n in range(count + 1)], np.float64)
    orderings = factorials[count] / factorials[times].prod(axis=1)
    return array[picks].mean(axis=1), orderings / count**count


@lru_cache(maxsize=4)  # the settings of a sweep have equally many seeds
def _random_picks(count: int) -> NDArray[np.int64]:
    """Returns the indices of random resamples, shape (RESAMPLES, count)."""
    # RandomState, because NumPy promises never to change its stream.
    return np.random.RandomState(0).randint(count, size=(RESAMPLES, count))


def select(runs: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the runs whose columns have the values `where`; a list allows several values.

    None is the value of a column that a run lacks.

    Raises:
      KeyError: the table has no such column.
    """
    chosen = pd.Series(True, runs.index)
    for column, value in where.items():
        if column not in runs:
            raise KeyError(f"{column}: no such column in the table of runs")
        allowed = value if isinstance(value, list | set | frozenset | range) else [value]
        cells = runs[column].astype(object).where(runs[column].notna(), None)
        chosen &= pd.Series([cell in allowed for cell in cells], runs.index, dtype=bool)
    return runs[chosen]


def paired_differences(
    runs: pd.DataFrame,
    value: str,
    treatment: Mapping[str, Any],
    control: Mapping[str, Any],
    equal: Collection[str] | None = None,
) -> pd.DataFrame:
    """Pairs runs of two settings that are equal in all else, and subtracts.

    Unfinished runs have no result and are left out. A diverged run forms a pair, but its value is
    NaN: the average of a result and a failure is neither.

    Args:
      runs: a table of `load_runs`, with further columns if `value` or a setting is one.
      value: the column to compare.
      treatment: the values of the columns that select the runs of the one setting, as in `select`.
      control: those of the other setting.
      equal: the columns in which the runs of a pair agree beside the seed; by default all that
        vary within one of the settings, such as the depth.

    Returns:
      One row for each pair: `seed` and the columns `equal`; the values `treatment` and `control`;
      `difference`, treatment minus control; `treatment_diverged` and `control_diverged` (bool).

    Raises:
      KeyError: the table has no such column.
      ValueError: several runs of one setting agree in all columns of `equal`.
    """
    settings = {"treatment": treatment, "control": control}
    sides = {name: select(runs, setting) for name, setting in settings.items()}
    if equal is None:
        free = {name for side in sides.values() for name in varying(side)}
        free -= {*treatment, *control}
        equal = [name for name in map(str, runs) if name in free]
    # Configs of earlier versions lack the field.
    repeats = [n for n in REPEATS if n in runs and all(s[n].notna().all() for s in sides.values())]
    keys = ["seed", *repeats, *(name for name in equal if name != "seed")]
    tables = []
    for name, side in sides.items():
        ended = side[side["finished"] | side["diverged"]]
        if twice := _first_duplicate(ended, keys):
            raise ValueError(
                f"several runs of {describe_setting(settings[name])} have {twice}; name "
                "what distinguishes them in the setting or in equal="
            )
        table = ended[keys].copy()
        table[name] = ended[value].astype(float).where(~ended["diverged"])
        table[f"{name}_diverged"] = ended["diverged"].astype(bool)
        tables.append(table)
    pairs = tables[0].merge(tables[1], on=keys)
    pairs["difference"] = pairs["treatment"] - pairs["control"]
    values = ["treatment", "control", "difference", "treatment_diverged", "control_diverged"]
    return pairs[[*keys, *values]]


def _first_duplicate(runs: pd.DataFrame, keys: Sequence[str]) -> str:
    twice = runs[runs.duplicated(list(keys))]
    return describe_setting(dict(twice.iloc[0][list(keys)])) if len(twice) else ""


def by_seed(pairs: pd.DataFrame, column: str = "difference") -> pd.Series:
    """Averages a column of `paired_differences` over the pairs of each seed.

    A seed that lacks pairs which other seeds have is left out, because its average would be of
    other networks. A seed with a pair that has no value is NaN.
    """
    groups = pairs.groupby("seed")[column]
    means = groups.agg(lambda values: values.mean(skipna=False))
    return means[groups.size() == groups.size().max()]


def slopes(
    runs: pd.DataFrame, value: str, over: str, where: Mapping[str, Any] | None = None
) -> pd.Series:
    """Returns the change of a value for each doubling of the column `over`, for each seed.

    The change is the least-squares slope against log2 of `over`. Only seeds that have a finished
    run, which did not diverge, at every value of `over` count.
    """
    chosen = select(runs, where or {})
    places = set(chosen[over])
    chosen = chosen[chosen["finished"] & ~chosen["diverged"]]
    found = {}
    for seed, group in chosen.groupby("seed"):
        if len(places) > 1 and set(group[over]) == places:
            doublings = np.log2(group[over].astype(float))
            found[seed] = float(np.polyfit(doublings, group[value].astype(float), 1)[0])
    return pd.Series(found, dtype=float)


def intervals(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean of each final metric for each setting, with its intervals.

    Returns:
      One row for each group of `summarize` and each column `train_` and `test_`: the columns of
      `varying`, `metric`, and those of `_columns`.
    """
    by = varying(runs)
    metrics = [str(name) for name in runs if str(name).startswith(("train_", "test_"))]
    groups = runs.groupby(by, sort=False, dropna=False) if by else [((), runs)]
    rows = []
    for key, group in groups:
        averaged = group[group["finished"] & ~group["diverged"]]
        for name in metrics:
            setting = dict(zip(by, key, strict=True))
            rows.append({**setting, "metric": name, **_columns(estimate(averaged[name]))})
    return pd.DataFrame(rows)


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns paired differences of the primary metrics for each field that varies.

    The other values of a field are compared with its first value, at equal seed and at
    equal values of all other fields, save those that change with the field. A field is left
    out if one of its runs was trained twice.

    Returns:
      One row for each field, value, group of pairs and metric: `field`, `value`, `baseline`, `at`
      (what else the pairs have in common), `metric`, `pairs`, `diverged` (pairs without a
      difference), and the columns of `_columns`, treatment minus baseline.
    """
    names = [f"{kind}_{m.name}" for m in primary_metrics(runs) for kind in ("train", "test")]
    rows = []
    for field in varying(runs):
        values = runs[field].astype(object).where(runs[field].notna(), None)
        baseline, *others = dict.fromkeys(values)
        for value in others:
            for name in names:
                try:
                    pairs = paired_differences(runs, name, {field: value}, {field: baseline})
                except ValueError:  # a run was trained twice
                    continue
                equal = [n for n in map(str, pairs) if n == "sweep" or _is_field(n)]
                places = setting_names(pairs, equal) if equal else pd.Series("", pairs.index)
                for place, group in pairs.groupby(places, sort=False):
                    lost = group[["treatment_diverged", "control_diverged"]].any(axis=1)
                    rows.append(
                        {
                            **{"field": field, "value": value, "baseline": baseline, "at": place},
                            **{"metric": name, "pairs": len(group), "diverged": int(lost.sum())},
                            **_columns(estimate(by_seed(group[~lost]))),
                        }
                    )
    return pd.DataFrame(rows)


def _is_field(name: str) -> bool:
    return "." in name and name not in REPEATS


def _columns(found: Estimate) -> dict[str, float]:
    """Returns an estimate as columns: seeds, mean, deviation, and both ends of each interval."""
    return {
        "seeds": found.seeds,
        "mean": found.mean,
        "deviation": found.deviation,
        "t_low": found.interval[0],
        "t_high": found.interval[1],
        "bootstrap_low": found.bootstrap[0],
        "bootstrap_high": found.bootstrap[1],
    }
