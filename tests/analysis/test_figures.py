"""Tests of figures: legible labels, honest deviations, reproducible files."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from resjax.analysis import figures as draw
from resjax.analysis import inline_svg
from resjax.analysis.inline_svg import drawings
from resjax.analysis.runs import load_curves, load_runs
from resjax.run_files import Metric

Maker = Callable[..., Path]

places = st.lists(st.floats(0, 1, allow_subnormal=False), max_size=12)


@given(places, st.floats(0.001, 0.3))
def test_labels_never_overlap_and_stay_inside(values: list[float], gap: float) -> None:
    moved = np.sort(draw.spread_apart(values, gap))
    room = min(gap, 1 / max(len(values) - 1, 1))
    assert (np.diff(moved) >= room - 1e-9).all()
    assert ((moved >= -1e-9) & (moved <= 1 + 1e-9)).all()


@given(places, st.floats(0.001, 0.3))
def test_labels_keep_the_order_of_their_lines(values: list[float], gap: float) -> None:
    moved = draw.spread_apart(values, gap)
    for above, below in pairwise(np.argsort(values, kind="stable")):
        assert moved[above] <= moved[below] + 1e-9


@given(places, st.floats(0.001, 0.3))
def test_labels_without_overlap_are_not_moved(values: list[float], gap: float) -> None:
    moved = draw.spread_apart(values, gap)
    again = draw.spread_apart(moved, gap)
    np.testing.assert_allclose(again, moved, atol=1e-9)


def test_two_equal_labels_move_equally_far() -> None:
    np.testing.assert_allclose(draw.spread_apart([0.5, 0.5], 0.2), [0.4, 0.6])


def test_larger_numbers_are_darker() -> None:
    palette = draw.colors([110, 20, 56])
    light = [sum(to_rgb(palette[depth])) for depth in (20, 56, 110)]
    assert light == sorted(light, reverse=True)
    assert len(set(light)) == 3


def test_more_names_than_qualitative_colors_still_differ() -> None:
    names = [f"block {index}" for index in range(12)]
    assert len(set(draw.colors(names).values())) == 12


def curve(folder: str, errors: list[float], loss: float = 1.0) -> pd.DataFrame:
    steps = np.arange(1, len(errors) + 1) * 10
    return pd.DataFrame({"folder": folder, "step": steps, "loss": loss, "error": errors})


def test_seeds_are_averaged_at_each_step() -> None:
    mean = draw.average_curves(pd.concat([curve("a", [0.4, 0.2]), curve("b", [0.6, 0.4])]), "error")
    np.testing.assert_array_equal(mean.step, [10, 20])
    np.testing.assert_allclose(mean.mean, [0.5, 0.3])
    np.testing.assert_allclose(mean.deviation, np.sqrt([0.02, 0.02]))


def test_a_run_that_stopped_early_is_not_averaged() -> None:
    mean = draw.average_curves(pd.concat([curve("a", [0.4, 0.2]), curve("b", [0.9])]), "error")
    np.testing.assert_allclose(mean.mean, [0.4, 0.2])
    assert [run["value"].tolist() for run in mean.stopped] == [[0.9]]


def test_a_diverged_run_is_drawn_up_to_its_last_finite_value() -> None:
    lost = curve("b", [0.5, 0.9, 0.9])
    lost.loc[1:, "loss"] = np.nan
    mean = draw.average_curves(pd.concat([curve("a", [0.4, 0.2, 0.1]), lost]), "error")
    np.testing.assert_allclose(mean.mean, [0.4, 0.2, 0.1])
    assert [run["value"].tolist() for run in mean.diverged] == [[0.5]]


def crosses(figure: Figure) -> list[list[float]]:
    """Returns where a figure has crosses, as (step, value)."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "x"]
    return [[float(number) for number in line.get_xydata()[0]] for line in lines]


@pytest.mark.parametrize("first", [1, 21])
def test_a_legend_that_has_a_cross_is_true(make_sweep: Maker, first: int) -> None:
    """The run diverges at its first measurement, or at a value beyond the axes."""
    root = make_sweep(depths=(8,), shortcuts=("pad",), points=40)
    metrics = root / "runs" / "depth8-pad-seed0" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lost = [
        line | ({"loss": None} if i >= 2 * first - 2 else {"error": 0.9})
        for i, line in enumerate(lines)
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lost))
    figure = drawn(root)
    assert "diverged run" in [text.get_text() for text in figure.legends[0].get_texts()]
    top = figure.axes[0].get_ylim()[1]
    step = 10 if first == 1 else 200
    assert top < 0.5
    assert crosses(figure) == [[step, pytest.approx(top)]] * 2


def test_a_run_that_stopped_because_it_diverged_ends_in_a_cross_in_both_splits(
    make_sweep: Maker,
) -> None:
    root = make_sweep(depths=(8,), shortcuts=("pad",), depth8_pad_seed0={"stop": 0.5})
    run = root / "runs" / "depth8-pad-seed0"
    (run / "diverged.json").write_text('{"step": 210, "reason": ""}')
    figure = drawn(root)
    assert [step for step, _ in crosses(figure)] == [200, 200]
    assert [text.get_text() for text in figure.legends[0].get_texts()][2:] == ["diverged run"]


def test_the_mean_of_no_measurements_is_empty() -> None:
    mean = draw.average_curves(curve("a", []), "error")
    assert not len(mean.step)
    assert not mean.stopped
    assert not mean.diverged


def drawn(root: Path) -> Figure:
    runs = load_runs(root)
    columns = runs[["folder", "model.shortcut", "model.depth"]]
    curves = load_curves(runs).merge(columns, on="folder")
    with draw.style():
        return draw.error_curves(curves, panel="model.shortcut", series="model.depth")


def test_each_network_has_a_panel_and_each_depth_a_label(make_sweep: Maker) -> None:
    figure = drawn(make_sweep())
    assert [axes.get_title("left") for axes in figure.axes] == ["none", "pad"]
    for axes in figure.axes:
        assert sorted(text.get_text() for text in axes.texts) == ["20", "56", "8"]


def test_a_text_from_the_data_is_drawn_as_it_is_and_short() -> None:
    figure = Figure()
    text = figure.text(0, 0, draw.plain(r"$\frac{1}{2}$"))
    figure.draw_without_rendering()
    assert text._preprocess_math(text.get_text()) == (r"$\frac{1}{2}$", False)
    assert draw.plain("a" * 50 + "b" * 50) == "a" * 30 + "…" + "b" * 30
    assert draw.plain("\x1b[31m") == r"\x1b[31m"


def test_labels_do_not_overlap_on_paper(make_sweep: Maker) -> None:
    figure = drawn(make_sweep(depths=(20, 32, 44, 56, 110)))
    figure.draw_without_rendering()
    for axes in figure.axes:
        # The extent of an annotation would include its leader line.
        boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda b: b.y0)
        assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_a_figure_shows_the_primary_metric_of_its_runs(make_tasks: Maker) -> None:
    root = make_tasks()
    accuracy, angle = drawn(root / "accuracy").axes[0], drawn(root / "angle").axes[0]
    assert accuracy.get_ylabel() == "accuracy (%)"
    assert angle.get_ylabel() == "angle (rad)"
    assert accuracy.get_ylim()[1] == pytest.approx(1, abs=0.02)
    assert angle.get_ylim()[0] == pytest.approx(0, abs=0.02)
    formatter = accuracy.yaxis.get_major_formatter()
    assert formatter(0.9, None) == "90"


def test_runs_with_several_primary_metrics_need_a_choice(make_tasks: Maker) -> None:
    curves = load_curves(make_tasks()).assign(panel="all")
    with pytest.raises(ValueError, match="several primary metrics: accuracy, angle; choose one"):
        draw.error_curves(curves, panel="panel", series="folder")
    chosen = draw.metric_curves(curves, "angle", panel="panel", series="primary_metric").axes[0]
    assert [text.get_text() for text in chosen.texts] == ["angle"]
    losses = draw.metric_curves(curves, "loss", panel="panel", series="primary_metric").axes[0]
    assert losses.get_ylabel() == "loss"
    assert {text.get_text() for text in losses.texts} == {"accuracy", "angle"}


def test_a_split_without_a_loss_has_not_diverged(make_run: Maker) -> None:
    folder = make_run("run", {"points": 5})
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [
        {k: v for k, v in line.items() if (k, line["split"]) != ("loss", "test")} for line in lines
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    [legend] = drawn(folder).legends
    assert [text.get_text() for text in legend.get_texts()] == ["test", "training"]


def test_seeds_have_a_band_and_a_single_seed_has_none(make_sweep: Maker, tmp_path: Path) -> None:
    assert all(axes.collections for axes in drawn(make_sweep(points=5)).axes)
    (tmp_path / "sweep").rename(tmp_path / "done")
    assert not any(axes.collections for axes in drawn(make_sweep(seeds=(0,))).axes)


def test_a_caption_says_what_a_band_is_and_of_how_many_seeds(make_sweep: Maker) -> None:
    lost = {"depth8_pad_seed1": {"diverge": 0.5}}
    caption = draw.caption(drawn(make_sweep(depths=(8,), shortcuts=("none", "pad"), **lost)))
    assert "means over 2 to 3 seeds, bands one sample standard deviation" in caption
    assert "Dashed lines are single runs" in caption


def test_a_caption_says_over_how_many_steps_training_values_are_means(make_sweep: Maker) -> None:
    curves = load_curves(make_sweep(depths=(8,), points=4)).assign(panel="", series="")
    every = curves.loc[curves["split"] == "train", "step"].min()

    def caption() -> str:
        return draw.caption(draw.metric_curves(curves, panel="panel", series="series"))

    assert f"means over the last {every} steps, in training mode" in caption()
    curves.loc[curves["folder"] == curves["folder"].iloc[0], "step"] *= 2
    assert "means over the last train.log_every steps, in training mode" in caption()


def test_a_page_shows_a_figure_of_too_many_lines_as_a_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def html() -> str:
        figure, [axes] = draw.panels(1)
        for slope in range(50):
            axes.plot(np.arange(20), slope * np.arange(20) % 7)
        return drawings(figure, "a", "Lines <of> it.")

    assert html().count("<svg") == 2  # wide and narrow
    monkeypatch.setattr(inline_svg, "LARGEST", 20_000)
    shown = html()
    assert shown.count('<img src="data:image/png;base64,') == 1
    assert 'alt="Lines &lt;of&gt; it."' in shown
    assert "<svg" not in shown


def test_a_panel_has_no_labels_where_they_would_cover_each_other() -> None:
    for count in (draw.MOST_LABELS, draw.MOST_LABELS + 1):
        figure, [axes] = draw.panels(1)
        draw.label_ends(axes, [draw.LineEnd(1, y, f"line {y}", "#000000") for y in range(count)])
        written = count if count <= draw.MOST_LABELS else 0
        assert len(axes.texts) == written
        assert ("no labels" in draw.caption(figure)) == (not written)


def test_a_caption_of_single_runs_promises_no_band(make_sweep: Maker) -> None:
    caption = draw.caption(drawn(make_sweep(depths=(8,), seeds=(0,))))
    assert caption.startswith("Lines are single runs. Training values")


def test_the_caption_of_a_profile_counts_the_values_of_a_layer() -> None:
    table = pd.concat([layers(net=[1.0, 2.0])] * 3)
    assert "over 3 seeds, bands" in draw.caption(draw.layer_profile(table, "norm", series="series"))


def test_the_training_curve_is_of_the_whole_split_if_all_runs_have_it(make_sweep: Maker) -> None:
    curves = load_curves(make_sweep(depths=(8,), shortcuts=("pad",), points=5))
    whole = curves[curves["split"] == "train"].assign(split="train_set", error=0.02)
    whole = pd.concat([curves, whole]).assign(panel="", series="")
    for table, height in ((whole, 0.02), (whole[whole["folder"] != whole["folder"].iloc[0]], 0.02)):
        figure = draw.metric_curves(table, panel="panel", series="series")
        assert figure.axes[0].lines[0].get_ydata()[0] == pytest.approx(height)
        assert "whole training split" in draw.caption(figure)
    some = pd.concat([curves, whole.head(1)]).assign(panel="", series="")
    assert draw.training_split(some) == "train"


def test_one_column_may_name_panels_and_series(make_sweep: Maker) -> None:
    curves = load_curves(make_sweep(depths=(8,), shortcuts=("pad",), points=5)).assign(net="deep")
    axes = draw.metric_curves(curves, panel="net", series="net").axes[0]
    assert [text.get_text() for text in axes.texts] == ["deep"]


def test_panels_share_their_scale(make_sweep: Maker) -> None:
    left, right = drawn(make_sweep()).axes
    assert left.get_ylim() == right.get_ylim()


def test_the_legend_explains_failures_only_if_there_are_any(
    make_sweep: Maker, tmp_path: Path
) -> None:
    def explained(figure: Figure) -> list[str]:
        return [text.get_text() for text in figure.legends[0].get_texts()]

    assert explained(drawn(make_sweep(points=5))) == ["test", "training"]
    (tmp_path / "sweep").rename(tmp_path / "done")
    failures = {"depth8_pad_seed0": {"stop": 0.5}, "depth8_pad_seed1": {"diverge": 0.5}}
    assert explained(drawn(make_sweep(**failures)))[2:] == ["unfinished run", "diverged run"]


@pytest.mark.parametrize(
    ("finals", "top"), [([0.06, 0.13], 0.2), ([0.9], 1.0), ([], 1.0), ([0.0], 0.01)]
)
def test_limits_show_where_errors_end(finals: list[float], top: float) -> None:
    limits = draw.metric_limits(finals, Metric("error", unit="fraction"))
    assert limits == (pytest.approx(-0.012 * top), top)


def test_limits_of_an_accuracy_mirror_those_of_the_error() -> None:
    limits = draw.metric_limits([0.87, 0.94], Metric("accuracy", False, "fraction"))
    assert limits == pytest.approx((0.8, 1.0024))


@pytest.mark.parametrize(
    ("finals", "metric", "limits"),
    [
        ([0.2, 0.4], Metric("angle", True, "rad"), (-0.0072, 0.6)),
        ([-3.0, 1.0], Metric("log likelihood", True, ""), None),
        ([25.0, 31.0], Metric("PSNR", False, "dB"), None),
        ([], Metric("angle", True, "rad"), None),
    ],
)
def test_limits_of_other_metrics_do_not_assume_a_range(
    finals: list[float], metric: Metric, limits: tuple[float, float] | None
) -> None:
    found = draw.metric_limits(finals, metric)
    assert found == (limits and pytest.approx(limits))


def test_saved_figures_are_reproducible_and_embed_their_fonts(
    make_sweep: Maker, tmp_path: Path
) -> None:
    root = make_sweep(points=5)
    first = [path.read_bytes() for path in draw.save(drawn(root), tmp_path / "a" / "error")]
    second = [path.read_bytes() for path in draw.save(drawn(root), tmp_path / "b" / "error")]
    assert first == second
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "error.pdf",
        "error.png",
        "error.svg",
    ]
    # The second file is the PDF; its date may be the same in both by chance.
    assert b"/CreationDate" not in first[1]
    assert b"/Type3" not in first[1]


def layers(**values: list[float]) -> pd.DataFrame:
    """Returns a table with the values of one diagnostic in the layers of each series."""
    tables = [
        pd.DataFrame({"folder": "run", "step": 10, "series": series, "norm": norms})
        for series, norms in values.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    return table.assign(layer=[f"block{index}/kernel" for index in table.index])


def test_a_profile_has_a_line_per_series_from_the_first_layer_of_its_network() -> None:
    table = layers(shallow=[1, 2], deep=[8, 4, 2])
    axes = draw.layer_profile(table, "norm", series="series", label="{} network").axes[0]
    shown = {line.get_color(): line.get_xydata().tolist() for line in axes.lines}
    assert list(shown.values()) == [[[0, 1], [1, 2]], [[0, 8], [1, 4], [2, 2]]]
    assert [text.get_text() for text in axes.texts] == ["shallow network", "deep network"]
    assert axes.get_ylabel() == "norm"


def test_a_profile_averages_seeds_and_omits_values_without_a_logarithm() -> None:
    table = layers(net=[1, 0, 4, np.nan])
    table = pd.concat([table, table.assign(folder="other", norm=3 * table["norm"])])
    axes = draw.layer_profile(table, "norm", log=True).axes[0]
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_xydata().tolist() == [[0, 2], [2, 8]]
    assert [text.get_text() for text in axes.texts] == ["10"]
    assert axes.collections  # the band of one standard deviation


def test_labels_are_beside_line_ends_on_a_logarithmic_axis() -> None:
    figure = draw.layer_profile(
        layers(low=[1, 1], high=[1, 100]), "norm", series="series", log=True
    )
    low, high = (text.get_position()[1] for text in figure.axes[0].texts)
    assert (low, high) == pytest.approx((0.045, 0.955), abs=0.02)


def test_the_style_ends_with_its_context() -> None:
    before = dict(matplotlib.rcParams)
    with draw.style():
        assert matplotlib.rcParams["pdf.fonttype"] == 42
    assert dict(matplotlib.rcParams) == before
