"""Tests of the report: one self-contained page with the content of the run folders."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from resjax.analysis import figures as draw
from resjax.analysis.chart_data import POINTS
from resjax.analysis.report import write_report
from resjax.analysis.runs import load_runs
from resjax.cli import main
from resjax.errors import UserError

Maker = Callable[..., Path]

EXPERIMENT = '''"""Does depth <help>?

It does & it does not, says `h(x)`.

See figure 6.
"""

from matplotlib.figure import Figure


def figures(runs, curves):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot(runs["model.depth"], runs["test_error"])
    return {"by_depth": figure}
'''


class Page(HTMLParser):
    """A parsed page: its text and tables by section, its resources, ids and data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.ids: list[str] = []
        self.text: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.data: Any = None
        self._section, self._tag, self._cell = "header", "", False
        self._kind: str | None = None
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        for name in ("src", "href", "xlink:href", "data"):
            if (value := named.get(name)) is not None:
                self.resources.append(value)
        if (value := named.get("id")) is not None:
            self.ids.append(value)
        if tag == "section":
            self._section = named["id"] or ""
        if tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        if tag in ("th", "td"):
            self.tables[self._section][-1].append("")
            self._cell = True
        self._tag, self._kind = tag, named.get("type")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._tag == "script" and self._kind == "application/json" and data.strip():
            self.data = json.loads(data)
        if self._cell:
            self.tables[self._section][-1][-1] += data
        self.text[self._section] = self.text.get(self._section, "") + data


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, sweep_writer: Maker) -> Path:
    """Returns a sweep folder with a report; one run has uncommitted changes."""
    root = sweep_writer(tmp_path_factory.mktemp("report") / "sweep", points=5)
    file = root / "runs" / "depth8-pad-seed0" / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dirty": True}))
    assert write_report(root) == root / "report.html"
    return root


@pytest.fixture(autouse=True)
def svg_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves figures in one format, except those of `root`: the others take most of the time."""
    svg = draw._METADATA["svg"]
    monkeypatch.setattr(draw, "_METADATA", {"svg": svg})


@pytest.fixture(scope="module")
def page(root: Path) -> Page:
    return Page(root / "report.html")


def test_without_an_experiment_all_settings_are_drawn(root: Path) -> None:
    assert sorted(file.name for file in (root / "figures").iterdir()) == [
        "curves.pdf",
        "curves.png",
        "curves.svg",
    ]


COMMAND = """    resjax sweep this.py > log
        --workers=2

"""


def test_an_experiment_defines_title_claim_and_figures(make_sweep: Maker) -> None:
    root = make_sweep(points=5)
    (root / "experiment.py").write_text(EXPERIMENT.replace("See", COMMAND + "See"))
    page = Page(write_report(root))
    assert "Does depth <help>?" in page.text["header"]
    assert "It does & it does not, says h(x)." in page.text["header"]
    text = (root / "report.html").read_text()
    assert "<code>h(x)</code>" in text
    assert "<code>resjax sweep this.py &gt; log\n    --workers=2</code></pre>" in text
    assert (root / "figures" / "by_depth.svg").exists()
    assert not (root / "__pycache__").exists()


def test_a_copied_experiment_without_docstring_has_its_own_name(make_sweep: Maker) -> None:
    root = make_sweep(points=5)
    (root / "experiment.py").write_text("def figures(runs):\n    return {}\n")
    plan = json.loads((root / "sweep.json").read_text())
    (root / "sweep.json").write_text(json.dumps(plan | {"experiment": "wide_networks"}))
    assert "wide_networks" in Page(write_report(root)).text["header"]


CLAIMS = """
from resjax.analysis.claims import Claim, compare


def claims(runs):
    options = {"value": "test_error", "expected": "higher"}
    options |= {"treatment": {"model.depth": 56}, "control": {"model.depth": 8}}
    return [
        compare(runs, "Depth <hurts>", "=me", "1 %", **options),
        Claim("Width helps", "me", "", "only one width", "not tested at this scale"),
    ]
"""


def test_claims_stand_beside_what_was_measured(
    make_sweep: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sweep(points=5, shortcuts=("none",))
    (root / "experiment.py").write_text(EXPERIMENT + CLAIMS)
    assert main(["report", str(root)]) == 0
    page = Page(root / "report.html")
    assert "Measured: Of 2 claims, 1 agrees and 1 was not tested." in page.text["header"]
    header, hurts, helps = page.tables["claims"]
    assert header == ["claim", "verdict", "measured here", "published", "source"]
    assert [hurts[0], *hurts[3:]] == ["Depth <hurts>", "1 %", "=me"]
    assert "3 seeds" in hurts[2]
    assert (hurts[1], helps[1]) == ("agrees", "not tested at this scale")
    with (root / "claims.csv").open() as lines:
        assert next(csv.DictReader(lines))["source"] == "'=me"
    assert "claim: agrees: Depth <hurts>: 56 layers" in capsys.readouterr().out


def test_without_claims_an_earlier_table_is_removed(make_sweep: Maker) -> None:
    root = make_sweep(points=2)
    (root / "claims.csv").write_text("old")
    assert "claims" not in Page(write_report(root)).tables
    assert not (root / "claims.csv").exists()


def test_claims_that_fail_leave_the_figures(make_sweep: Maker) -> None:
    root = make_sweep(points=2)
    (root / "experiment.py").write_text(EXPERIMENT + "\n\ndef claims(runs):\n    return runs.x\n")
    with pytest.raises(UserError, match="experiment") as refusal:
        write_report(root)
    assert "Fix" in str(refusal.value)
    assert (root / "figures" / "by_depth.svg").exists()
    assert "claims" not in Page(root / "report.html").tables


def test_an_experiment_file_elsewhere_can_be_chosen(make_sweep: Maker, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(EXPERIMENT)
    root = make_sweep(points=5)
    write_report(root, source)
    assert (root / "figures" / "by_depth.svg").exists()


def test_a_missing_experiment_file_is_named(make_sweep: Maker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.py: no such experiment file"):
        write_report(make_sweep(points=5), tmp_path / "none.py")


BROKEN = EXPERIMENT.replace('runs["test_error"]', 'runs["test_eror"]')


def test_an_error_in_figures_names_the_line_and_what_to_type_and_keeps_the_report(
    make_sweep: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = tmp_path / "degradation.py", make_sweep(points=2)
    for copy in (source, root / "experiment.py"):
        copy.write_text(BROKEN)
    plan = json.loads((root / "sweep.json").read_text())
    (root / "sweep.json").write_text(json.dumps(plan | {"file": str(source)}))
    assert main(["report", str(root)]) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"resjax: error: {root / 'experiment.py'}:13: KeyError: 'test_eror'; ")
    assert error.endswith(f"type: resjax report {root} --experiment={source}\n")
    assert "test error (%)" in out
    assert (root / "figures" / "curves.svg").exists()
    assert "Does depth" in Page(root / "report.html").text["header"]
    # The mended file is drawn when it is named, and from then on.
    source.write_text(EXPERIMENT)
    assert main(["report", str(root), f"--experiment={source}"]) == 0
    assert main(["report", str(root)]) == 0
    assert f"executes {root / 'experiment.py'}" in capsys.readouterr().out


def test_a_figure_that_cannot_be_drawn_is_an_error_of_its_experiment(
    make_sweep: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sweep(points=2, seeds=(0,))
    broken = EXPERIMENT.replace("return {", r'figure.suptitle("$\frac{$")' + "\n    return {")
    (root / "experiment.py").write_text(broken)
    assert main(["report", str(root)]) == 2
    assert f"{root / 'experiment.py'}: a figure cannot be drawn: " in capsys.readouterr().err
    assert (root / "figures" / "curves.svg").exists()


def test_an_experiment_file_with_a_syntax_error_is_named(
    make_sweep: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sweep(points=2, seeds=(0,))
    (root / "experiment.py").write_text("def figures(:\n")
    assert main(["report", str(root)]) == 2
    assert f"{root / 'experiment.py'}:1: invalid syntax" in capsys.readouterr().err


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def link_outside(run: Path) -> None:
    outside = run.parents[2] / "provenance.json"
    (run / "provenance.json").rename(outside)
    (run / "provenance.json").symlink_to(outside)


def replace_by(kind: str, name: str = "") -> Callable[[Path], None]:
    """Returns a function that puts a file or a folder where a run has its folder, or a file."""

    def replace(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.touch() if kind == "file" else path.mkdir()

    return replace


ODD: dict[str, Callable[[Path], object]] = {
    "a file and not a run folder": replace_by("file"),
    "config.json: Is a directory": replace_by("folder", "config.json"),
    "summary.json: damaged, not a summary": lambda run: edit(run / "summary.json", steps=None),
    "a value is named seed, which": lambda run: edit(run / "summary.json", seed=5),
    "diverged.json: damaged, not a step": lambda run: (run / "diverged.json").write_text("{}"),
    "provenance.json is in ": link_outside,
}
NO_CURVE: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl: Is a directory": replace_by("folder", "metrics.jsonl"),
    "a value is named folder, which": lambda run: (run / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": 1, "error": 1, "folder": 1}\n'
    ),
}


def test_each_odd_run_is_named_and_the_others_are_reported(
    make_sweep: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = list((ODD | NO_CURVE).values())
    seeds = tuple(range(len(faults) + 2))
    root = make_sweep(depths=(8,), shortcuts=("pad",), seeds=seeds, points=3)
    for seed, fault in enumerate(faults):
        fault(root / "runs" / f"depth8-pad-seed{seed}")
    plan = json.loads((root / "sweep.json").read_text())
    plan["runs"].append({"folder": "../elsewhere", "overrides": {}})
    (root / "sweep.json").write_text(json.dumps(plan))
    shutil.copytree(root / "runs" / f"depth8-pad-seed{seeds[-1]}", root.parent / "elsewhere")
    assert main(["report", str(root)]) == 0
    told = capsys.readouterr().err.splitlines()
    page = Page(root / "report.html")
    for text in (*ODD, *NO_CURVE, "elsewhere is in "):
        assert sum(text in line and "resjax: left out: " in line for line in told) == 1, text
        assert text in page.text["header"]
    whole = [f"runs/depth8-pad-seed{seed}" for seed in seeds[len(ODD) :]]
    assert [row[-1] for row in page.tables["runs"][1:]] == whole
    assert {curve["run"] for curve in page.data["curves"]} == {2, 3}


def test_an_experiment_or_plan_that_is_a_link_to_another_folder_is_not_read(
    make_sweep: Maker, tmp_path: Path
) -> None:
    root = make_sweep(depths=(8,), points=2)
    (tmp_path / "experiment.py").write_text("raise SystemExit('executed')")
    (root / "sweep.json").rename(tmp_path / "sweep.json")
    for name in ("experiment.py", "sweep.json"):
        (root / name).symlink_to(tmp_path / name)
    assert main(["report", str(root)]) == 0
    assert "sweep" not in dict(Page(root / "report.html").tables["provenance"])


def test_runs_that_are_all_damaged_are_one_line(
    make_run: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("run")
    (folder / "config.json").write_text("{")
    assert main(["report", str(folder)]) == 2
    assert "no run can be read" in capsys.readouterr().err


def test_a_damaged_plan_leaves_the_runs(
    make_sweep: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sweep(depths=(8,), points=3)
    (root / "sweep.json").write_text('{"runs": 3}')
    assert main(["report", str(root)]) == 0
    assert "sweep.json: damaged, no list of runs" in capsys.readouterr().err
    assert len(Page(root / "report.html").tables["runs"]) == 7


def test_text_of_runs_is_no_formula_in_a_figure_and_is_short(make_sweep: Maker) -> None:
    names = (r"$\frac{", r"$\frac{$", "x" * 5000, "\x1b[31m\n")
    root = make_sweep(depths=(8,), shortcuts=names[:2], seeds=(0,), points=3)
    for run, name in zip(sorted((root / "runs").iterdir()), names[2:], strict=True):
        config = json.loads((run / "config.json").read_text())
        edit(run / "config.json", data=config["data"] | {"name": name})
    page = Page(write_report(root))
    heads, *rows = page.tables["runs"]
    assert names[0] in [row[heads.index("model.shortcut")] for row in rows]
    assert (root / "figures" / "curves.svg").exists()


def test_a_report_that_cannot_be_written_is_one_line_and_may_go_elsewhere(
    make_run: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("run", {"points": 2})
    (folder / "figures").write_text("not a folder, as on a disk that refuses to make one")
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{folder}: cannot write to this folder: " in error
    assert "add --out=DIR" in error
    assert error.count("\n") == 1
    assert main(["report", str(folder), f"--out={tmp_path / 'new' / 'out'}"]) == 0
    assert (tmp_path / "new" / "out" / "report.html").exists()


def test_several_folders_have_one_report(
    make_run: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(name, {"points": 2}, depth=depth) for name, depth in (("a", 8), ("b", 20))]
    make_run("c", depth=56)
    assert main(["report", *map(str, folders), str(folders[0])]) == 0
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    page = Page(tmp_path / "report.html")
    assert [row[-1] for row in page.tables["runs"][1:]] == ["a", "b"]
    assert main(["report", *map(str, folders), f"--out={tmp_path / 'out'}"]) == 0
    assert Page(tmp_path / "out" / "report.html").tables["runs"][1][-1] == "../a"


def test_several_sweeps_of_one_experiment_are_drawn_by_it(
    sweep_writer: Maker, tmp_path: Path
) -> None:
    roots = [
        sweep_writer(tmp_path / name, depths=depths, points=2)
        for name, depths in (("a", (8,)), ("b", (20, 56)))
    ]
    for root in roots:
        (root / "experiment.py").write_text(EXPERIMENT)
    page = Page(write_report(roots))
    assert "Does depth" in page.text["header"]
    assert "18 of 18 runs finished" in page.text["header"]
    (roots[1] / "experiment.py").write_text(EXPERIMENT + "# another\n")
    assert "Does depth" not in Page(write_report(roots)).text["header"]


def test_the_page_needs_no_network(root: Path, page: Page) -> None:
    for resource in page.resources:
        assert resource.startswith(("#", "data:")) or (root / resource).exists(), resource
    text = (root / "report.html").read_text()
    # The namespaces of SVG are names that no browser fetches.
    assert not re.findall(r"""(?<!xmlns=")(?<!xlink=")(?<!createElementNS\(")https?://""", text)
    assert "@import" not in text


def test_ids_are_unique_and_references_have_targets(make_sweep: Maker) -> None:
    root = make_sweep(points=5)
    (root / "experiment.py").write_text(
        EXPERIMENT.replace('"by_depth": figure', '"a": figure, "b": figure')
    )
    page = Page(write_report(root))
    assert len(page.ids) == len(set(page.ids))
    assert {name[1:] for name in page.resources if name.startswith("#")} <= set(page.ids)


def test_the_content_of_files_is_text_and_never_markup(make_sweep: Maker) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    root = make_sweep(shortcuts=("pad", hostile), depths=(8,), points=5)
    path = write_report(root)
    page = Page(path)
    assert "<img" not in path.read_text()
    heads, *rows = page.tables["summary"]
    assert hostile in [row[heads.index("model.shortcut")] for row in rows]
    assert any(hostile in group["name"] for group in page.data["groups"])


def test_the_summary_has_mean_and_deviation_over_seeds(page: Page) -> None:
    heads, *rows = page.tables["summary"]
    assert heads == [
        "setting",
        "test error (%)",
        "training error (%)",
        "seeds",
        "parameters",
        "model.depth",
        "model.shortcut",
    ]
    assert [row[0] for row in rows][:3] == [
        "plain, 8 layers",
        "residual, 8 layers",
        "plain, 20 layers",
    ]
    assert len(rows) == 6
    assert all(row[3] == "3" for row in rows)
    assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", cell) for row in rows for cell in row[1:3])


def test_a_single_seed_has_no_deviation(make_sweep: Maker) -> None:
    _, *rows = Page(write_report(make_sweep(seeds=(0,), points=5))).tables["summary"]
    assert not any("±" in cell for row in rows for cell in row)


def test_the_header_has_the_claim_and_what_was_measured(make_sweep: Maker) -> None:
    root = make_sweep(depths=(8, 56), shortcuts=("none",), points=2)
    (root / "experiment.py").write_text(EXPERIMENT)
    page = Page(write_report(root))
    _, low, high = page.tables["summary"]
    header = " ".join(page.text["header"].split())
    shown = f"test error (%) {low[1]} (8 layers) to {high[1]} (56 layers); training error (%) "
    assert f"Question: Does depth <help>? Measured: {shown}" in header


def test_a_setting_that_some_runs_lack_is_a_setting_of_its_own(make_sweep: Maker) -> None:
    root = make_sweep(depths=(8,), shortcuts=("none",), seeds=(0, 1), points=2)
    for path in root.glob("runs/*/config.json"):
        config = json.loads(path.read_text())
        if config["seed"]:
            path.write_text(json.dumps(config | {"transfer": {"weights": "runs/pretrained"}}))
    page = Page(write_report(root))
    _, *rows = page.tables["summary"]
    assert len(rows) == 2
    assert "Over all" not in page.text["header"]
    assert all(row[0] in page.text["header"] for row in rows)


def test_the_training_metric_is_explained_beside_its_numbers(
    make_sweep: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sweep(depths=(8,), points=2, steps=320)
    said = "over the last 2 steps, in training mode and on images as the config augments them"
    assert main(["report", str(root)]) == 0
    assert said in capsys.readouterr().out
    assert said in Page(root / "report.html").text["summary"]


def test_runs_that_diverged_before_the_end_are_shown_with_step_and_reason(
    make_sweep: Maker,
) -> None:
    root = make_sweep(depths=(8,), shortcuts=("pad",), points=4, depth8_pad_seed0={"stop": 0.5})
    run = root / "runs" / "depth8-pad-seed0"
    (run / "diverged.json").write_text('{"step": 210, "reason": "the loss <is> not finite"}')
    page = Page(write_report(root))
    assert "2 of 3 runs finished, 1 diverged before the end" in page.text["header"]
    heads, first = page.tables["failures"]
    assert heads == ["run", "status", "step", "reason"]
    assert first == ["all runs, seed 0", "diverged", "210", "the loss <is> not finite"]
    heads, first, *others = page.tables["runs"]
    assert first[heads.index("status")] == "diverged"
    assert {row[heads.index("status")] for row in others} == {"finished"}
    heads, row = page.tables["summary"]
    assert dict(zip(heads, row, strict=True)) | {"seeds": "2", "diverged": "1"} == dict(
        zip(heads, row, strict=True)
    )


def test_failures_are_shown(make_sweep: Maker) -> None:
    failures = {"depth8_pad_seed0": {"stop": 0.5}, "depth8_pad_seed1": {"diverge": 0.5}}
    page = Page(write_report(make_sweep(points=5, **failures)))
    assert "17 of 18 runs finished, 1 of them diverged" in page.text["header"]
    heads, *rows = page.tables["runs"]
    states = [row[heads.index("status")] for row in rows]
    assert states.count("unfinished") == 1
    assert states.count("diverged") == 1
    [failure] = page.tables["failures"][1:]
    assert failure[:2] == ["residual, 8 layers, seed 1", "diverged"]


def write_error(folder: Path, error: str) -> None:
    folder.mkdir(exist_ok=True)
    content = {"launch": "1", "attempts": 2, "retry": False, "error": error, "state": "failed"}
    content |= {"time": "2026-01-05T10:00:00+00:00", "others": {}}
    (folder / "error.json").write_text(json.dumps(content))


def test_runs_that_failed_are_listed_with_their_errors_also_before_their_start(
    make_sweep: Maker,
) -> None:
    root = make_sweep(depths=(8,), points=5, depth8_pad_seed0={"stop": 0.5})
    write_error(root / "runs" / "depth8-pad-seed0", "ValueError: <odd>")
    write_error(root / "runs" / "later", "OSError: no disk")
    plan = json.loads((root / "sweep.json").read_text())
    plan["runs"].append({"folder": "runs/later", "overrides": {}})
    (root / "sweep.json").write_text(json.dumps(plan))
    page = Page(write_report(root))
    assert page.tables["failures"][1:] == [
        ["residual, seed 0", "failed", "–", "ValueError: <odd> (2 attempts)"],
        ["later", "failed", "–", "OSError: no disk"],
    ]
    assert "failures" not in Page(write_report(make_sweep_of_success(root))).tables


def make_sweep_of_success(root: Path) -> Path:
    """Returns a sweep without the failed runs of another."""
    shutil.rmtree(root / "runs" / "later")
    shutil.rmtree(root / "runs" / "depth8-pad-seed0")
    return root


def test_runs_that_have_not_started_count_as_planned(make_sweep: Maker) -> None:
    root = make_sweep(depths=(8,), points=5)
    plan = json.loads((root / "sweep.json").read_text())
    plan["runs"].append({"folder": "runs/later", "overrides": {}})
    (root / "sweep.json").write_text(json.dumps(plan))
    assert "6 of 7 runs finished" in Page(write_report(root)).text["header"]


def test_the_table_the_data_and_the_csv_contain_all_runs(root: Path, page: Page) -> None:
    with (root / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    folders = [row[-1] for row in page.tables["runs"][1:]]
    assert [row["folder"] for row in rows] == folders
    assert [f"runs/{run['name']}" for run in page.data["runs"]] == folders
    assert all((root / folder).is_dir() for folder in folders)


def test_the_data_has_values_in_per_cent_and_null_for_nan(make_run: Maker) -> None:
    root = make_run("run", {"points": 4})
    (root / "metrics.jsonl").write_text(
        '{"step": 10, "split": "test", "loss": 1, "error": 0.25}\n'
        '{"step": 20, "split": "test", "loss": null, "error": null}\n'
    )
    data = Page(write_report(root)).data
    [curve] = [each for each in data["curves"] if each["metric"] == "error"]
    assert (curve["split"], curve["values"]) == ("test", [25.0, None])
    assert data["steps"][curve["steps"]] == [10, 20]


def test_long_curves_are_thinned_between_their_ends(make_run: Maker) -> None:
    data = Page(write_report(make_run("run", {"points": 1000}, steps=1000))).data
    for curve in data["curves"] + data["means"]:
        steps = data["steps"][curve["steps"]]
        assert len(steps) == POINTS
        assert (steps[0], steps[-1]) == (1, 1000)


def test_the_configuration_has_only_fields_that_runs_share(page: Page) -> None:
    config = dict(page.tables["config"])
    assert config["optimizer.learning_rate"] == "0.1"
    assert "model.depth" not in config


def test_provenance_has_commits_versions_devices_and_command(page: Page) -> None:
    facts = dict(page.tables["provenance"])
    commit = "1f2e3d4c5b6a79880123456789abcdef01234567"
    assert facts["commit"] == f"{commit}; {commit}, with uncommitted changes"
    assert facts["jax"] == "0.10.2"
    assert facts["devices"] == "TFRT_CPU_0"
    assert facts["command"].startswith("resjax sweep")


def test_fifty_runs_fit_in_half_a_megabyte(make_sweep: Maker) -> None:
    path = write_report(
        make_sweep(depths=(20, 32, 44, 56, 110), seeds=(0, 1, 2, 3, 4), points=160, steps=64_000)
    )
    assert path.stat().st_size < 512 * 1024


def test_a_report_can_be_written_before_the_first_measurement(make_run: Maker) -> None:
    root = make_run("run", {"stop": 0.0})
    assert "0 of 1 runs finished" in Page(write_report(root)).text["header"]


def test_a_report_shows_the_primary_metric_of_each_run(make_tasks: Maker) -> None:
    root = make_tasks()
    page = Page(write_report(root))
    heads, *rows = page.tables["summary"]
    assert heads[:5] == [
        "setting",
        "test accuracy (%)",
        "test angle (rad)",
        "training accuracy (%)",
        "training angle (rad)",
    ]
    assert sorted([row[i] == "–" for i in (1, 2, 3, 4)] for row in rows) == [
        [False, True, False, True],
        [True, False, True, False],
    ]
    assert "best test angle (rad)" in page.tables["runs"][0]
    assert "higher accuracy is better; lower angle is better" in page.text["summary"]
    assert "error" not in page.text["summary"]
    assert {file.stem for file in (root / "figures").iterdir()} == {
        "accuracy_curves",
        "angle_curves",
    }
    labels = {metric["key"]: metric["label"] for metric in page.data["metrics"]}
    assert (labels["accuracy"], labels["angle"]) == ("accuracy (%)", "angle (rad)")
    summary = json.loads((root / "angle" / "summary.json").read_text())
    [curve] = [c for c in page.data["curves"] if (c["metric"], c["split"]) == ("angle", "test")]
    assert page.data["runs"][curve["run"]]["name"] == "angle"
    assert curve["values"][-1] == pytest.approx(summary["test_angle"], rel=1e-3)


def test_the_command_prints_the_primary_metrics(
    make_tasks: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(make_tasks())]) == 0
    header, accuracy, *_ = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", header)[1:4] == [
        "test accuracy (%)",
        "test angle (rad)",
        "training accuracy (%)",
    ]
    assert re.fullmatch(r"20 +[\d.]+ +– +[\d.]+ +– +1 +[\d,]+", accuracy)


def test_a_report_shows_the_layers_of_runs_with_diagnostics(make_sweep: Maker) -> None:
    root = make_sweep(points=2, seeds=(0,))
    assert "layers" not in Page(write_report(root)).text
    for folder in (root / "runs").iterdir():
        line = {"step": 10, "layer": "stem/kernel", "gradient_norm": 1.0, "diverged": None}
        (folder / "layers.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(write_report(root))
    assert "Layers gradient norm" in page.text["layers"]
    assert (root / "figures" / "layers_gradient_norm.svg").exists()


def test_the_chart_has_diagnostics_as_means_over_the_layers_of_each_part(
    make_run: Maker,
) -> None:
    folder = make_run("run", {"points": 2})
    parts = {"stage1/block1": 1.0, "stage1/block2": 3.0, "norm": 5.0, "relu_0": 7.0}
    lines = [
        {"step": step, "layer": layer, "branch_share": step + value}
        for step in (0, 10)
        for layer, value in parts.items()
    ]
    (folder / "layers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Page(write_report(folder)).data
    shown = {m["label"]: m["key"] for m in data["metrics"] if m["kind"] == "Layers"}
    assert list(shown) == ["branch share, stage1", "branch share, norm"]
    curves = {c["metric"]: c["values"] for c in data["curves"]}
    assert [curves[key] for key in shown.values()] == [[2, 12], [6, 16]]


def test_a_report_has_paired_differences_with_both_intervals(root: Path, page: Page) -> None:
    header, *rows = page.tables["differences"]
    assert header[-3:] == ["95 %, Student's t", "95 %, bootstrap", "seeds"]
    [deep] = [row for row in rows if row[:3] == ["residual", "plain", "56 layers"]]
    runs = load_runs(root).set_index(["model.depth", "model.shortcut", "seed"])["test_error"]
    gaps = 100 * (runs[56, "pad"] - runs[56, "none"])
    assert deep[3] == f"error (%) {gaps.mean():.2f} ± {gaps.std():.2f}"
    assert deep[5] == f"{gaps.min():.2f} to {gaps.max():.2f}"  # of three seeds
    assert deep[6] == "3"


def test_tables_hold_intervals_of_every_metric(root: Path) -> None:
    results = pd.read_csv(root / "results.csv")
    assert set(results["metric"]) == {"train_loss", "test_loss", "train_error", "test_error"}
    assert ((results["t_low"] < results["mean"]) & (results["mean"] < results["t_high"])).all()
    found = pd.read_csv(root / "differences.csv")
    assert set(found["field"]) == {"model.depth", "model.shortcut"}
    assert (found["pairs"] == 3).all()


MEASURED = """\"\"\"Lesions.\"\"\"
from matplotlib.figure import Figure

def measure(run):
    return {"error": run.evaluate()["error"]}

def figures(measurements, runs, *, width=1):
    figure = Figure(figsize=(width, 1))
    figure.subplots().plot(runs.merge(measurements, on="folder")["after"])
    return {"lesions": figure}
"""


def write_findings(run: Path, rows: list[dict[str, Any]], steps: int = 400) -> Path:
    path = run / "measurements" / "degradation.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"step": steps, "rows": rows, "code": "c", "checkpoint": "d"}))
    return path


@pytest.fixture
def measured(make_sweep: Maker) -> Path:
    """Returns a sweep folder of three finished runs of an experiment that measures."""
    root = make_sweep(points=2, depths=(8,), shortcuts=("pad",))
    (root / "experiment.py").write_text(MEASURED)
    return root


def test_a_report_with_runs_half_measured_draws_them_and_says_how_many_lack(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in sorted((measured / "runs").iterdir())[:2]:
        write_findings(run, [{"after": 0.5}])
    assert main(["report", str(measured)]) == 0
    [line] = [text for text in capsys.readouterr().err.splitlines() if "measure" in text]
    assert "left out: measurements of 1 of 3 finished runs, which measure() of" in line
    assert "`resjax sweep` with the same options measures them" in line
    assert (measured / "figures" / "lesions.svg").exists()
    assert "measurements of 1 of 3" in (measured / "report.html").read_text()


def test_a_report_before_any_measurement_has_the_default_figures(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(measured)]) == 0
    error = capsys.readouterr().err
    assert "measurements of 3 of 3 finished runs" in error
    assert error.endswith("; the figures are the default ones\n")
    assert [file.name for file in (measured / "figures").glob("*.svg")] == ["curves.svg"]


def test_damaged_measurements_are_named_and_left_out(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = sorted((measured / "runs").iterdir())
    for run in others:
        write_findings(run, [{"after": 0.5}])
    write_findings(first, [{"after": [1]}])  # type: ignore[list-item]
    assert main(["report", str(measured)]) == 0
    error = capsys.readouterr().err
    assert f"{first / 'measurements' / 'degradation.json'}: damaged, not what an" in error


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("runs, layrs", "figures() has the parameter 'layrs'; it may take runs, curves, layers, "),
        ("measurement, runs", "figures() has the parameter 'measurement'; it may take runs"),
    ],
)
def test_a_parameter_that_no_table_has_is_refused(
    make_sweep: Maker, capsys: pytest.CaptureFixture[str], parameters: str, message: str
) -> None:
    root = make_sweep(points=2, depths=(8,), shortcuts=("pad",), seeds=(0,))
    (root / "experiment.py").write_text(f"def figures({parameters}):\n    return {{}}\n")
    assert main(["report", str(root)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("a, b", "a['model.depth'], b['split']"),  # of an earlier version, in this order
        ("*tables", "tables[0]['model.depth'], tables[1]['split']"),
        ("layers, runs", "layers['layer'], runs['model.depth']"),
        ("curves, extra=3, **more", "curves['split'], 1 / (extra == 3 and not more)"),
    ],
)
def test_figures_get_the_tables_that_their_parameters_name(
    make_sweep: Maker, parameters: str, expected: str
) -> None:
    root = make_sweep(points=2, depths=(8,), shortcuts=("pad",), seeds=(0,))
    body = f"def figures({parameters}):\n    {expected}\n    return {{}}\n"
    (root / "experiment.py").write_text(body)
    write_report(root)
