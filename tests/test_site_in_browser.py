"""A browser shows every page of the documentation site.

`make test-docs` builds the site and tests it. The tests need Debian's packages chromium and
chromium-driver.
"""

import html
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from docs.make_pages import report_path, sweeps
from tests.browser import LOCAL, console, faults, requests, resize, serve, set_theme, settle, show

ROOT = Path(__file__).parents[1]
NAVIGATION = re.findall(r"[\w/]+(?=\.md$)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
REPORTS = [*map(report_path, sweeps())]
PAGES = [*(f"{name}.html" for name in NAVIGATION), *REPORTS]

pytestmark = pytest.mark.skipif(
    "RESJAX_TEST_SITE" not in os.environ,
    reason="needs RESJAX_TEST_SITE, the folder of a built site: make test-docs",
)


@pytest.fixture(scope="session")
def site() -> Path:
    """Returns the folder of the built site."""
    return ROOT / os.environ["RESJAX_TEST_SITE"]


def scheme(driver: Any) -> str:
    """Returns the color scheme of a page, "default" or "slate"."""
    return str(driver.execute_script("return document.body.dataset.mdColorScheme"))


def toggle_scheme(driver: Any) -> None:
    driver.execute_script("document.querySelector('label[for^=__palette]:not([hidden])').click()")


def test_the_site_has_the_pages_of_its_navigation(site: Path) -> None:
    built = {file.relative_to(site).as_posix() for file in site.rglob("*.html")}
    assert built == {*PAGES, "404.html"}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_fault_from_disk(driver: Any, site: Path, page: str) -> None:
    """Wide and narrow, light and dark: contrast, headings, descriptions, names, overflow."""
    show(driver, (site / page).as_uri())
    found = []
    for theme in ("light", "dark"):
        if theme == "dark":
            set_theme(driver, theme)
            if page not in REPORTS:
                toggle_scheme(driver)
                assert scheme(driver) == "slate"
        for width in (1400, 400):
            resize(driver, width)
            settle(driver)
            found += [f"{theme}, {width} pixels: {fault}" for fault in faults(driver)]
    assert found == []
    assert console(driver) == []
    assert [url for url in requests(driver) if not url.startswith(LOCAL)] == []


@pytest.mark.parametrize("page", ["index.html", "404.html"])
def test_a_served_page_has_no_fault(driver: Any, site: Path, page: str) -> None:
    with serve(site) as address:
        show(driver, address + page)
        assert faults(driver) == []
        assert console(driver) == []
        assert [url for url in requests(driver) if not url.startswith((address, "data:"))] == []


@cache
def anchors(file: Path) -> set[str]:
    return set(map(html.unescape, re.findall(r'\s(?:id|name)="([^"]+)"', file.read_text())))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_an_anchor(site: Path, page: str) -> None:
    file = site / page
    links = re.findall(r'<a\s[^>]*?href="([^"]*)"', file.read_text())
    broken = []
    for link in map(html.unescape, links):
        if re.match(r"https?:|data:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize(("theme", "name"), [("light", "default"), ("dark", "slate")])
def test_a_first_visit_has_the_scheme_that_the_system_prefers(
    driver: Any, site: Path, theme: str, name: str
) -> None:
    show(driver, (site / "index.html").as_uri(), theme=theme)
    assert scheme(driver) == name


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize(
    ("query", "target"),
    [
        ("model.branch_scale", "reference/config.html#model.branch_scale"),
        ("resjax.load_runs", "reference/api.html#resjax.load_runs"),
        ("resjax.tasks.base.Task", "reference/api.html#resjax.tasks.base.Task"),
        ("resjax sweep", "reference/commands.html#resjax-sweep"),
    ],
)
def test_search_finds_the_reference_of_a_name_first(
    driver: Any, site: Path, query: str, target: str, served: bool
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    with serve(site) as address:
        show(driver, f"{address if served else f'{site.as_uri()}/'}story.html")
        driver.execute_script("document.querySelector('[data-md-toggle=search]').click()")
        driver.find_element(By.CSS_SELECTOR, ".md-search__input").send_keys(query)
        # The first result is the page, below it are its sections.
        links = "return [...document.querySelectorAll('.md-search-result__link')].map(a => a.href)"
        page, anchor = target.split("#")
        expected = re.compile(rf"/{page}(\?.*)?#{anchor}$")
        WebDriverWait(driver, 20).until(
            lambda driver: any(map(expected.search, driver.execute_script(links)[:2])),
            f"the page or its first section is not {target}",
        )
        assert console(driver) == []
