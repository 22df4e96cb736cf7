"""`longview compare`: generations and runs side by side, and the questions that flipped.

longview compare
longview compare run/20261101-1a2b3c4d latest --markdown -
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from tasks.side_by_side import Comparison, Generation

Runs = Annotated[list[str] | None, typer.Argument(help="Tags or ids of runs, git revisions, `latest`.")]
Rounds = Annotated[bool, typer.Option("--rounds", help="Every round of each run.")]
Markdown = Annotated[str | None, typer.Option("--markdown", help="A file for a pull request; - prints it.")]
Html = Annotated[
    Path | None, typer.Option("--html", help="Write a page here: the table, and the questions that flipped.")
]
Between = Annotated[
    tuple[str, str] | None, typer.Option("--between", help="The two generations of the page, as `r1 r3`.")
]
Json = Annotated[bool, typer.Option("--json", help="For other programs.")]


def compare(
    runs: Runs = None,
    rounds: Rounds = False,
    markdown: Markdown = None,
    html: Html = None,
    between: Between = None,
    as_json: Json = False,
) -> None:
    """Put generations side by side: accuracy, paired differences, rewards, pairs, lengths, data.

    Without runs, the generations of this checkout; with runs, the best generation of each.

    Examples:

        longview compare

        longview compare run/20261101-1a2b3c4d latest --rounds

        longview compare --markdown - > comparison.md

        longview compare --html flips.html --between r1 r3
    """
    from flows import compare as comparing
    from flows.environment import root
    from flows.pipeline import PipelineError
    from flows.versions import VersionError
    from tasks import side_by_side

    try:
        found = comparing.make(root(), runs or [], rounds=rounds, unknown=_note)
        if html:
            _write_page(found, html, between)
    except (comparing.CompareError, VersionError, PipelineError) as error:
        _stop(error)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    elif markdown == "-":
        typer.echo(side_by_side.markdown(found))
    else:
        _show(found)
    if markdown and markdown != "-":
        Path(markdown).write_text(side_by_side.markdown(found) + "\n", encoding="utf-8")
        typer.echo(f"written: {markdown}")


def _show(found: Comparison) -> None:
    """A table a person reads: a generation a column, since there are more figures than generations."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tasks.side_by_side import table

    head, *rows = table(found)
    shown = Table(*map(escape, head), box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*map(escape, row))
    console = Console()
    console.print(shown)
    console.print(f"\n{found.verdict}")
    if found.champion:
        console.print(f"champion: {found.champion}")


def _write_page(found: Comparison, path: Path, between: tuple[str, str] | None) -> None:
    from flows import pictures
    from flows.compare import CompareError
    from flows.environment import root
    from tasks import flips, side_by_side

    every = [row.generation for row in found.rows]
    if between:
        before, after = (_named(every, name) for name in between)
    else:
        pair = side_by_side.flipped(found.rows)
        if pair is None:
            raise CompareError(
                "there are no two generations with answers: name two runs, `--rounds`, or `dvc pull`"
            )
        before, after = pair
    for generation in (before, after):
        if not generation.rows:
            raise CompareError(f"the answers of {generation.title} are not to be had: `dvc pull`")
    changed = flips.flips(before.rows, after.rows)
    with pictures.source(root(), after.data) as source:
        page = flips.page(changed, before.title, after.title, source, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    typer.echo(f"{len(changed.won)} won, {len(changed.lost)} lost: {path}", err=True)


def _named(every: list[Generation], name: str) -> Generation:
    from flows.compare import CompareError

    found = [generation for generation in every if name in (generation.name, generation.title)]
    if len(found) != 1:
        known = ", ".join(generation.title for generation in every)
        raise CompareError(f"--between {name}: {len(found)} generations of that name; there are: {known}")
    return found[0]


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def _stop(error: Exception) -> NoReturn:
    typer.echo(f"\n{error}", err=True)
    raise typer.Exit(1) from None
