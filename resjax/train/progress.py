"""Reports the progress of a run: a bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from resjax.run_files import CLASSIFICATION_ERROR, Metric
from resjax.text import printable_lines


class Progress(NamedTuple):
    """The progress of a run at a step."""

    step: int
    steps: int
    metrics: dict[str, float]  # the latest, by names such as train_loss and test_error
    images_per_second: float
    primary: Metric = CLASSIFICATION_ERROR
    test_step: int | None = None  # of the latest evaluation


class TimeLeft:
    """Estimates the rest of a run from the steps that it has taken since the first report."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # a resumed run begins above step 0

    def __call__(self, progress: Progress) -> float | None:
        """Returns the seconds that are left; None at the first report."""
        step, now = progress.step, time.monotonic()
        first_step, start = self._first = self._first or (step, now)
        if step == first_step:
            return None
        return (progress.steps - step) * (now - start) / (step - first_step)


Listener = Callable[[Progress], None]
Warn = Callable[[str], None]


def print_warning(text: str) -> None:
    """Prints a warning about something that the run survives."""
    print(printable_lines(f"resjax: warning: {text}"), file=sys.stderr, flush=True)


@contextmanager
def console(stream: TextIO = sys.stdout, every: float = 10.0) -> Iterator[Listener]:
    """Yields a listener that draws a bar on a terminal, and prints lines to any other stream.

    Args:
      stream: to write to.
      every: minimum number of seconds between two lines; the last step always gets one.
    """
    if stream.isatty():
        with _bar(stream) as listener:
            yield listener
        return
    start, last, time_left = time.monotonic(), -every, TimeLeft()

    def print_line(progress: Progress) -> None:
        nonlocal last
        step, steps, elapsed = progress.step, progress.steps, time.monotonic() - start
        seconds = time_left(progress)
        if elapsed - last < every and step < steps:
            return
        last, left = elapsed, "?" if seconds is None else f"{seconds:.0f} s"
        line = f"step {step}/{steps}  {describe(progress)}  {elapsed:.0f} s, {left} left"
        print(line, file=stream, flush=True)

    yield print_line


def describe(progress: Progress) -> str:
    """Returns, for example, `train error 12.30 %  test error 14.00 %  5,120 images/s`.

    A test metric of an earlier step than the training metric has its step: `at step 400`.
    """
    metric = progress.primary
    unit = "%" if metric.unit == "fraction" else metric.unit
    earlier = progress.test_step not in (None, progress.step)
    when = {"train": "", "test": f" at step {progress.test_step}" if earlier else ""}
    values = [
        f"{split} {metric.title} {metric.format(value)} {unit}".rstrip() + when[split]
        for split in when
        if (value := progress.metrics.get(f"{split}_{metric.name}")) is not None
    ]
    if math.isfinite(progress.images_per_second):
        values.append(f"{progress.images_per_second:,.0f} images/s")
    return "  ".join(values)


@contextmanager
def _bar(stream: TextIO) -> Iterator[Listener]:
    from rich import progress as rich  # takes 0.1 s
    from rich.console import Console

    columns = (
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
    )
    with rich.Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task("compiling", total=None)

        def draw(progress: Progress) -> None:
            text = describe(progress)
            bar.update(task, total=progress.steps, completed=progress.step, description=text)

        yield draw
