"""How far a run is, told on a terminal by a bar and elsewhere by plain lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TextIO


class Progress(NamedTuple):
    """A run at a step; `metrics` holds the latest known, such as train_error and test_error."""

    step: int
    steps: int
    metrics: dict[str, float]
    images_per_second: float


Listener = Callable[[Progress], None]
Warn = Callable[[str], None]


def print_warning(text: str) -> None:
    """Tells of what a run survives."""
    print(f"resjax: warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def console(stream: TextIO = sys.stdout, every: float = 10.0) -> Iterator[Listener]:
    """A listener that draws a bar with rate and time left; no terminal gets a line now and then.

    Args:
      stream: where to.
      every: seconds between two plain lines, at least.
    """
    if stream.isatty():
        with _bar(stream) as listener:
            yield listener
        return
    start, last = time.monotonic(), -every
    origin: tuple[int, float] | None = None  # a run that goes on has steps behind it

    def line(progress: Progress) -> None:
        nonlocal last, origin
        elapsed = time.monotonic() - start
        origin = origin or (progress.step, elapsed)
        if elapsed - last < every and progress.step < progress.steps:
            return
        last = elapsed
        print(
            f"step {progress.step}/{progress.steps}  {describe(progress)}  "
            f"{elapsed:.0f} s, {_left(progress, elapsed, *origin)} left",
            file=stream,
            flush=True,
        )

    yield line


def describe(progress: Progress) -> str:
    """`train error 12.3 %  test error 14.0 %  5,120 images/s`."""
    errors = [
        f"{name.replace('_', ' ')} {100 * value:.2f} %"
        for name, value in progress.metrics.items()
        if name.endswith("error")
    ]
    return "  ".join([*errors, f"{progress.images_per_second:,.0f} images/s"])


def _left(progress: Progress, elapsed: float, since: int, start: float) -> str:
    """Time left, at the rate from the first that was told."""
    if progress.step == since:
        return "?"
    rate = (elapsed - start) / (progress.step - since)
    return f"{rate * (progress.steps - progress.step):.0f} s"


@contextmanager
def _bar(stream: TextIO) -> Iterator[Listener]:
    from rich import progress as rich  # 0.1 s
    from rich.console import Console

    columns = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn())
    with rich.Progress(
        *columns, rich.TextColumn("{task.description}"), console=Console(file=stream)
    ) as bar:
        task = bar.add_task("compiling", total=None)

        def draw(progress: Progress) -> None:
            bar.update(
                task,
                total=progress.steps,
                completed=progress.step,
                description=describe(progress),
            )

        yield draw
