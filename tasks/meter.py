"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere.

python -c "from tasks.meter import meter
with meter('records', 3) as advance: [advance(n, n) for n in range(4)]"
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_EVERY_S = 10.0
REDRAW_EVERY_S = 0.1


class Advance(Protocol):
    """advance(items done, work done, more to say): work is in the unit of `total`, from which the time left
    follows."""

    def __call__(self, done: int, work: float, said: str = "") -> None: ...


@contextmanager
def meter(items: str, total: float, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """Show how many `items` are done, how many a second, and how long the rest of `total` will take: at the
    rate since the first were done, which may have taken long (loading, many under way at once)."""
    start = clock()
    last: tuple[int, str] = (0, "")
    first: list[float] = []

    def status(done: int, work: float, said: str) -> str:
        now = clock()
        rate = done / max(now - start, 1e-9)
        left = ""
        if first and first[1] < work < total:
            left = f", {(now - first[0]) * (total - work) / (work - first[1]):,.0f} s left"
        return f"{done:,} {items}, {rate:,.{0 if rate >= 10 else 1}f}/s{left}{said and '; '}{said}"

    with _bar(total) if sys.stderr.isatty() else _lines(clock) as show:

        def advance(done: int, work: float, said: str = "") -> None:
            nonlocal last
            last = (done, said)
            if not first and work:
                first[:] = [clock(), work]
            show(lambda: status(done, work, said), work, False)

        yield advance
        show(lambda: status(last[0], float(total), last[1]), total, True)


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
