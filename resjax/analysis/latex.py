r"""Writes results as a LaTeX table, to be read by \input in a paper.

The table needs the package booktabs and no other, and the file is ASCII, so that it compiles in any
document. Numbers of a column have the same decimals and are aligned. If all combinations of two
fields were trained, one field has the rows and the other the columns; otherwise each setting has a
row.
"""

import itertools
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from resjax.analysis.runs import (
    field_heads,
    primary_metrics,
    summarize,
    training_column,
    varying,
)
from resjax.run_files import Metric
from resjax.text import printable

WIDTH = 345
"""Width of the text of a page, in points: that of LaTeX's class article at 10 points."""

SIZES = (("", 5.0, 6), ("small", 4.6, 4), ("footnotesize", 4.25, 3), ("scriptsize", 3.8, 2))
"""Sizes of print with the mean width of a character and half the space between columns, in points;
the first one at which a table fits is used."""

ROWS = 45
"""Rows that fit on a page; a longer table is broken between pages."""

LONGEST = 60
"""Characters of a value or a name that are shown."""

SPECIAL = {
    **{each: f"\\{each}" for each in "{}$&#_%"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "`": r"\`{}"},
    # After the end of a row these begin an argument.
    **{"[": "{[}", "]": "{]}", "*": "{*}"},
    **{"–": "--", "—": "---", "“": "``", "”": "''", "‘": "`", "’": "'", "…": r"\dots{}"},
    **{"±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "−": "$-$", "≤": r"$\le$", "≥": r"$\ge$"},
    **{
        "√": r"$\surd$",
        "∞": r"$\infty$",
        "°": r"$^\circ$",
        "²": "$^2$",
        "³": "$^3$",
        "µ": r"$\mu$",
    },
    **{"ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "œ": r"\oe{}", "Œ": r"\OE{}"},
    **{"ø": r"\o{}", "Ø": r"\O{}", "ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}", "\xa0": "~"},
}
"""LaTeX for characters that have a meaning of their own or are not ASCII."""

ACCENTS = {
    **{"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u"},
    **{"\u0307": ".", "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c"},
}
"""LaTeX's accents for the combining characters of Unicode."""

GREEK = re.compile(
    r"GREEK (?:(CAPITAL) LETTER (GAMMA|DELTA|THETA|XI|PI|SIGMA|UPSILON|PHI|PSI|OMEGA)|SMALL LETTER "
    r"(ALPHA|BETA|GAMMA|DELTA|EPSILON|ZETA|ETA|THETA|IOTA|KAPPA|MU|NU|XI|PI|RHO|SIGMA|TAU|UPSILON"
    r"|PHI|CHI|PSI|OMEGA))"
)
"""Matches the Unicode names of letters for which LaTeX has a macro."""


Value = tuple[Metric, str]  # a metric and its column, such as "test_error"


class Column(NamedTuple):
    """A column of a table: its heading, its cells, and the letters of their alignment.

    A mean with its deviation takes two columns of LaTeX, whose cells an ampersand joins. Adjacent
    columns of the same `group` have it above their headings.
    """

    head: str
    cells: list[str]
    align: str = "r"
    group: str = ""

    @property
    def span(self) -> int:
        return 2 if "@" in self.align else 1

    @property
    def heading(self) -> str:
        """The heading as a cell: that of numbers is centered, or to the right."""
        kind = "c" if self.span == 2 else self.align
        return (
            self.head if kind == "l" else rf"\multicolumn{{{self.span}}}{{{kind}}}{{{self.head}}}"
        )

    @property
    def characters(self) -> int:
        """About how many characters wide it is."""
        return max(map(_characters, (self.head, *self.cells)))


def escape(text: str) -> str:
    """Returns LaTeX that prints the text; "U+2603" replaces a character that it cannot print."""
    characters = map(_escape, printable(unicodedata.normalize("NFC", text)))
    return "".join(characters).replace("--", "-{}-") if text.isascii() else "".join(characters)


def _escape(character: str) -> str:
    if character in SPECIAL or character.isascii():
        return SPECIAL.get(character, character)
    base, accent = unicodedata.normalize("NFD", character)[:1], ""
    if len(marks := unicodedata.normalize("NFD", character)[1:]) == 1:
        accent = ACCENTS.get(marks, "")
    if accent and base.isascii():
        dotless = base in "ij" and accent != "c"
        return rf"\{accent}{{{chr(92) * dotless}{base}}}"
    if found := GREEK.fullmatch(unicodedata.name(character, "")):
        capital, upper, lower = found.groups()
        return rf"$\{upper.title() if capital else lower.lower()}$"
    return f"U+{ord(character):04X}"


def results_table(runs: pd.DataFrame, name: str, *, bold_best: bool = False) -> str:
    r"""Returns the final primary metrics of runs as a LaTeX table with caption and label.

    Args:
        runs: A table of `load_runs`.
        name: The name of the sweep or sweeps, for the caption and the label `tab:NAME`.
        bold_best: Whether the best mean of each column is bold.
    """
    by = varying(runs)
    results = summarize(runs, by)
    values = [
        (metric, column)
        for metric in primary_metrics(runs)
        for column in (training_column(runs, metric.name), f"test_{metric.name}")
    ]
    caption = _caption(runs, results, values, name)
    columns, left_out = _wide(results, by, values, bold_best), list[str]()
    if columns is not None:
        caption += f" Columns are values of {escape(_across_and_down(results, by)[0])}."
    else:
        columns, left_out = _long_that_fits(results, by, values, bold_best)
    if left_out:
        caption += f" The other fields determine {_listed(left_out)}."
    caption += " The best mean of each column is bold." * bold_best
    return _table(columns, caption, _label(name))


def _long_that_fits(
    results: pd.DataFrame, by: Sequence[str], values: Sequence[Value], bold_best: bool
) -> tuple[list[Column], list[str]]:
    """Returns the columns of `_long` and the fields left out because it was too wide with them.

    Only fields that other fields determine are left out.
    """
    shown = list(by)
    while True:
        columns = _long(results, shown, values, bold_best)
        field = _implied(results, shown)
        if field is None or _width(columns, SIZES[-1]) <= WIDTH:
            return columns, [name for name in by if name not in shown]
        shown.remove(field)


def _implied(results: pd.DataFrame, by: Sequence[str]) -> str | None:
    """Returns the last field that the others determine; None if there is no such field."""
    candidates = ([each for each in by if each != name] for name in by)
    implied = [
        name
        for name, others in zip(by, candidates, strict=True)
        if others and not results.duplicated(others).any()
    ]
    return implied[-1] if implied else None


def _listed(names: Sequence[str]) -> str:
    *first, last = map(escape, names)
    return f"{', '.join(first)} and {last}" if first else last


def _long(
    results: pd.DataFrame, by: Sequence[str], values: Sequence[Value], bold_best: bool
) -> list[Column]:
    """Returns the columns of a table with a row per setting."""
    heads = field_heads(by)
    columns = [_field(heads[name], results[name]) for name in by]
    columns.append(Column("params", [_thousands(n) for n in results["parameters"]]))
    shown = [name for name in ("unfinished", "diverged") if results[name].any()]
    if results["seeds"].nunique() > 1:
        shown.insert(0, "seeds")
    columns += [Column(name, [str(n) for n in results[name]]) for name in shown]
    for value in values:
        columns.append(_metric(results, value, bold_best, group=escape(value[0].label)))
    return columns


def _wide(
    results: pd.DataFrame, by: Sequence[str], values: Sequence[Value], bold_best: bool
) -> list[Column] | None:
    """Returns the columns of a table with one field down and one across; None if impossible.

    It requires all combinations of two fields, with equal numbers of seeds, and room on the page.
    """
    if len(by) != 2 or results["seeds"].nunique() > 1 or (results["seeds"] == 0).any():
        return None
    across, down = _across_and_down(results, by)
    kinds, places = (list(dict.fromkeys(results[name])) for name in (across, down))
    if len(results) != len(kinds) * len(places) or results[[across, down]].isna().any(axis=None):
        return None
    if results[["unfinished", "diverged"]].any(axis=None):
        return None
    parts = {kind: results[results[across] == kind].set_index(down).loc[places] for kind in kinds}
    columns = [_field(field_heads(by)[down], pd.Series(places))]
    for value in values:
        group = escape(f"{_split(value)} {value[0].label}")
        for kind, part in parts.items():
            columns.append(_metric(part, value, bold_best, escape(_shown(kind)), group))
    return columns if _width(columns, SIZES[-2]) <= WIDTH else None


def _across_and_down(results: pd.DataFrame, by: Sequence[str]) -> tuple[str, str]:
    """Returns the field for the columns and that for the rows.

    The rows are for the depth, else a numeric field, else the field with more values.
    """

    def rank(name: str) -> tuple[bool, bool, int]:
        return name == "model.depth", _is_numeric(results[name]), results[name].nunique()

    across, down = sorted(by, key=rank)
    return across, down


def _table(columns: Sequence[Column], caption: str, label: str) -> str:
    heads = _heads(columns)
    rows = [_row(cells) for cells in zip(*(column.cells for column in columns), strict=True)]
    for index in sorted(_separators(columns[0].cells), reverse=True):
        rows.insert(index, r"    \addlinespace")
    aligned = " ".join(column.align for column in columns)
    captioned = rf"\caption{{{caption}}}\label{{{label}}}"
    size, _, space = next((s for s in SIZES if _width(columns, s) <= WIDTH), SIZES[-1])
    look = [rf"  \{size}\setlength{{\tabcolsep}}{{{space}pt}}"] if size else []
    body = [r"    \toprule", *heads, r"    \midrule"]
    if len(rows) <= ROWS:
        packages = "the package booktabs"
        begin = [r"\begin{table}", r"  \centering", *look, f"  {captioned}", r"  \smallskip"]
        begin += [rf"  \begin{{tabular}}{{{aligned}}}", *body]
        end = [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    else:
        packages = "the packages booktabs and longtable"
        begin = [r"\begingroup", *look, rf"  \begin{{longtable}}{{{aligned}}}"]
        begin += [rf"    {captioned}\\", *body, r"    \endfirsthead", *body, r"    \endhead"]
        begin += [r"    \bottomrule", r"    \endfoot"]
        end = [r"  \end{longtable}", r"\endgroup"]
    comment = f"% Written by `resjax report`; the document needs {packages}."
    return "\n".join([comment, *begin, *rows, *end]) + "\n"


def _heads(columns: Sequence[Column]) -> list[str]:
    """Returns the rows with the headings; groups are a row and rules above the others."""
    headings = _row([column.heading for column in columns])
    if not any(column.group for column in columns):
        return [headings]
    above, rules, place = list[str](), list[str](), 1
    for group, members in itertools.groupby(columns, lambda column: column.group):
        span = sum(column.span for column in members)
        above += [rf"\multicolumn{{{span}}}{{c}}{{{group}}}"] if group else [""] * span
        rules += [rf"\cmidrule(lr){{{place}-{place + span - 1}}}"] if group else []
        place += span
    return [_row(above), f"    {' '.join(rules)}", headings]


def _separators(cells: Sequence[str]) -> list[int]:
    """Returns the rows that begin a new value of the first field and have a space above."""
    changes = [i for i in range(1, len(cells)) if cells[i] != cells[i - 1]]
    return changes if 2 * (len(changes) + 1) <= len(cells) else []


def _width(columns: Sequence[Column], size: tuple[str, float, int]) -> float:
    """Returns about how wide a table is, in points."""
    _, character, space = size
    return sum(character * column.characters + 2 * space for column in columns)


def _row(cells: Sequence[str]) -> str:
    return f"    {' & '.join(cells)} \\\\"


def _caption(
    runs: pd.DataFrame,
    results: pd.DataFrame,
    values: Sequence[Value],
    name: str,
) -> str:
    """Returns a caption with the metrics, the data, the last step and the number of seeds."""
    ended = runs[runs["finished"] & ~runs["diverged"]]
    data = " and ".join(escape(_shown(each)) for each in dict.fromkeys(runs["data.name"]))
    kinds = {column.removesuffix(f"_{metric.name}") for metric, column in values}
    names = " and ".join(dict.fromkeys(escape(metric.title) for metric, _ in values))
    if ended.empty:
        return f"{escape(name)}: {names} on {data}; no run has finished."
    seeds = _range(results.loc[results["seeds"] > 0, "seeds"])
    spread = f"mean $\\pm$ sample standard deviation over {seeds} seeds"
    sentences = [
        f"{escape(name)}: {names} on {data} after the last step ({_range(ended['steps'])}), "
        f"{'of one seed' if seeds == '1' else spread}."
    ]
    if "train_set" in kinds:
        sentences.append("Training values are those of the whole training split.")
    else:
        every = _range(runs["train.log_every"]) if "train.log_every" in runs else ""
        sentences.append(
            f"Training values are means over the last {f'{every} steps' if every else 'steps'}, in "
            "training mode."
        )
    if (results[["unfinished", "diverged"]] > 0).any(axis=None):
        sentences.append("Unfinished and diverged runs are not averaged.")
    return " ".join(sentences)


def _label(name: str) -> str:
    return f"tab:{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-') or 'results'}"


def _field(head: str, values: pd.Series) -> Column:
    numeric = _is_numeric(values)
    cells = [escape(_shown(x)) for x in values]
    cells = [_minus(cell) for cell in cells] if numeric else cells
    return Column(escape(head.replace("_", " ")), cells, "r" if numeric else "l")


def _minus(number: str) -> str:
    """Returns a number with a minus sign in place of a leading hyphen."""
    return f"$-${number[1:]}" if number.startswith("-") and number != "--" else number


def _is_numeric(values: pd.Series) -> bool:
    numbers = [isinstance(x, (int, float, np.number)) and not isinstance(x, bool) for x in values]
    return all(numbers)


def _shown(value: Any) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    text = f"{value:g}" if isinstance(value, float | np.floating) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _thousands(number: float) -> str:
    return "--" if math.isnan(number) else f"{number:,.0f}".replace(",", "{,}")


def _range(numbers: pd.Series) -> str:
    """Returns "300", or "300 to 500" for several numbers, or "" for none."""
    found = sorted(set(numbers.dropna()))
    return " to ".join(f"{n:.0f}" for n in (found if len(found) < 3 else (found[0], found[-1])))


def _split(value: Value) -> str:
    return "test" if value[1].startswith("test_") else "training"


def _metric(
    results: pd.DataFrame, value: Value, bold_best: bool, head: str = "", group: str = ""
) -> Column:
    """Returns means with deviations; numbers of a column have the same decimals."""
    metric, column = value
    head = head or _split(value)
    means = metric.scale * results[f"{column}_mean"].to_numpy(np.float64)
    deviations = metric.scale * results[f"{column}_std"].to_numpy(np.float64)
    exponent, decimals = _form(means) if metric.unit != "fraction" else (0, 2)
    if exponent:
        head = rf"{head} ($\times 10^{{{exponent}}}$)"
    means, deviations = means / 10.0**exponent, deviations / 10.0**exponent
    texts = ["--" if math.isnan(mean) else _minus(f"{mean:.{decimals}f}") for mean in means]
    if bold_best and np.isfinite(means).any():
        best = np.nanmin(means) if metric.lower_is_better else np.nanmax(means)
        is_best = [text == _minus(f"{best:.{decimals}f}") for text in texts]
        texts = [rf"\textbf{{{t}}}" if b else t for t, b in zip(texts, is_best, strict=True)]
    if np.isnan(deviations).all():
        return Column(head, texts, group=group)
    spreads = ["" if math.isnan(each) else f"{each:.{decimals}f}" for each in deviations]
    longest = max(map(len, spreads))
    cells = []
    for text, spread in zip(texts, spreads, strict=True):
        room = rf"\phantom{{{'0' * (longest - len(spread))}}}" if len(spread) < longest else ""
        cells.append(rf"{text} & $\,\pm\,${room}{spread}" if spread else f"{text} &")
    return Column(head, cells, "r@{}l", group)


def _form(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[int, int]:
    """Returns the power of ten and the decimals that show the largest value with four digits."""
    sizes = np.abs(values[np.isfinite(values)])
    largest = float(sizes.max()) if sizes.size else 0.0
    order = math.floor(math.log10(largest)) if largest else 0
    exponent = order if not -3 <= order <= 5 else 0
    return exponent, max(0, 3 - order + exponent)


def _characters(latex: str) -> int:
    """Returns about how many characters LaTeX prints for its source."""
    plain = re.sub(r"\\phantom\{(\w*)\}", r"\1", latex.replace(r"\,\pm\,", "+++"))
    return len(re.sub(r"\\[a-z]+|[{}$,\\]| & ", "", plain))
