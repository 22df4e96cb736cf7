"""`longview doctor`: is this machine fit to run, and if not, what to do.

longview doctor
"""

from __future__ import annotations

import typer

STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


def doctor() -> None:
    """Check versions, threads, disk, memory, GPU, parameters and servers; say what to do about each problem.

    Exit status 1 if something would keep the pipeline from running.

    Example:

        longview doctor
    """
    from rich.console import Console
    from rich.markup import escape

    from flows.checks import examine
    from flows.environment import root

    console, blocked = Console(soft_wrap=True), False
    for finding in examine(root()):
        blocked |= finding.level == "problem"
        style = STYLES[finding.level]
        console.print(f"[{style}]{finding.level:8}[/] {finding.subject:12} {escape(finding.text)}")
        if finding.advice:
            console.print(f"{'':21} {escape(finding.advice)}", style=style)
    raise typer.Exit(1 if blocked else 0)
