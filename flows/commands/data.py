"""`longview data`: your own questions and images as the source data, its versions, and the way back.

longview data import ~/receipts
longview data versions
longview data rollback run/20261123-1a2b3c4d
"""

from __future__ import annotations

import json
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from flows.data_versions import DataVersion, Difference

app = typer.Typer(help="The source data: bring your own, compare versions, go back.", no_args_is_help=True)

Source = Annotated[
    Path, typer.Argument(help="A folder with images and JSONL or LLaVA JSON, or one such file.")
]
Images = Annotated[Path | None, typer.Option("--images", help="Folder that image paths are relative to.")]
Share = Annotated[
    float, typer.Option("--max-bad-share", min=0, max=1, help="Share of unusable records allowed.")
]


@app.command("import")
def import_(source: Source, images: Images = None, max_bad_share: Share = 0.1) -> None:
    """Make a folder of questions and images the source data: checked, copied to data/, tracked in data.dvc.

    Records: JSON lines with `id`, `image` or `images`, `question`, `answer` (`choices`, `split` optional), or
    LLaVA-format JSON with `conversations`. What cannot be used is set aside with its reason.

    Examples:

        longview data import ~/receipts

        longview data import questions.jsonl --images ~/scans
    """
    from flows.environment import root
    from tasks import data_import

    source, images = source.expanduser().resolve(), images and images.expanduser().resolve()
    try:
        with chdir(root()):
            done = data_import.import_folder(source, root(), image_root=images, max_bad_share=max_bad_share)
            data_import.print_imported(done)
    except data_import.ImportRefused as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo("next: longview run")


@app.command()
def check(
    source: Annotated[Path | None, typer.Argument(help="What to look at; data/ if left out.")] = None,
    images: Images = None,
) -> None:
    """Look at data and change nothing: counts, problems, what would be set aside. Exit status 1 on errors.

    Examples:

        longview data check

        longview data check ~/receipts
    """
    from flows.environment import root
    from tasks import data_import

    try:
        report = data_import.check(source or root() / "data", image_root=images)
    except data_import.ImportRefused as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    data_import.print_report(report)
    raise typer.Exit(1 if report.errors else 0)


Json = Annotated[bool, typer.Option("--json", help="For other programs.")]


@app.command()
def versions(as_json: Json = False) -> None:
    """Every version of the data: since when, how much, and which runs and models were trained on it.

    Examples:

        longview data versions

        longview data versions --json
    """
    from flows import data_versions
    from flows.environment import root
    from flows.pipeline import PipelineError
    from flows.versions import VersionError

    try:
        found = data_versions.listing(root(), _note)
    except (VersionError, PipelineError) as error:
        _stop(error)
    if as_json:
        typer.echo(json.dumps([asdict(version) for version in found], indent=1))
        return
    if not found:
        typer.echo(
            "no data yet: `longview run` builds the embedded boards, `longview data import` takes yours"
        )
        return
    _show_versions(found)


def _show_versions(found: list[DataVersion]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("", "data", "since", "size", "records", "kind", box=None, pad_edge=False)
    table.add_column("runs", no_wrap=True)  # to be copied
    table.add_column("models", overflow="fold")
    for version in found:
        runs = [*version.runs[:2], *([f"{len(version.runs) - 2} more"] if len(version.runs) > 2 else [])]
        table.add_row(
            "*" if version.in_use else "",
            version.md5[:8],
            version.since[:10] if version.since else "no run yet",
            decimal(version.size) if version.size is not None else "?",
            f"{version.records:,}" if version.records is not None else "not in the cache",
            version.kind or "",
            "\n".join(runs),
            "unknown" if version.models is None else "\n".join(version.models),
        )
    console = Console()
    console.print(table)
    console.print("\n* in use; `longview data diff A B` compares two, `longview data rollback RUN` goes back")


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="A version: md5 or its beginning, a run, a git revision.")],
    after: Annotated[str | None, typer.Argument(help="Another one; what is in use if left out.")] = None,
    as_json: Json = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with figures and pictures here.")
    ] = None,
) -> None:
    """What is different between two versions of the data: records by id, answers, lengths, examples.

    Nothing of the working tree is touched; what the cache lacks comes from the remote.

    Examples:

        longview data diff 77562a

        longview data diff run/20261101-1a2b3c4d run/20261123-5e6f7a8b --json

        longview data diff 77562a --html diff.html
    """
    from flows import data_page, data_versions
    from flows.environment import root
    from flows.pipeline import PipelineError
    from flows.versions import VersionError

    base = root()
    try:
        one, other = data_versions.find(base, before), data_versions.find(base, after)
        found = data_versions.diff(base, one, other)
        if html:
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(data_page.page(base, found), encoding="utf-8")
            typer.echo(f"written: {html}", err=True)
    except (data_versions.DataVersionError, VersionError, PipelineError) as error:
        _stop(error)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
    else:
        _show_difference(found)


def _show_difference(found: Difference) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    one, other = found.before, found.after
    changed = ", ".join(f"{name} {count:,}" for name, count in found.changed.items() if name != "records")
    console.print(f"{one.md5[:8]} -> {other.md5[:8]}: {one.records:,} -> {other.records:,} records")
    console.print(
        f"added {found.added:,}, removed {found.removed:,}, changed {found.changed['records']:,}"
        + (f" ({changed})" if changed else "")
    )
    table = Table("", one.md5[:8], other.md5[:8], box=None, pad_edge=False)
    table.add_row("question, characters", f"{one.question_length:.1f}", f"{other.question_length:.1f}")
    table.add_row("answer, characters", f"{one.answer_length:.1f}", f"{other.answer_length:.1f}")
    for title, left, right in (("split", one.splits, other.splits), ("answer", one.answers, other.answers)):
        for name in dict.fromkeys([*left, *right]):
            table.add_row(
                f"{title} {escape(name[:40])}", *(f"{side.get(name, 0):,}" for side in (left, right))
            )
    console.print(table)
    for kind, examples in found.examples.items():
        for example in examples:
            console.print(f"\n[bold]{kind}[/] {escape(example['id'])} {escape(example['fields'])}")
            for label in ("before", "after"):
                record = example[label]
                if record:
                    text = f"{record.get('question')} -> {record.get('answer')}  {record.get('images')}"
                    console.print(f"  {label:7}{escape(text[:300])}")


@app.command()
def rollback(
    revision: Annotated[
        str, typer.Argument(help="A run's tag or id, `latest`, or the md5 of a data version.")
    ],
    with_code: Annotated[bool, typer.Option("--with-code", help="Restore what code differs, too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite unsaved work, after a copy.")] = False,
) -> None:
    """Go back to an earlier run: its data, derived sets and checkpoints. Nothing is trained again.

    Refused where something would be overwritten that is saved nowhere else. MLflow's champion stays.

    Examples:

        longview data rollback run/20261123-1a2b3c4d

        longview data rollback 77562a
    """
    from flows import restoring
    from flows.environment import root

    try:
        done = restoring.restore(root(), revision, with_code=with_code, force=force)
    except restoring.EXPECTED as error:
        _stop(error)
    typer.echo(restoring.summary(done))


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def _stop(error: Exception) -> NoReturn:
    typer.echo(f"\n{error}", err=True)
    raise typer.Exit(1) from None
