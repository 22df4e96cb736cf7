"""`longview status` and `longview report`: where the pipeline stands and what came out of it.

longview status
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.pipeline import MISSING, UP_TO_DATE, StageState

STYLES = {"up to date": "green", "stale": "yellow", "missing": "red", "waits": "dim"}
TABLE, REPORT = Path("artifacts/compare/table.md"), Path("artifacts/report")


def status(
    why: Annotated[bool, typer.Option("--why", help="Say in full what changed.")] = False,
) -> None:
    """Every stage: up to date, stale (and why), missing, or waiting for one of those; data version; champion;
    what waits for approval.

    Examples:

        longview status

        longview status --why
    """
    from rich.console import Console
    from rich.table import Table

    from flows import data, pipeline
    from flows.environment import root

    base = root()
    try:
        stages, states = pipeline.stages(base), pipeline.states(base)
        source = pipeline.data_states(base).get(data.POINTER)
    except pipeline.PipelineError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    console = Console(soft_wrap=why)
    table = Table("stage", "state", "because", box=None, pad_edge=False)
    behind = {name for name, state in states.items() if state.state != pipeline.UP_TO_DATE}
    for stage in stages:
        state, because = _line(states[stage.name], sorted(stage.ancestors & behind), why)
        table.add_row(stage.name, f"[{STYLES[state]}]{state}[/]", because)
    console.print(table)
    console.print(f"\ndata      {data.version(base) or 'none'} ({_data(base, source)})")
    for line in _models(base):
        console.print(line, markup=False, highlight=False)


def _data(base: Path, source: StageState | None) -> str:
    """What is to be said of data/."""
    if source is None:
        return "no data.dvc"
    if source.state != UP_TO_DATE and not (base / "data").exists():
        return "not here yet: `longview run` brings or builds it"
    return source.state if source.state == UP_TO_DATE else f"{source.state}: {source.reason}"


def _line(state: StageState, waiting_for: list[str], why: bool) -> tuple[str, str]:
    if state.state == UP_TO_DATE:
        return ("waits", f"for {waiting_for[0]}") if waiting_for else (UP_TO_DATE, "")
    if state.state == MISSING and not why:
        return MISSING, "not made yet"
    return state.state, state.reason if why or len(state.reason) < 60 else state.reason[:59] + "…"


def _models(root: Path) -> list[str]:
    """The champion, and the candidate that waits for approval if one does."""
    from flows import registered
    from tasks import tracking

    if not tracking.enabled():
        return ["champion  unknown: tracking is off"]
    try:
        with registered.asking(root):
            registry = registered.registry(root)
            champion = registry.champion() if registry else None
            waiting = registry.waiting() if registry else None
    except registered.RegistryUnknown as error:
        return [f"champion  unknown: {error}"]
    made = f", {champion.tags.get('run', 'no run tag')}" if champion else ""
    lines = [f"champion  {champion.title}{made}" if champion else "champion  none yet"]
    if waiting and waiting.awaiting:
        until, default = waiting.awaiting.until[:16].replace("T", " "), waiting.awaiting.default
        lines.append(f"waits     {waiting.title}: `longview model approve --reason …`, or with --reject;")
        lines.append(f"          {default} if nobody decides before {until} UTC")
    return lines


def report() -> None:
    """Print the result table, and where the report with its figures is.

    Example:

        longview report
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from flows.environment import longview, root, server_url

    base = root()
    if not (base / TABLE).is_file():
        typer.echo(f"no results yet ({TABLE} is missing): `longview run`", err=True)
        raise typer.Exit(1)
    console, text = Console(), (base / TABLE).read_text(encoding="utf-8")
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text)
    found = [
        base / REPORT / name for name in ("report.html", "report.md") if (base / REPORT / name).is_file()
    ]
    for path in found:
        typer.echo(f"report   {path}")
    runs = server_url("mlflow", base) or f"`{longview()} up` shows every run in MLflow and Prefect"
    typer.echo(f"runs     {runs}")
    typer.echo(f"stages   {longview()} status")
