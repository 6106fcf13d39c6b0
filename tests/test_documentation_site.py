"""The pages of the documentation site are complete, and their links and numbers hold.

`make docs` builds the site itself.
"""

import argparse
import posixpath
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml

from docs.make_pages import (
    API,
    assets,
    make_pages,
    report_path,
    slug,
    sweeps,
    write_sweep_report,
)
from resjax import cli
from resjax.analysis.experiment_figures import experiment_of, load_experiment, load_tables
from resjax.analysis.figures import save
from resjax.analysis.runs import load_runs, summarize
from resjax.config.schema import FIELDS
from resjax.run_files import read_json_object

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


SHOWN = ROOT / "experiments" / "results" / "digits" / "very_deep"
"""The sweep whose report is written here; `make docs` writes those of all sweeps."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages, with one report."""
    folder = tmp_path_factory.mktemp("site")
    write_sweep_report(SHOWN, folder)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return make_pages(site)


def leaves(entries):
    """Yields the pages of a navigation."""
    for entry in entries:
        for target in entry.values():
            yield from leaves(target) if isinstance(target, list) else [target]


def prose(page):
    """Returns a page without its code."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", page)


def anchors(page):
    """Returns the anchors of the headings of a page, given or made from their texts."""
    headings = re.findall(r"^#+ (.+?)(?: \{#(.+)\})?$", page, re.MULTILINE)
    return {given or slug(text) for text, given in headings}


def test_every_page_is_in_the_navigation_once(pages):
    listed = list(leaves(SITE["nav"]))
    assert sorted(listed) == sorted(pages)


def test_every_page_of_the_docs_and_every_section_of_the_readme_is_on_the_site(pages):
    site = "\n".join(pages.values())
    for heading in re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^##? {re.escape(heading)}$", site, re.MULTILINE), heading
    docs = {file for file in (ROOT / "docs").iterdir() if file.suffix in (".md", ".ipynb")}
    assert {f"{file.stem}.md" for file in docs} <= pages.keys()


def test_every_link_leads_to_a_page_and_an_anchor(pages, site):
    known = {*pages, *assets().values(), *map(report_path, sweeps())}
    known |= {file.relative_to(site).as_posix() for file in site.rglob("*.svg")}
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
            if link.startswith(("https://", "data:image/png;base64,")):
                continue
            name, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), name))
            target = target if name else page
            assert target in known, f"{page}: {link}"
            assert not anchor or anchor in anchors(pages[target]), f"{page}: {link}"


def test_links_have_the_titles_of_pages_in_place_of_file_names(pages):
    assert "[Throughput](throughput.md)" in pages["index.md"]
    for page, text in pages.items():
        assert not re.search(r"\[[\w/]+\.(md|ipynb)\]\(", prose(text)), page


def test_every_image_is_described(pages):
    described = [alt for text in pages.values() for alt in re.findall(r"!\[([^]]*)\]\(", text)]
    assert described
    assert all(len(alt.split()) > 2 for alt in described)


def test_the_reference_has_every_config_field_with_its_meaning_and_default(pages):
    page = pages["reference/config.md"]
    headings = re.findall(
        r"^### (\S+) \{#(\S+)\}\n\n(\w.+\n)+\nValues: .+ Default: `.*`\.$", page, re.M
    )
    assert [name for name, *_ in headings] == [anchor for _, anchor, _ in headings]
    assert {name for name, *_ in headings} == FIELDS.keys()


def test_the_reference_has_every_command_with_every_argument(pages):
    page = pages["reference/commands.md"]
    parts = re.split(r"^##+ (resjax .+) \{#.+\}$", page, flags=re.MULTILINE)
    shown = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert {f"resjax {name}" for name in cli.COMMANDS} <= shown.keys()
    assert "resjax data prepare" in shown

    def check(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    check(command)
            elif action.dest not in ("help", "version"):
                name = max(action.option_strings, key=len, default=action.metavar)
                assert f"| `{name}" in shown[parser.prog], f"{parser.prog}: {name}"

    check(cli.make_parser())


def test_every_name_of_the_python_reference_exists_and_has_a_docstring():
    for name in (name for names in API.values() for name in names):
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__, name


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.py")), ids=lambda f: f.stem)
def test_the_page_of_an_experiment_has_its_claim_verdicts_and_code(file, pages):
    page = pages[f"experiments/{file.stem}.md"]
    assert page.startswith(f"# {file.read_text().removeprefix(chr(34) * 3).splitlines()[0]}\n")
    assert f"```python\n{file.read_text()}```" in page
    section = f"`experiments/{file.name}`\n\n| claim"
    judged = (ROOT / "docs" / "claims.md").read_text().partition(section)[2].partition("\n## ")[0]
    assert judged.strip() in page
    assert ("No verdict" in page) == (not judged)


def test_every_committed_sweep_has_a_report_that_its_experiment_leads_to(pages):
    committed = {plan.parent for plan in (ROOT / "experiments" / "results").rglob("sweep.json")}
    assert committed == sweeps().keys()
    for sweep, experiment in sweeps().items():
        assert f"]({report_path(sweep)})" in pages["results.md"]
        if experiment.parent == ROOT / "experiments":
            assert f"](../{report_path(sweep)})" in pages[f"experiments/{experiment.stem}.md"]


def test_the_page_of_an_experiment_has_what_the_reports_of_its_runs_measured_and_drew(pages, site):
    page, report = pages[f"experiments/{SHOWN.name}.md"], site / report_path(SHOWN)
    figures = [*(report.parent / "figures").glob("*.svg")]
    assert {figure.stem for figure in figures} == {"curves", "start", "depth"}
    for figure in figures:
        title, shown = figure.stem.capitalize(), figure.relative_to(site).as_posix()
        image = rf"!\[{title} of .*\]\(\.\./{shown}\)"
        assert re.search(rf"^{image}.*\n\n\*{title}\. .*5 seeds.*\*$", page, re.MULTILINE)
    assert re.search(r"^Measured: Of \d claims, .* test error ", page, re.MULTILINE)
    assert re.search(r"^15 of 15 runs finished · digits", page, re.MULTILINE)


def measured(text):
    """Returns the means and deviations that a text has."""
    return [" ".join(number.split()) for number in re.findall(r"-?[\d.]+\s±\s[\d.]*\d", text)]


@pytest.fixture(scope="module")
def committed():
    """The means and deviations of the committed runs, of all seeds and of the first three."""
    found = set(measured((ROOT / "docs" / "claims.md").read_text()))
    for plan in (ROOT / "experiments" / "results").rglob("sweep.json"):
        runs = load_runs(plan.parent)
        for some in (runs, runs[runs["seed"] < 3]):
            table = summarize(some)
            for name in (each.removesuffix("_mean") for each in table if each.endswith("_mean")):
                pairs = zip(table[f"{name}_mean"], table[f"{name}_std"], strict=True)
                found |= {f"{100 * mean:.2f} ± {100 * std:.2f}" for mean, std in pairs}
    return found


@pytest.mark.parametrize(
    "page", ["README", "docs/story", "docs/results", "docs/dense", "docs/transfer", "docs/tutorial"]
)
def test_every_measured_error_of_a_page_is_that_of_committed_runs(page, committed):
    numbers = measured((ROOT / f"{page}.md").read_text())
    assert len(numbers) > 4
    assert [number for number in numbers if number not in committed] == []


RESULTS = ROOT / "experiments" / "results"
DRAWN = {  # by figure in docs/, as `make figures` copies them: the sweep, and its name there
    **{
        file: (RESULTS / file.parent.name / file.stem.split(".")[0], file.stem.split(".")[1])
        for file in sorted((ROOT / "docs").glob("*/*.svg"))
    },
    **{
        ROOT / "docs" / f"{plan.parent.name}.svg": (
            plan.parent,
            read_json_object(plan)["experiment"],
        )
        for plan in sorted(RESULTS.glob("*/sweep.json"))
    },
}


def test_every_figure_of_the_docs_is_drawn_by_an_experiment_or_a_benchmark():
    docs = ROOT / "docs"
    assert {*docs.rglob("*.svg")} - DRAWN.keys() == {docs / "throughput.svg"}


@pytest.mark.parametrize("shown", DRAWN, ids=lambda file: file.stem)
def test_a_figure_of_the_docs_is_what_its_experiment_draws_of_the_committed_runs(shown, tmp_path):
    """`make figures` draws them anew."""
    sweep, figure = DRAWN[shown]
    experiment = load_experiment(experiment_of(sweep, ROOT / "experiments"))
    tables = load_tables(load_runs(sweep), experiment.file)
    *_, drawn = save(experiment.figures(tables)[figure], tmp_path / figure)
    number = re.compile(r"-?\d+\.\d+")
    old, new = shown.read_text(), drawn.read_text()
    assert number.sub("", old) == number.sub("", new)
    # Another machine may round differently.
    shift = np.subtract(*(np.array(number.findall(text), float) for text in (old, new)))
    assert np.abs(shift).max() < 0.01  # points
