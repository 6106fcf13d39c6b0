"""The picture of a run's predictions shows its best and its worst images."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from resjax.run_files import Metric
from resjax.train import prediction_sheet
from resjax.train.prediction_sheet import FILE, SHOWN, Case, write_predictions

IMAGE, MASK = np.zeros((4, 4, 3), np.uint8), {"mask": np.zeros((4, 4), np.uint8)}


@pytest.fixture
def titles_of(monkeypatch, tmp_path):
    """A function from a metric and its value for each image to the titles of the columns."""

    def titles_of(metric, values):
        drawn = []
        cases = [Case(IMAGE, MASK, MASK, value, loss=0.0) for value in values]
        monkeypatch.setattr(prediction_sheet, "find_cases", lambda *_: cases)
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
        dataset = SimpleNamespace(class_names=("background", "digit"))
        task = SimpleNamespace(primary=metric, dataset=dataset)
        write_predictions(SimpleNamespace(task=task), None, tmp_path)
        columns = len(drawn[0].axes) // 2 if drawn else 0
        return [drawn[0].axes[column].get_title() for column in range(columns)]

    return titles_of


def test_the_best_images_come_first_and_the_worst_last(titles_of):
    miou = Metric("miou", lower_is_better=False, unit="fraction")
    titles = titles_of(miou, [0.25, 0.9, 0.5])
    assert titles == ["best: mIoU (%) 90.00", "worst: mIoU (%) 25.00"]


def test_a_low_value_is_the_best_of_a_metric_that_is_better_if_lower(titles_of):
    titles = titles_of(Metric("angle", unit="rad"), [0.25, 0.9])
    assert titles == ["best: angle (rad) 0.25", "worst: angle (rad) 0.9"]


def test_no_more_images_than_fit_are_shown(titles_of):
    titles = titles_of(Metric("loss"), range(100))
    assert len(titles) == 2 * SHOWN
    assert titles[0] == "best: loss 0"
    assert titles[SHOWN - 1 : SHOWN + 1] == ["best: loss 3", "worst: loss 99"]


def test_a_single_image_is_not_drawn(titles_of, tmp_path):
    assert titles_of(Metric("loss"), [1.0]) == []
    assert not (tmp_path / FILE).exists()


def test_of_equal_images_the_best_has_the_lowest_loss(monkeypatch, tmp_path):
    grays = 10, 20, 30
    cases = [
        Case(np.full_like(IMAGE, gray), MASK, MASK, 1.0, loss)
        for gray, loss in zip(grays, (0.5, 0.9, 0.1), strict=True)
    ]
    shown = []
    monkeypatch.setattr(prediction_sheet, "find_cases", lambda *_: cases)
    monkeypatch.setattr(
        prediction_sheet, "_drawn", lambda image, *_: shown.append(image[0, 0, 0]) or image
    )
    dataset = SimpleNamespace(class_names=("background", "digit"))
    task = SimpleNamespace(primary=Metric("ap", lower_is_better=False), dataset=dataset)
    write_predictions(SimpleNamespace(task=task), None, tmp_path)
    assert shown == [30, 30, 20, 20]  # truth and prediction of the best, then of the worst
