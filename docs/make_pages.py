"""Writes the Markdown pages from which mkdocs builds the documentation site.

    python docs/make_pages.py site/pages

The pages are those of docs/ (Markdown and notebooks), sections of the README, the pages about the
project, one page for each experiment (its docstring, the figures of its committed runs, its
verdicts in docs/claims.md and its code), and references that are made from the config schema, the
parsers of the commands and docstrings. Each sweep in experiments/results/ has a report, from which
the page of its experiment takes figures. No text exists twice, so a page is edited at its source.
This is a script and no mkdocs plugin, because zensical would not run the plugin.
"""

import argparse
import ast
import dataclasses
import html
import inspect
import json
import posixpath
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import resjax
from resjax.analysis.experiment_figures import experiment_of
from resjax.analysis.figures import COLUMN_WIDTH
from resjax.analysis.report import write_report
from resjax.cli import make_parser
from resjax.cli.config import typed
from resjax.config import Config
from resjax.config.fields import documentation
from resjax.config.schema import FIELDS

ROOT = Path(__file__).resolve().parents[1]

README_PAGES = {
    "index.md": ("resjax", "When to use it"),
    "start.md": ("Start here", "Installation", "The demo", "The real experiment"),
    "python.md": ("In Python",),
    "block.md": ("A block of your own",),
    "shortcut.md": ("A shortcut of your own",),
    "task.md": ("A task of your own",),
    "optimizer.md": ("An optimizer and a schedule of your own",),
    "diagnostic.md": ("A diagnostic of your own",),
    "experiment.md": ("An experiment of your own",),
    "reproducibility.md": ("Reproducibility",),
    "layout.md": ("How the code is laid out",),
}
"""Maps each page to its title, below which is the section of that name, and to further sections."""

PROJECT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FILES = ("CITATION.cff",)  # which pages link to, beside the images of docs/

RESULTS = ROOT / "experiments" / "results"

API = {
    "Networks": (
        "resjax.models.resnet.ResNet",
        "resjax.models.blocks.Block",
        "resjax.models.shortcuts.Shortcut",
        "resjax.models.conformance.check_block",
        "resjax.models.conformance.check_shortcut",
    ),
    "Tasks": (
        "resjax.tasks.base.Task",
        "resjax.tasks.base.DatasetInfo",
        "resjax.tasks.base.weighted_sum",
        "resjax.tasks.conformance.check_task",
    ),
    "Diagnostics": (
        "resjax.diagnostics.Context",
        "resjax.diagnostics.conformance.check_diagnostic",
    ),
    "Sweeps": (
        "resjax.sweeps.algebra.param",
        "resjax.sweeps.algebra.product",
        "resjax.sweeps.algebra.zipped",
        "resjax.sweeps.algebra.chain",
        "resjax.sweeps.algebra.choose",
        "resjax.sweeps.conformance.check_experiment",
    ),
    "Figures": (
        "resjax.analysis.figures.style",
        "resjax.analysis.figures.metric_curves",
        "resjax.analysis.final_values.Published",
        "resjax.analysis.final_values.by_depth",
        "resjax.analysis.final_values.by_category",
        "resjax.analysis.final_values.curves_and_final",
        "resjax.analysis.profiles.profiles",
    ),
    "Claims": (
        "resjax.analysis.claims.Claim",
        "resjax.analysis.claims.compare",
        "resjax.analysis.claims.trend",
        "resjax.analysis.claims.within",
    ),
    "Measurements of finished runs": (
        "resjax.measurements.base.FinishedRun",
        "resjax.measurements.lesions.LesionedModel",
        "resjax.measurements.lesions.block_names",
        "resjax.measurements.lesions.delete",
        "resjax.measurements.lesions.permute",
        "resjax.measurements.lesions.random_orders",
        "resjax.measurements.lesions.kendall_tau",
        "resjax.measurements.loss_surface.random_direction",
        "resjax.measurements.loss_surface.grid",
        "resjax.measurements.loss_surface.loss_surface",
        "resjax.measurements.curvature.Hessian",
        "resjax.measurements.curvature.Eigenpairs",
        "resjax.measurements.curvature.SpectralDensity",
    ),
    "Trackers": (
        "resjax.tracking.Tracker",
        "resjax.tracking.TrackedRun",
        "resjax.tracking.Row",
        "resjax.tracking.End",
    ),
}
"""The names of the Python API by heading; those of `resjax.__all__` come before them."""


def write_site(folder: Path) -> None:
    """Replaces a folder by one with all pages, reports, and files that they show or link to."""
    shutil.rmtree(folder, ignore_errors=True)
    # The drawing of reports is most of the work. Forked processes would inherit JAX's threads.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for _ in pool.map(write_sweep_report, sweeps(), repeat(folder)):
            pass
    for page, text in make_pages(folder).items():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(text)
    for source, target in assets().items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / source, folder / target)


def sweeps() -> dict[Path, Path]:
    """Maps the folder of each committed sweep to its experiment file."""
    folders = [plan.parent for plan in sorted(RESULTS.rglob("sweep.json"))]
    return {folder: experiment_of(folder, ROOT / "experiments") for folder in folders}


def sweep_name(sweep: Path) -> str:
    return sweep.relative_to(RESULTS).as_posix()


def report_path(sweep: Path) -> str:
    """Returns the path of the report of a committed sweep in the site."""
    return f"reports/{sweep_name(sweep)}/report.html"


def write_sweep_report(sweep: Path, folder: Path) -> None:
    """Writes the report of a committed sweep to the folder of the site's pages."""
    write_report(sweep, sweeps()[sweep], (folder / report_path(sweep)).parent)


def make_pages(folder: Path) -> dict[str, str]:
    """Returns the Markdown of every page by its path in the site.

    Args:
      folder: with the reports that are written already; a sweep without one has a link alone.
    """
    readme = read_sections("README.md")
    pages = {}
    for page, (title, *others) in README_PAGES.items():
        text = f"# {title}\n{readme.get(title, '')}"
        text += "".join(f"\n## {name}\n{readme[name]}" for name in others)
        pages[page] = relink(text, "README.md", page)
    for source, page in markdown_files().items():
        pages[page] = relink(read_markdown(source), source, page)
    pages["results.md"] += reports_section()
    for file in experiments():
        pages[experiment_path(file)] = experiment_page(file, folder)
    pages["reference/config.md"] = config_page()
    pages["reference/commands.md"] = commands_page()
    pages["reference/api.md"] = api_page()
    return pages


def markdown_files() -> dict[str, str]:
    """Maps each file that is a whole page to the path of the page in the site."""
    folder = ROOT / "docs"
    files = [*sorted(folder.glob("*.md")), *sorted(folder.glob("*.ipynb"))]
    return {f"docs/{file.name}": f"{file.stem}.md" for file in files} | PROJECT_PAGES


def read_markdown(source: str) -> str:
    """Returns a file as Markdown; a notebook with its code and its stored outputs."""
    text = (ROOT / source).read_text()
    if not source.endswith(".ipynb"):
        return text
    return (
        "\n\n".join(part for cell in json.loads(text)["cells"] for part in cell_parts(cell)) + "\n"
    )


def cell_parts(cell: dict[str, Any]) -> Iterator[str]:
    """Yields the Markdown of a cell of a notebook and of its outputs.

    The metadata of a cell that draws a figure have its description, `alt`.
    """
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield text
        return
    yield f"```python\n{text}\n```"
    if printed := "".join(line for output in cell["outputs"] for line in output.get("text", [])):
        yield f"```text\n{printed}```"
    for output in cell["outputs"]:
        if image := output.get("data", {}).get("image/png"):
            yield f"![{cell['metadata']['alt']}](data:image/png;base64,{''.join(image.split())})"


def experiments() -> list[Path]:
    return sorted((ROOT / "experiments").glob("*.py"))


def experiment_path(file: Path) -> str:
    return f"experiments/{file.stem}.md"


def assets() -> dict[str, str]:
    """Maps each file that pages show or link to to its path in the site."""
    folder = ROOT / "docs"
    kinds = (".svg", ".png", ".css", ".js")
    found = [file for file in sorted(folder.rglob("*")) if file.suffix in kinds]
    names = [file.relative_to(folder).as_posix() for file in found]
    return {f"docs/{name}": name for name in names} | dict(zip(FILES, FILES, strict=True))


def read_sections(source: str) -> dict[str, str]:
    """Returns the text below the title of a file and below each `##` heading, by heading."""
    title, _, text = read_markdown(source).removeprefix("# ").partition("\n")
    introduction, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {title: introduction, **dict(zip(parts[::2], parts[1::2], strict=True))}


def slug(title: str) -> str:
    """Returns the anchor of a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


def relink(text: str, source: str, page: str) -> str:
    """Returns Markdown in which links to files of the repository lead to their pages.

    A link whose text is the name of a file, as in a checkout, gets the title of the page.

    Args:
      text: the Markdown of a file, or of a part of it.
      source: the file's path in the repository.
      page: the path of the page in the site.
    """
    pages = markdown_files() | assets()
    pages |= {f"experiments/{file.name}": experiment_path(file) for file in experiments()}

    def link(match: re.Match[str]) -> str:
        words, address = match.groups()
        name, hash_, anchor = address.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        path = path if name else source
        target = readme_page(anchor) if path == "README.md" else pages.get(path)
        if target is None:  # an address, or brackets in code
            return match[0]
        if words.endswith((".md", ".ipynb")):
            words = next(iter(read_sections(path)))
        return (
            f"[{words}]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{hash_}{anchor})"
        )

    return re.sub(r"\[([^]]*)\]\(([^)\s]+)\)", link, text)


def readme_page(anchor: str) -> str:
    """Returns the page that has a section of the README."""
    for page, titles in README_PAGES.items():
        if anchor in map(slug, titles):
            return page
    return "index.md"


def experiment_page(file: Path, folder: Path) -> str:
    """Returns the page of an experiment: claim, figures, verdicts and code."""
    code = file.read_text()
    title, _, claim = inspect.cleandoc(ast.get_docstring(ast.parse(code)) or "").partition("\n")
    parts = [f"# {title.rstrip('.')}", claim.strip()]
    parts.append("[How to run it](../experiments.md). [How the runs were made](../results.md).")
    for sweep in [sweep for sweep, source in sweeps().items() if source == file]:
        parts += sweep_section(sweep, folder)
    parts += ["## Verdicts", verdicts(title.rstrip("."))]
    parts += ["## Code", f"`experiments/{file.name}`", f"```python\n{code}```"]
    return "\n\n".join(parts) + "\n"


def sweep_section(sweep: Path, folder: Path) -> Iterator[str]:
    """Yields the link to the report of a sweep and, if it is written, what it measured and drew."""
    name, path = sweep_name(sweep), report_path(sweep)
    yield f"## Runs: {name}"
    yield f"[The report of these runs]({posixpath.join('..', path)}) has interactive curves."
    if not (folder / path).exists():
        return
    page = (folder / path).read_text()
    for pattern in (r'<p class="status">(.*?)</p>', r"<p>(<strong>Measured:</strong> .*?)</p>"):
        for text in re.findall(pattern, page, re.DOTALL):
            yield plain_text(text)
    section = page.partition('<section id="figures">')[2].partition("</section>")[0]
    figures = re.findall(
        r'<figcaption><b>(.*?)\.</b>(.*?)<span><a href="(.*?)\.png"', section, re.DOTALL
    )
    for title, caption, stem in figures:
        file = folder / posixpath.dirname(path) / f"{stem}.svg"
        width = float(re.findall(r'width="([\d.]+)pt"', file.read_text())[0])
        column = "{ .column }" if width <= 72 * COLUMN_WIDTH else ""
        shown = posixpath.join("..", file.relative_to(folder).as_posix())
        yield f"![{plain_text(title)} of the runs in {name}]({shown}){column}"
        yield f"*{plain_text(f'{title}.{caption}')}*"


def plain_text(text: str) -> str:
    """Returns HTML without its tags, as Markdown."""
    return escape(html.unescape(re.sub(r"<[^>]*>", "", text)).strip())


def reports_section() -> str:
    """Returns a list of the reports of all committed sweeps."""
    links = (f"- [{sweep_name(sweep)}]({report_path(sweep)})" for sweep in sweeps())
    return "\n## Reports with interactive curves\n\n" + "\n".join(links) + "\n"


def verdicts(title: str) -> str:
    """Returns the table of docs/claims.md for an experiment, below a count of its verdicts."""
    section = read_sections("docs/claims.md").get(title)
    if section is None:
        return "No verdict: no run of this experiment has been judged ([claims](../claims.md))."
    counts = Counter(re.findall(r"\*\*([\w ]+)\*\* \|$", section, re.MULTILINE))
    counted = ", ".join(f"{number} × {verdict}" for verdict, number in counts.most_common())
    table = section[section.index("|") :].strip()
    return f"{counted}. [Claims](../claims.md) explains what a verdict rests on.\n\n{table}"


def config_page() -> str:
    """Returns the reference of all config fields."""
    parts = [
        "# Config fields",
        "Every field has an option, `--config.FIELD=VALUE`, and `resjax config FILE` prints the"
        " fields with the values of a config. A field named `...options` holds further keyword"
        " arguments of the function or class that the field beside it names."
        " [Training](../training.md), [data](../data.md) and [devices](../devices.md) explain the"
        " choices.",
        *describe_section(Config()),
    ]
    return "\n\n".join(parts) + "\n"


def describe_section(section: Any, prefix: str = "") -> Iterator[str]:
    """Yields a section of the config, its fields, and the sections within."""
    yield f"## {prefix.rstrip('.') or 'Fields outside sections'}"
    if prefix:
        yield escape(inspect.getdoc(type(section)) or "")
    inner = [name for name, value in vars(section).items() if dataclasses.is_dataclass(value)]
    meanings = documentation(type(section))
    for name in [name for name in vars(section) if name not in inner]:
        path = prefix + name
        values = ", ".join(filter(None, (str(FIELDS[path]), str(FIELDS[path].bounds))))
        yield f"### {path} {{#{path}}}"
        yield escape(meanings[name])
        yield f"Values: {escape(values)}. Default: `{typed(getattr(section, name))}`."
    for name in inner:
        yield from describe_section(getattr(section, name), f"{prefix}{name}.")


def commands_page() -> str:
    """Returns the reference of all commands."""
    parts = [
        "---\nsearch:\n  boost: 2\n---",  # before pages that only use a command
        "# Commands",
        "`resjax COMMAND --help` prints the same. A command with a config takes an option for"
        " [every field](config.md) of it, `--config.FIELD=VALUE`. A mistake on the command line"
        " ends in one line and exit code 2.",
        *describe_commands(make_parser()),
    ]
    return "\n\n".join(parts) + "\n"


def describe_commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields each command of a parser, with usage and arguments, and the commands within."""
    groups = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    for command in (command for group in groups for command in group.choices.values()):
        level = "#" * len(command.prog.split())
        yield f"{level} {command.prog} {{#{slug(command.prog)}}}"
        yield escape(inspect.cleandoc(command.description or ""))
        yield f"```text\n{usage(command)}\n```"
        rows = [row for each in command._actions if (row := argument_row(each))]
        if rows:
            yield "\n".join(["| argument | meaning |", "| --- | --- |", *rows])
        yield from describe_commands(command)


def usage(parser: argparse.ArgumentParser) -> str:
    """Returns the usage line of a command, which does not depend on the width of the terminal."""
    formatter = argparse.HelpFormatter(parser.prog, width=90)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, "")
    return formatter.format_help().strip()


def argument_row(action: argparse.Action) -> str:
    """Returns an argument as a row of a table; "" for help and subcommands."""
    if action.dest == "help" or isinstance(action, argparse._SubParsersAction):
        return ""
    choices = "|".join(map(str, action.choices or ()))
    value = str(action.metavar or choices or action.dest.upper())
    if action.option_strings:
        option = max(action.option_strings, key=len)
        name = option if action.nargs == 0 else f"{option}={value}"
    else:
        name = value + "..." * (action.nargs in ("*", "+"))
    meaning = (action.help or "") % vars(action)
    if choices and action.metavar and choices not in meaning:
        meaning += f" ({choices})"
    required = "; required" * bool(action.required and action.option_strings)
    return f"| `{name.replace('|', '&#124;')}` | {escape(meaning + required)} |"


def api_page() -> str:
    """Returns the page from which mkdocstrings makes the reference of the Python API."""
    parts = [
        "# Python API",
        "These are the names that files of your own import. Annotations give the shapes of arrays:"
        ' `Float[Array, "n h w c"]` is a batch of images.',
        "## resjax",
    ]
    parts += [f"::: resjax.{name}" for name in resjax.__all__ if not name.startswith("_")]
    for heading, names in API.items():
        parts.append(f"## {heading}")
        parts += [f"::: {name}" for name in names]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Returns plain text, such as a docstring, as Markdown; code in backticks stays code."""
    parts = re.split(r"(`[^`]*`|^    .*$)", text, flags=re.MULTILINE)
    parts[::2] = [re.sub(r"([\\*<\[\]|])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    write_site(Path(sys.argv[1]))
