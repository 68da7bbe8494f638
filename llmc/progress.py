"""Progress of long work: events to a callable, or a bar on stderr."""

from collections.abc import Callable
from contextlib import contextmanager

# progress(stage, done): stage is a short verb phrase, done goes from 0.0 to 1.0 within it.
Progress = Callable[[str, float], None]


def _silent(stage: str, done: float) -> None:
    """Nobody asked."""


@contextmanager
def reporting(progress: Progress | bool | None):
    """What compile calls with its progress: a given callable, a rich bar on stderr for True, or nothing."""
    if progress is None or progress is False:
        yield _silent
    elif progress is True:
        with _bar() as bar:
            yield bar
    else:
        yield progress


@contextmanager
def _bar():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(stage: str, done: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0)
            bars.update(tasks[stage], completed=done)

        yield report
