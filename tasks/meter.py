"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere.

python -c "from tasks.meter import meter
with meter('records', 3) as advance: [advance(n, n) for n in range(4)]"
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 10.0
REDRAW_EVERY_S = 0.1

Advance = Callable[[int, float], None]
"""advance(items done, work done): work is in the unit of `total`, from which the time left follows."""


@contextmanager
def meter(items: str, total: float, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """Show how many `items` are done, how many a second, and how long the rest of `total` will take."""
    start = clock()
    last = [0, 0.0]

    def status(done: int, work: float) -> str:
        elapsed = max(clock() - start, 1e-9)
        left = f", {elapsed * (total - work) / work:,.0f} s left" if 0 < work < total else ""
        return f"{done:,} {items}, {done / elapsed:,.0f}/s{left}"

    with _bar(total) if sys.stderr.isatty() else _lines(clock) as show:

        def advance(done: int, work: float) -> None:
            last[:] = [done, work]
            show(lambda: status(done, work), work, False)

        yield advance
        show(lambda: status(int(last[0]), float(total)), total, True)


@contextmanager
def _lines(clock: Callable[[], float]) -> Iterator[Callable[[Callable[[], str], float, bool], None]]:
    shown = clock()

    def show(status: Callable[[], str], work: float, end: bool) -> None:
        nonlocal shown
        if end or clock() - shown >= LINE_EVERY_S:
            shown = clock()
            print(status(), file=sys.stderr, flush=True)

    yield show


@contextmanager
def _bar(total: float) -> Iterator[Callable[[Callable[[], str], float, bool], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, shown = progress.add_task("", total=max(total, 1)), 0.0

        def show(status: Callable[[], str], work: float, end: bool) -> None:
            nonlocal shown
            if end or time.monotonic() - shown >= REDRAW_EVERY_S:
                shown = time.monotonic()
                progress.update(task, completed=max(work, 1) if end else work, description=status())

        yield show
