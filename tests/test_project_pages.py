"""What the pages about the project say is true of the project."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from resjax import cli
from resjax.config.schema import FIELDS
from resjax.run_files import RENAMED_FIELDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))  # not config.yml


def test_the_citation_is_that_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    assert required <= citation.keys()
    for name, entry in (("title", "name"), ("version", "version"), ("license", "license")):
        assert citation[name] == PROJECT[entry]
    assert citation["abstract"] == PROJECT["description"]


def test_the_changelog_has_this_version_and_every_renamed_field():
    assert f"## {PROJECT['version']} " in CHANGELOG
    renamed = dict(re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", CHANGELOG, re.MULTILINE))
    assert renamed == RENAMED_FIELDS


def test_the_changelog_names_commands_and_fields_that_exist():
    text = CHANGELOG.partition("### Renamed fields")[0]
    commands = re.findall(r"`resjax (\w+)", text)
    assert commands
    assert set(commands) <= cli.COMMANDS.keys()
    fields = re.findall(r"`(model\.\w+)`", text)
    assert fields
    assert set(fields) <= FIELDS.keys()


def test_a_contributor_finds_the_tests_the_targets_and_the_files():
    for file in re.findall(r"tests/[\w/]+\.py", CONTRIBUTING):
        assert (ROOT / file).is_file(), file
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"make\s([a-z-]+)", CONTRIBUTING)
    assert set(named) - {"and"} <= set(targets)
    for file in re.findall(r"`((?:resjax|experiments|configs)/[\w/]*(?:\.py)?)`", CONTRIBUTING):
        assert (ROOT / file).exists(), file
    test = (ROOT / "tests" / "models" / "test_conformance.py").read_text()
    assert re.search(r"def test_\w*keywords", test)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one_that_github_accepts(path):
    form = yaml.safe_load(path.read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    ids = [entry["id"] for entry in form["body"]]
    assert len(ids) == len(set(ids)) > 2
    for entry in form["body"]:
        assert entry["type"] == "textarea"
        assert entry.keys() <= {"type", "id", "attributes", "validations"}
        assert entry["attributes"].keys() <= {"label", "description", "render"}
        assert entry["attributes"]["label"]
    assert any(entry.get("validations", {}).get("required") for entry in form["body"])
