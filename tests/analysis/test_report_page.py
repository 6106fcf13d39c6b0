"""A browser shows the report: on wide and narrow screens, light and dark, from disk and served.

The tests need Debian's packages chromium and chromium-driver. CI installs them and requires the
tests; elsewhere they are skipped without them.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from resjax.analysis.report import write_report
from tests.analysis.conftest import write_sweep
from tests.browser import LOCAL, console, faults, requests, serve, show

EXPERIMENT = '''"""Plain networks degrade

He et al. 2015 claim it.

The runs are made up.
"""

from resjax.analysis import figures as draw
from resjax.analysis.claims import Claim
from resjax.analysis.final_values import by_depth


@draw.style()
def figures(runs, curves):
    kinds = {"none": "plain", "pad": "residual"}
    runs = runs.assign(network=runs["model.shortcut"].map(kinds))
    columns = runs[["folder", "network", "model.depth"]]
    drawn = draw.metric_curves(
        curves.merge(columns, on="folder"), panel="network", series="model.depth", label="{} layers"
    )
    return {"curves": drawn, "final_error": by_depth(runs, series="network")}


def claims(runs):
    return [Claim("Depth hurts", "He et al. 2015", "drawn", "made up", "agrees")]
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a report of 18 runs with a claim and diagnostics, of which two diverged or failed."""
    ends = {"depth8_pad_seed0": {"stop": 0.5}, "depth56_none_seed1": {"diverge": 0.5}}
    root = write_sweep(tmp_path_factory.mktemp("page") / "sweep", points=12, **ends)
    (root / "experiment.py").write_text(EXPERIMENT)
    for folder in (root / "runs").iterdir():
        lines = [
            {"step": step, "layer": f"{part}/kernel", "gradient_norm": 1 + step / 100 + i}
            for step in (0, 200, 400)
            for i, part in enumerate(("stem/Conv_0", "stage1/block1/Conv_0", "head/Dense_0"))
        ]
        (folder / "layers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    failure = {"launch": "1", "attempts": 1, "retry": False, "error": "OSError: no disk"}
    failure |= {"state": "failed", "time": "2026-01-05T10:00:00+00:00", "others": {}}
    (root / "runs" / "depth8-pad-seed0" / "error.json").write_text(json.dumps(failure))
    write_report(root)
    return root


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_has_no_fault_from_disk(driver: Any, root: Path, width: int, theme: str) -> None:
    show(driver, (root / "report.html").as_uri(), width, theme)
    assert faults(driver) == []
    assert driver.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == (
        theme == "dark"
    )
    assert console(driver) == []
    assert [url for url in requests(driver) if not url.startswith(LOCAL)] == []


def test_a_served_page_requests_itself_and_nothing_else(driver: Any, root: Path) -> None:
    with serve(root) as address:
        show(driver, f"{address}report.html")
        assert console(driver) == []
        sent = [url for url in requests(driver) if not url.startswith("data:")]
    assert sent == [f"{address}report.html"]


FAULTS = {
    "document.body.append(new Image())": "no alt text",
    "document.querySelector('h2').outerHTML = '<h4>deep</h4>'": "heading 4 after 1",
    "document.querySelector('p').style.color = '#888'": "contrast 3.54",
    "document.querySelector('p').style.opacity = 0.3": "contrast 1.",
    "document.querySelector('a').innerHTML = '<svg></svg>'": "control without a name",
    "document.querySelector('p').innerHTML = 'the <a href=\"#\">runs</a>';"
    "document.querySelector('p a').style.textDecoration = 'none'": "link known by its color alone",
    "document.querySelector('.themed text').style.fill = '#eee'": "contrast 1.16",
    "document.querySelector('h1').style.width = '3000px'": "horizontal overflow",
    "document.documentElement.lang = ''": "no language",
    "document.querySelector('p').style.fontSize = '6px'": "letters of 6.0 pixels",
    "document.querySelector('#log').parentElement.replaceWith(document.querySelector('#log'))": (
        "control without a name"
    ),
    "document.querySelector('#summary .scroll').tabIndex = -1;"
    "document.querySelector('#summary .scroll').style.width = '9rem'": "no key scrolls this",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_find_each_fault(driver: Any, root: Path, fault: str) -> None:
    show(driver, (root / "report.html").as_uri())
    driver.execute_script(fault)
    assert any(FAULTS[fault] in found for found in faults(driver))


def test_a_request_to_another_host_is_refused_and_noticed(
    driver: Any, root: Path, tmp_path: Path
) -> None:
    page = (root / "report.html").read_text()
    (tmp_path / "page.html").write_text(
        page.replace("</body>", '<img src="http://example.invalid/x.png" alt="x"></body>')
    )
    show(driver, (tmp_path / "page.html").as_uri())
    assert any("Content Security Policy" in message for message in console(driver))


def drawing(driver: Any) -> str:
    return str(driver.execute_script("return document.querySelector('#chart svg').outerHTML"))


def set_control(driver: Any, name: str, value: Any) -> None:
    """Sets a control as a user does, with the events of a browser."""
    key = "checked" if isinstance(value, bool) else "value"
    driver.execute_script(
        f"const node = document.getElementById('{name}'); node.{key} = arguments[0];"
        "for (const kind of ['input', 'change']) node.dispatchEvent(new Event(kind))",
        value,
    )


@pytest.fixture
def chart(driver: Any, root: Path) -> Any:
    show(driver, (root / "report.html").as_uri())
    return driver


def test_every_metric_can_be_chosen(chart: Any) -> None:
    keys = chart.execute_script("return [...document.getElementById('metric')].map(o => o.value)")
    assert keys[:3] == ["error", "loss", "learning_rate"]
    assert keys[3:] == ["gradient_norm/stem", "gradient_norm/stage1", "gradient_norm/head"]
    shown = set()
    for key in keys:
        set_control(chart, "metric", key)
        shown.add(drawing(chart))
    assert len(shown) == len(keys)
    assert "gradient norm, head" in drawing(chart)


def test_the_axis_can_be_logarithmic(chart: Any) -> None:
    set_control(chart, "metric", "loss")
    labels = "[...document.querySelectorAll('#chart text[text-anchor=end]')]"
    ticks = f"return {labels}.map((label) => Number(label.textContent))"
    linear = chart.execute_script(ticks)
    set_control(chart, "log", True)
    logarithmic = chart.execute_script(ticks)
    assert 0 in linear
    assert 0 not in logarithmic
    assert {0.2, 0.5, 1} <= set(logarithmic)


def test_smoothing_makes_curves_straighter(chart: Any) -> None:
    before = drawing(chart)
    set_control(chart, "smoothing", 0.9)
    assert drawing(chart) != before
    caption = chart.execute_script("return document.getElementById('chart-caption').textContent")
    assert "exponential moving averages with weight 0.9" in caption


def test_single_runs_appear_on_demand_and_failed_ones_always(chart: Any) -> None:
    count = "return document.querySelectorAll('#chart path.{}').length"
    assert chart.execute_script(count.format("mean")) == 12
    assert chart.execute_script(count.format("band")) == 12
    assert chart.execute_script(count.format("outside")) == 4
    assert chart.execute_script(count.format("cross")) == 2
    assert chart.execute_script(count.format("run")) == 0
    set_control(chart, "single", True)
    assert chart.execute_script(count.format("run")) == 2 * 16


def test_the_chart_explains_its_lines_and_bands(chart: Any) -> None:
    caption = chart.execute_script("return document.getElementById('chart-caption').textContent")
    assert "means over 2 to 3 seeds, bands one sample standard deviation" in caption
    assert "Dashed lines are single runs that no mean contains" in caption


def test_figures_and_curves_share_names_and_colors(chart: Any) -> None:
    found = chart.execute_script(
        """const looks = (nodes) => nodes.map((n) => n.textContent).sort();
        const figure = document.querySelector("#figures .wide svg");
        const texts = [...figure.querySelectorAll("text")];
        const labels = texts.filter((n) => / layers$/.test(n.textContent));
        const color = (node) => getComputedStyle(node).stroke;
        const strokes = (scope, css) => new Set([...scope.querySelectorAll(css)].map(color));
        const lines = strokes(document.querySelector("#chart"), "path.mean");
        return [looks(labels), looks([...document.querySelectorAll("#chart .end")]),
          [...lines].every((color) => strokes(figure, "path").has(color)), lines.size,
          [...document.querySelectorAll("#chart .title")].map((n) => n.textContent)]"""
    )
    names, ends, drawn, colors, titles = found
    assert names == ends == sorted(["8 layers", "20 layers", "56 layers"] * 2)
    assert drawn
    assert colors == 3
    assert titles == ["plain", "residual"]


def test_keys_show_values_at_a_step(chart: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    chart.find_element(By.ID, "chart").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    tip = chart.find_element(By.ID, "tip").text
    assert tip.startswith("step 66\n")
    assert "56 layers, test: " in tip


@pytest.mark.parametrize(
    ("kind", "begin"), [("CSV", "line,run,"), ("SVG", "<svg"), ("PNG", "\x89PNG")]
)
def test_the_chart_can_be_downloaded(chart: Any, kind: str, begin: str) -> None:
    content = chart.execute_async_script(
        """const [kind, done] = arguments;
        const make = URL.createObjectURL;
        URL.createObjectURL = (blob) => {
          const reader = new FileReader();
          reader.onload = () => done(reader.result);
          reader.readAsBinaryString(blob);
          return make(blob);
        };
        const buttons = [...document.querySelectorAll("#controls button")];
        buttons.find((each) => each.textContent === kind).click()""",
        kind,
    )
    assert content.startswith(begin)
    if kind == "CSV":
        assert '"plain, 56 layers","","test",400,' in content


@pytest.mark.parametrize("width", [1400, 400])
def test_the_primary_test_metric_comes_first_and_is_whole(
    driver: Any, root: Path, width: int
) -> None:
    show(driver, (root / "report.html").as_uri(), width)
    for table in ("summary", "runs"):
        head, right, edge = driver.execute_script(
            f"""const scroll = document.querySelector("#{table} .scroll");
            const cells = [...scroll.querySelectorAll("td:nth-child(2)")];
            return [scroll.querySelector("th:nth-child(2)").textContent,
              Math.max(...cells.map((cell) => cell.getBoundingClientRect().right)),
              scroll.getBoundingClientRect().right]"""
        )
        assert head == "test error (%)"
        assert right <= edge


def test_clicking_a_header_sorts_the_runs(chart: Any) -> None:
    values = chart.execute_script(
        """document.querySelector("#runs th:nth-child(2) button").click();
        return [...document.querySelectorAll("#runs td:nth-child(2)")].map((n) => n.textContent)"""
    )
    numbers = [float(value) for value in values if value != "–"]
    assert numbers == sorted(numbers)
    assert values[-1] == "–"


def test_a_report_of_eighteen_runs_is_small(root: Path) -> None:
    assert (root / "report.html").stat().st_size < 500_000
