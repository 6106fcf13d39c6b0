r"""Tests of the LaTeX table of results; where pdflatex is installed, it compiles each of them."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from resjax.analysis.latex import escape, results_table
from resjax.analysis.runs import load_runs, summarize

Maker = Callable[..., Path]

DOCUMENT = r"\documentclass{article}\usepackage{booktabs,longtable}\begin{document}%s\end{document}"


def compile_latex(content: str, folder: Path) -> None:
    """Compiles a document if pdflatex is installed; every error of LaTeX fails the test."""
    if program := shutil.which("pdflatex"):
        (folder / "main.tex").write_text(DOCUMENT % content)
        options = ["-interaction=nonstopmode", "-halt-on-error", "main.tex"]
        done = subprocess.run([program, *options], cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode(errors="replace")


class Table:
    """A parsed table: its caption, headings and rows, each a list of cells."""

    def __init__(self, latex: str) -> None:
        latex.encode("ascii")
        assert latex.count("{") - latex.count(r"\{") == latex.count("}") - latex.count(r"\}")
        [self.caption] = re.findall(r"\\caption\{(.*)\}\\label", latex)
        [self.label] = re.findall(r"\\label\{(.*?)\}", latex)
        top, _, rest = latex.partition(r"\toprule")
        head, _, rest = rest.partition(r"\midrule")
        self.spec = re.findall(r"\\begin\{(?:tabular|longtable)\}\{(.*)\}", top)[0]
        self.heads = self._cells(head)
        self.rows = self._cells(rest.partition(r"\bottomrule")[0])
        columns = len(re.findall("[lrc]", self.spec))
        assert {len(row) for row in self.rows} == {columns}

    @staticmethod
    def _cells(text: str) -> list[list[str]]:
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        cells = [re.split(r"(?<!\\)&", row.removesuffix(r"\\")) for row in rows]
        return [[cell.strip() for cell in row] for row in cells]

    def number(self, row: int, column: int) -> tuple[float, float]:
        """Returns the mean in a column and the deviation in the next one."""
        mean, deviation = self.rows[row][column : column + 2]
        spread = re.sub(r".*\$|\\phantom\{0*\}", "", deviation)
        return float(mean), float(spread)


def test_two_fields_span_a_table_with_depths_down(make_sweep: Maker, tmp_path: Path) -> None:
    runs = load_runs(make_sweep(points=4))
    latex = results_table(runs, "my_sweep & more")
    compile_latex(latex, tmp_path)
    table = Table(latex)
    assert table.spec == "r r@{}l r@{}l r@{}l r@{}l"
    assert table.heads[0][1:] == [
        r"\multicolumn{4}{c}{training error (\%)}",
        r"\multicolumn{4}{c}{test error (\%)}",
    ]
    kinds = [r"\multicolumn{2}{c}{none}", r"\multicolumn{2}{c}{pad}"]
    assert table.heads[1] == [r"\multicolumn{1}{r}{depth}", *kinds, *kinds]
    assert r"\cmidrule(lr){2-5} \cmidrule(lr){6-9}" in latex
    assert [row[0] for row in table.rows] == ["8", "20", "56"]
    found = summarize(runs).set_index(["model.depth", "model.shortcut"]).loc[(56, "pad")]
    expected = (100 * found["test_error_mean"], 100 * found["test_error_std"])
    assert table.number(2, 7) == pytest.approx(expected, abs=0.005)
    assert table.caption.startswith(
        r"my\_sweep \& more: error on digits after the last step (400), mean $\pm$ sample standard "
        "deviation over 3 seeds."
    )
    assert "Columns are values of model.shortcut." in table.caption
    assert table.label == "tab:my-sweep-more"
    assert "bold" not in latex


FAILURES: dict[str, dict[str, Any]] = {
    "a diverged run": {"depth8_pad_seed0": {"diverge": 0.5}},
    "an unfinished run": {"depth8_pad_seed0": {"stop": 0.5}},
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_settings_of_different_numbers_of_seeds_have_a_row_each(
    make_sweep: Maker, tmp_path: Path, failure: Any
) -> None:
    runs = load_runs(make_sweep(points=4, depths=(8, 20), seeds=(0, 1), **failure))
    latex = results_table(runs, "sweep")
    compile_latex(latex, tmp_path)
    table = Table(latex)
    heads = [re.sub(r".*\{(\w+)\}", r"\1", cell) for cell in table.heads[1]]
    assert heads[:4] == ["depth", "shortcut", "params", "seeds"]
    assert heads[4] in ("diverged", "unfinished")
    assert [*table.rows[1][:2], *table.rows[1][3:5]] == ["8", "pad", "1", "1"]
    assert table.rows[1][6] == ""  # one seed has no deviation
    assert "over 1 to 2 seeds" in table.caption
    assert "Unfinished and diverged runs are not averaged." in table.caption
    assert r"\addlinespace" in latex  # before depth 20


def test_a_setting_with_fewer_seeds_has_a_row_with_their_number(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep(points=4, depths=(8, 20), seeds=(0, 1))).drop(index=0)
    table = Table(results_table(runs, "sweep"))
    assert [row[3] for row in table.rows] == ["1", "2", "2", "2"]


def test_numbers_of_a_column_have_the_same_decimals_and_width(make_sweep: Maker) -> None:
    runs = load_runs(make_sweep(points=4, depths=(8,), shortcuts=("none", "pad"), seeds=(0, 1)))
    runs["test_error"] = [0.05, 0.06, 0.2, 0.7]
    table = Table(results_table(runs, "sweep"))
    assert [row[-2:] for row in table.rows] == [
        ["5.50", r"$\,\pm\,$\phantom{0}0.71"],
        ["45.00", r"$\,\pm\,$35.36"],
    ]


@pytest.mark.parametrize(
    ("values", "texts", "head"),
    [
        ((0.012345, 0.2), ("0.0123", "0.2000"), "angle (rad)"),
        ((12.0, 1234.5), ("12", "1234"), "angle (rad)"),
        ((2e-7, 3e-9), ("2.000", "0.030"), r"test ($\times 10^{-7}$)"),
        ((1e9, np.nan), ("1.000", "--"), r"test ($\times 10^{9}$)"),
        ((0.0, np.nan), ("0.000", "--"), "angle (rad)"),
        ((-0.5, 0.25), ("$-$0.5000", "0.2500"), "angle (rad)"),
    ],
)
def test_other_metrics_have_four_digits_and_their_unit(
    make_tasks: Maker, tmp_path: Path, values: Any, texts: Any, head: str
) -> None:
    runs = load_runs(make_tasks() / "angle")
    runs = pd.concat([runs, runs], ignore_index=True)
    runs["model.depth"], runs["test_angle"] = (8, 20), values
    runs["train_angle"] = runs["test_angle"]
    latex = results_table(runs, "sweep")
    compile_latex(latex, tmp_path)
    assert tuple(row[-1] for row in Table(latex).rows) == texts
    assert head in latex


def test_metrics_of_several_tasks_have_columns_of_their_own(
    make_tasks: Maker, tmp_path: Path
) -> None:
    latex = results_table(load_runs(make_tasks()), "tasks")
    compile_latex(latex, tmp_path)
    table = Table(latex)
    assert r"\multicolumn{2}{c}{accuracy (\%)}" in table.heads[0]
    assert r"\multicolumn{2}{c}{angle (rad)}" in table.heads[0]
    assert sorted(row[2:].index("--") for row in table.rows) == [0, 2]


def test_the_best_of_each_column_is_bold_on_request(make_sweep: Maker, tmp_path: Path) -> None:
    runs = load_runs(make_sweep(points=4))
    assert r"\textbf" not in results_table(runs, "sweep")
    latex = results_table(runs, "sweep", bold_best=True)
    compile_latex(latex, tmp_path)
    table = Table(latex)
    best = [[row[column] for row in table.rows] for column in range(1, 9, 2)]
    assert [sum(r"\textbf" in cell for cell in column) for column in best] == [1, 1, 1, 1]
    numbers = [[float(re.sub(r"[^\d.]", "", cell)) for cell in column] for column in best]
    for column, cells in zip(numbers, best, strict=True):
        assert r"\textbf" in cells[column.index(min(column))]  # a lower error is better
    assert "best mean of each column is bold" in table.caption


def test_a_higher_accuracy_is_bold(make_tasks: Maker) -> None:
    runs = load_runs(make_tasks() / "accuracy")
    runs = pd.concat([runs, runs], ignore_index=True)
    runs["model.depth"], runs["test_accuracy"] = (8, 20), (0.5, 0.75)
    rows = Table(results_table(runs, "sweep", bold_best=True)).rows
    assert [row[-1] for row in rows] == ["50.00", r"\textbf{75.00}"]


def test_special_characters_of_names_and_values_are_printed(
    make_sweep: Maker, tmp_path: Path
) -> None:
    odd = ("[0.5]_#1", r"\input{x}%$&~^{}<>|\"`*--", "L^-0.5 × naïve größe α ☃", "\x1b[31m\n")
    runs = load_runs(make_sweep(points=2, depths=(8,), shortcuts=odd, seeds=(0, 1)))
    latex = results_table(runs, r"a_b\c{d}é--e")
    compile_latex(latex, tmp_path)
    names = [row[0] for row in Table(latex).rows]
    assert names[0] == r"{[}0.5{]}\_\#1"
    assert names[2] == r"L\textasciicircum{}-0.5 $\times$ na\"{\i}ve gr\"{o}\ss{}e $\alpha$ U+2603"
    assert names[3] == r"\textbackslash{}x1b{[}31m\textbackslash{}n"


def test_every_character_of_unicode_becomes_ascii_that_compiles(tmp_path: Path) -> None:
    texts = [escape(chr(code)) for code in (*range(0x3000), 0xD800, 0x1F600, sys.maxunicode)]
    assert all(text.isascii() for text in texts)
    compile_latex("\n\n".join(dict.fromkeys(t for t in texts if not t.startswith("U+"))), tmp_path)


def test_wide_tables_are_small_and_leave_out_what_other_fields_determine(
    make_sweep: Maker, tmp_path: Path
) -> None:
    runs = load_runs(make_sweep(points=2, depths=(8, 20), seeds=(0, 1)))
    assert r"\small\set" not in results_table(runs, "sweep")
    kinds = runs["model.shortcut"].map({"none": "a" * 40, "pad": "b" * 40})
    implied = {f"model.field{number}": kinds for number in range(3)}
    latex = results_table(runs.assign(**implied), "sweep")
    compile_latex(latex, tmp_path)
    assert r"\scriptsize" in latex
    assert "The other fields determine model.field1 and model.field2" in Table(latex).caption


def test_a_long_table_is_broken_between_pages(make_sweep: Maker, tmp_path: Path) -> None:
    runs = load_runs(make_sweep(points=2, depths=(8,), shortcuts=("pad",), seeds=(0,)))
    runs = pd.concat([runs] * 100, ignore_index=True)
    runs["model.depth"] = [f"x{number}" for number in range(100)]
    latex = results_table(runs, "sweep")
    compile_latex(latex, tmp_path)
    assert "needs the packages booktabs and longtable" in latex
    assert r"\begin{longtable}" in latex


def test_a_table_before_the_first_result_has_dashes(make_run: Maker, tmp_path: Path) -> None:
    latex = results_table(load_runs(make_run("run", {"stop": 0.0})), "run")
    compile_latex(latex, tmp_path)
    assert Table(latex).rows == [["--", "1", "--", "--"]]
    assert "no run has finished" in Table(latex).caption
