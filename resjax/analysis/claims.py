"""Judges claims of papers by runs: statement, source, published and measured numbers, verdict.

An experiment's `claims` returns a list of `Claim`. `compare`, `trend` and `within` make one from a
table of runs; `judge` gives the verdict on numbers that an experiment computes itself, one for each
seed.

A verdict rests on both intervals of `statistics.Estimate` at 95 %, Student's t and the bootstrap,
and on at least three seeds. If either interval leaves the sign of a difference open, the verdict
is "undecided". With three seeds a difference is then decided if it exceeds 2.5 of its standard
deviations, which implies that all three seeds agree. Nothing corrects for the number of claims.

A diverged run has no value. If every run of one setting diverged and none of the other did, the
first setting is worse; with three seeds chance does that in one of 20 cases (Fisher's exact test).
If only some diverged, the verdict is "undecided".
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from resjax.analysis.runs import primary_metrics
from resjax.analysis.setting_names import describe_setting
from resjax.analysis.statistics import (
    FEWEST_SEEDS,
    Estimate,
    by_seed,
    estimate,
    paired_differences,
    select,
    slopes,
)
from resjax.run_files import Metric

AGREES = "agrees"
DISAGREES = "disagrees"
UNDECIDED = "undecided"
NOT_TESTED = "not tested at this scale"
VERDICTS = (AGREES, DISAGREES, UNDECIDED, NOT_TESTED)

EXPLANATION = (
    "A verdict rests on differences at equal seed, averaged over whatever else a setting contains. "
    "It needs three seeds and two 95 % confidence intervals of the mean difference, Student's t "
    "and the bootstrap, that both leave no doubt of the sign; otherwise it is “undecided”. The "
    "interval that is shown has the outer ends of both. With three seeds the bootstrap interval is "
    "merely their range, which covers the mean in 75 % of cases, and Student's t decides. A run "
    "that diverged has no value: a setting is worse if all its runs diverged and none of the "
    "other's; if only some did, nothing is decided. Nothing corrects for the number of claims."
)
"""Explains verdicts to the readers of reports."""

Expected = Literal["higher", "lower", "same"]


class Claim(NamedTuple):
    """A claim of a paper, with measured numbers and a verdict.

    Attributes:
      statement: the claim, as a sentence.
      source: where it is made: "He et al. 2015, section 4.2".
      published: the numbers that the source gives for it.
      measured: our numbers with their spread and the number of seeds.
      verdict: one of `VERDICTS`.
    """

    statement: str
    source: str
    published: str
    measured: str
    verdict: str


def compare(
    runs: pd.DataFrame,
    statement: str,
    source: str,
    published: str,
    *,
    value: str,
    treatment: Mapping[str, Any],
    control: Mapping[str, Any],
    expected: Expected,
    margin: float = 0.0,
    equal: Collection[str] | None = None,
    names: tuple[str, str] | None = None,
) -> Claim:
    """Tests a claim that compares two settings, by paired differences at equal seed.

    Args:
      runs: a table of `load_runs`; a value from elsewhere, such as a measurement, is one more
        column.
      statement: the claim, as a sentence.
      source: where it is made.
      published: the numbers that the source gives for it.
      value: the column to compare: "train_error", "test_error", ...
      treatment: the setting that the claim is about, as column values: `{"model.depth": 56}`.
      control: the setting that it is compared with.
      expected: whether, according to the claim, the value of `treatment` is "higher" or "lower"
        than that of `control`, or the "same".
      margin: the smallest difference that counts, in the unit of the column (0.01 is one per cent
        of a fraction). The expectation "same" needs one above 0.
      equal: the columns in which paired runs agree; see `paired_differences`.
      names: the names of the settings in `measured`.

    Returns:
      The claim; "not tested at this scale" if no run of one of the settings has ended.
    """
    ended = runs[runs["finished"] | runs["diverged"]]
    if treatment == control:
        measured = f"only {describe_setting(treatment)}, without another to compare it with"
        return Claim(statement, source, published, measured, NOT_TESTED)
    for setting in (treatment, control):
        if select(ended, setting).empty:
            measured = f"no run of {describe_setting(setting)}"
            return Claim(statement, source, published, measured, NOT_TESTED)
    pairs = paired_differences(runs, value, treatment, control, equal)
    first, second = names or (describe_setting(treatment), describe_setting(control))
    unit = _unit(runs, value)
    if pairs[["treatment_diverged", "control_diverged"]].to_numpy().any():
        verdict = _judge_divergence(pairs, value, unit, expected)
        measured = _describe_divergence(pairs, first, second)
        return Claim(statement, source, published, measured, verdict)
    differences = by_seed(pairs)
    means = [describe(estimate(by_seed(pairs, side)), unit) for side in ("treatment", "control")]
    measured = (
        f"{first}: {means[0]}; {second}: {means[1]}; "
        f"difference {describe_difference(estimate(differences), unit)}"
    )
    return Claim(statement, source, published, measured, judge(differences, expected, margin))


def trend(
    runs: pd.DataFrame,
    statement: str,
    source: str,
    published: str,
    *,
    value: str,
    over: str = "model.depth",
    where: Mapping[str, Any],
    expected: Expected,
    margin: float = 0.0,
) -> Claim:
    """Tests a claim that a value rises ("higher") or falls ("lower") with a column such as depth.

    The change for each doubling of `over` is computed for each seed; see `statistics.slopes`.
    The other arguments are those of `compare`.
    """
    chosen = select(runs, where)
    ended = chosen[chosen["finished"] | chosen["diverged"]]
    name = over.rpartition(".")[2]
    if ended[over].nunique() < 2:
        measured = f"no runs of {describe_setting(where)} that differ in {name}"
        return Claim(statement, source, published, measured, NOT_TESTED)
    unit, parts = _unit(runs, value), []
    for key, group in ended.groupby(over):
        lost = int(group["diverged"].sum())
        text = describe(estimate(group.loc[~group["diverged"], value]), unit)
        place = describe_setting({over: key})
        parts.append(f"{place}: {text}" + (f" ({lost} diverged)" if lost else ""))
    changes = slopes(runs, value, over, where)
    text = describe_difference(estimate(changes), unit)
    measured = f"{'; '.join(parts)}; change per doubling of {name} {text}"
    verdict = UNDECIDED if ended["diverged"].any() else judge(changes, expected, margin)
    return Claim(statement, source, published, measured, verdict)


def within(
    runs: pd.DataFrame,
    statement: str,
    source: str,
    published: str,
    *,
    value: str,
    where: Mapping[str, Any],
    lowest: float = -math.inf,
    highest: float = math.inf,
    unit: Metric | None = None,
    label: str = "",
) -> Claim:
    """Tests a claim that a value of one setting lies above `lowest` and below `highest`.

    Args:
      value: the column; of several runs of a seed, the mean counts.
      where: the setting, as column values.
      lowest: the lower bound; it or `highest` is finite.
      highest: the upper bound.
      unit: the unit in which the value is printed; by default that of the column.
      label: the name of the value in `measured`.

    The other arguments and the result are those of `compare`. Runs count if they have the value,
    whether they finished or not.
    """
    chosen = select(runs, where)
    values = chosen.groupby("seed")[value].agg(lambda each: each.mean(skipna=False))
    if values.notna().sum() == 0:
        measured = f"no value of {describe_setting(where)}"
        return Claim(statement, source, published, measured, NOT_TESTED)
    verdicts = [judge(values - lowest, "higher")] if math.isfinite(lowest) else []
    verdicts += [judge(values - highest, "lower")] if math.isfinite(highest) else []
    worst = max(verdicts, key=(AGREES, UNDECIDED, DISAGREES).index)
    text = describe_interval(estimate(values), unit or _unit(runs, value))
    return Claim(statement, source, published, f"{label} {text}".strip(), worst)


def worse_and_better(runs: pd.DataFrame) -> tuple[Expected, Expected]:
    """Returns ("higher", "lower") if a lower primary metric is better, else the reverse."""
    [metric] = primary_metrics(runs)
    return ("higher", "lower") if metric.lower_is_better else ("lower", "higher")


def judge(differences: Any, expected: Expected, margin: float = 0.0) -> str:
    """Returns the verdict on a claim about differences, one for each seed.

    A claim of "higher" agrees if both intervals of the mean lie above 0 and the mean is at least
    `margin`; it disagrees if both lie below `margin`. A claim of "same" agrees if both lie within
    `margin` of 0, and disagrees if both lie beyond it.

    Raises:
      ValueError: `expected` is unknown, or "same" without a margin.
    """
    if expected not in ("higher", "lower", "same") or margin < 0:
        raise ValueError(f"expected {expected!r}, margin {margin}: no such expectation")
    if expected == "same" and not margin:
        raise ValueError("expected='same' needs a margin above 0: no two networks are equal")
    values = np.asarray(differences, np.float64) * (-1 if expected == "lower" else 1)
    if len(values) < FEWEST_SEEDS or not np.isfinite(values).all():
        return UNDECIDED
    found = estimate(values)
    low, high = found.outer
    if expected == "same":
        agrees = -margin < low and high < margin
        disagrees = low > margin or high < -margin
    else:
        agrees = low > 0 and found.mean >= margin
        disagrees = high < margin if margin else high < 0
    return AGREES if agrees else DISAGREES if disagrees else UNDECIDED


def _judge_divergence(pairs: pd.DataFrame, value: str, unit: Metric, expected: Expected) -> str:
    """Returns the verdict on pairs with diverged runs; divergence is worse than any value."""
    treatment, control = pairs["treatment_diverged"], pairs["control_diverged"]
    if pairs["seed"].nunique() < FEWEST_SEEDS or not value.startswith(("train_", "test_")):
        return UNDECIDED
    if treatment.all() and not control.any():
        found = "higher" if unit.lower_is_better else "lower"
    elif control.all() and not treatment.any():
        found = "lower" if unit.lower_is_better else "higher"
    else:
        return UNDECIDED
    return AGREES if found == expected else DISAGREES


def _describe_divergence(pairs: pd.DataFrame, first: str, second: str) -> str:
    sides = ((first, pairs["treatment_diverged"]), (second, pairs["control_diverged"]))
    counts = (f"{name}: {lost.sum()} of {len(lost)} runs diverged" for name, lost in sides)
    return "; ".join(counts)


def tally(claims: Iterable[Claim]) -> str:
    """Returns "Of 5 claims, 3 agree, 1 disagrees and 1 is undecided"."""
    found = [claim.verdict for claim in claims]
    words = {
        AGREES: ("agrees", "agree"),
        DISAGREES: ("disagrees", "disagree"),
        UNDECIDED: ("is undecided", "are undecided"),
        NOT_TESTED: ("was not tested", "were not tested"),
    }
    counts = {verdict: found.count(verdict) for verdict in VERDICTS}
    parts = [f"{n} {words[verdict][n > 1]}" for verdict, n in counts.items() if n]
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""
    return f"Of {len(found)} claim{'s' * (len(found) != 1)}, {listed}" if found else "No claims"


def describe(found: Estimate, unit: Metric) -> str:
    """Returns "12.34 ± 0.56 %": a mean and its sample standard deviation."""
    return f"{unit.format(found.mean, found.deviation)}{_suffix(unit)}"


def describe_difference(found: Estimate, unit: Metric) -> str:
    """Returns "+1.20 ± 0.30 points, 95 % interval 0.45 to 1.95 (3 seeds)".

    The interval is the wider one at each end of Student's t and the bootstrap.
    """
    form = ".2f" if unit.unit == "fraction" else ".3g"
    suffix = " points" if unit.unit == "fraction" else _suffix(unit)
    if not found.seeds:
        return "unknown (no seed has both)"
    spread = "" if math.isnan(found.deviation) else f" ± {unit.scale * found.deviation:{form}}"
    return f"{unit.scale * found.mean:+{form}}{spread}{suffix}{_describe_ends(found, unit)}"


def describe_interval(found: Estimate, unit: Metric) -> str:
    """Returns "12.34 ± 0.56 %, 95 % interval 11.2 to 13.5 (3 seeds)"."""
    return f"{describe(found, unit)}{_describe_ends(found, unit)}"


def _describe_ends(found: Estimate, unit: Metric) -> str:
    form = ".2f" if unit.unit == "fraction" else ".3g"
    low, high = (f"{unit.scale * end:{form}}" for end in found.outer)
    interval = f", 95 % interval {low} to {high}" if found.seeds > 1 else ""
    return f"{interval} ({found.seeds} seed{'s' * (found.seeds > 1)})"


def _suffix(unit: Metric) -> str:
    return " %" if unit.unit == "fraction" else f" {unit.unit}" if unit.unit else ""


def _unit(runs: pd.DataFrame, value: str) -> Metric:
    """Returns the metric whose unit and direction a column has."""
    for metric in primary_metrics(runs):
        if value.endswith(f"_{metric.name}"):
            return metric
    return Metric(value)
