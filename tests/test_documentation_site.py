"""The pages of the documentation site are complete, and their links and numbers hold.

`make docs` builds the site itself.
"""

import argparse
import posixpath
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from docs.make_pages import API, REPORTS, assets, make_pages, slug
from resjax import cli
from resjax.config.schema import FIELDS

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


@pytest.fixture(scope="module")
def pages():
    return make_pages()


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
    assert {file.name for file in (ROOT / "docs").glob("*.md")} <= pages.keys()


def test_every_link_leads_to_a_page_and_an_anchor(pages):
    known = {*pages, *assets().values(), *REPORTS.values()}
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
            if link.startswith("https://"):
                continue
            name, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), name))
            target = target if name else page
            assert target in known, f"{page}: {link}"
            assert not anchor or anchor in anchors(pages[target]), f"{page}: {link}"


def test_links_have_the_titles_of_pages_in_place_of_file_names(pages):
    assert "[Throughput](throughput.md)" in pages["index.md"]
    for page, text in pages.items():
        assert not re.search(r"\[[\w/]+\.md\]\(", prose(text)), page


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
def test_the_page_of_an_experiment_has_its_claim_figures_verdicts_and_code(file, pages):
    page = pages[f"experiments/{file.stem}.md"]
    assert page.startswith(f"# {file.read_text().removeprefix(chr(34) * 3).splitlines()[0]}\n")
    assert f"```python\n{file.read_text()}```" in page
    for figure in (ROOT / "docs" / "digits").glob(f"{file.stem}.*.svg"):
        assert f"](../digits/{figure.name})" in page
    section = f"`experiments/{file.name}`\n\n| claim"
    judged = (ROOT / "docs" / "claims.md").read_text().partition(section)[2].partition("\n## ")[0]
    assert judged.strip() in page
    assert ("No verdict" in page) == (not judged)


def test_every_measured_number_of_the_story_is_one_of_the_claims():
    claims = (ROOT / "docs" / "claims.md").read_text()
    numbers = re.findall(r"[\d.]+\s±\s[\d.]*\d", (ROOT / "docs" / "story.md").read_text())
    assert len(numbers) > 20
    for number in numbers:
        assert " ".join(number.split()) in claims, number


def test_the_programs_beside_those_of_pytorch_run():
    text = (ROOT / "docs" / "pytorch.md").read_text()
    programs = re.findall(r"```python\n# resjax\n(.*?)```", text, re.DOTALL)
    assert len(programs) == text.count("# PyTorch\n")
    names = {}
    for program in programs:
        exec(program.replace("resnet18", "cifar_resnet8"), names)  # which compiles sooner
    assert names["logits"].shape == (2, 10)
    assert set(names["variables"]) == {"params", "batch_stats"}
    assert names["loss"] > 0
    model = names["model"].clone(block=names["BasicBlock"])
    logits = model.apply(names["variables"], names["images"])
    assert (logits == names["model"].apply(names["variables"], names["images"])).all()


def test_the_site_asks_no_other_host():
    assert SITE["theme"]["font"] is False
    assert "extra_javascript" not in SITE
    assert not [name for name in SITE["extra_css"] if "//" in name]
