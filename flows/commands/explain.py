"""`longview explain`: the whole chain behind a checkpoint or a file, and whether it still holds.

longview explain champion --verify
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

Name = Annotated[
    str,
    typer.Argument(
        help="A model (`champion`, `longview@champion`, `3`), a generation (`r2`, `base`), or a file.",
        metavar="MODEL|FILE",
    ),
]
At = Annotated[str | None, typer.Option("--at", help="As of this run version (`run/…`, `latest`).")]
Verify = Annotated[bool, typer.Option("--verify", help="Hash everything anew and compare all records.")]
Json = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]
Mermaid = Annotated[bool, typer.Option("--mermaid", help="A flowchart for Markdown.")]
Dot = Annotated[bool, typer.Option("--dot", help="A graph for Graphviz.")]
Full = Annotated[bool, typer.Option("--full", help="All parameters and code files.")]


def explain(
    name: Name,
    at: At = None,
    verify: Verify = False,
    as_json: Json = False,
    mermaid: Mermaid = False,
    dot: Dot = False,
    full: Full = False,
) -> None:
    """Where a model or a file came from: every stage, back to the data version.

    For each stage: its command, the parameters that it obeyed, the md5s of what it read and made, a digest
    of its code, and the run version, git commit and MLflow run in which it was executed. A registered model
    is found by the md5s of its checkpoints, whatever has been run since. Exit status 1 if --verify finds
    bytes or records that differ, or bytes that are neither here nor in the remote.

    Examples:

        longview explain champion

        longview explain r2 --at latest --full

        longview explain artifacts/rounds/r2/dpo --verify

        longview explain champion --json
    """
    from rich.console import Console

    from flows import lineage, lineage_view, versions
    from flows.environment import root
    from flows.objects import opened
    from flows.pipeline import PipelineError

    if sum((as_json, mermaid, dot)) > 1:
        raise typer.BadParameter("--json, --mermaid, --dot: one at a time")
    base = root()
    name = lineage.local_name(base, name)
    findings: list[Any] | None = None
    try:
        with opened(base) as objects:
            chain = lineage.explain(base, name, objects, at)
            if verify:
                findings = _verify(base, chain, objects)
    except (lineage.LineageError, versions.VersionError, PipelineError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(lineage_view.as_json(chain, findings))
    elif mermaid or dot:
        typer.echo(lineage_view.as_mermaid(chain) if mermaid else lineage_view.as_dot(chain))
    else:
        Console(soft_wrap=True, highlight=False).print(lineage_view.as_tree(chain, full=full))
    for note in chain.notes:
        typer.echo(f"note: {note}", err=True)
    if findings is not None:
        _report(findings, quiet=as_json or mermaid or dot)


def _verify(base: Any, chain: Any, objects: Any) -> list[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from flows import rehash

    columns = ("hashing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("hashing", total=rehash.bytes_of(chain, objects))
        return list(rehash.verify(base, chain, objects, lambda size: progress.advance(task, size)))


def _report(findings: list[Any], *, quiet: bool) -> None:
    """What is not as it should be line by line, all else as counts; ends the command with its status."""
    from collections import Counter

    from flows import rehash

    faults = [finding for finding in findings if finding.state in rehash.FAULTS]
    if not quiet:
        counts = Counter((finding.where, finding.state) for finding in findings)
        typer.echo("")
        for (where, state), number in counts.items():
            typer.echo(f"{where:10} {number:4} {state}")
        away = [f for f in findings if f.state in (rehash.AWAY, rehash.UNKNOWN) and f.where != "workspace"]
        for finding in away:
            typer.echo(f"{finding.state}: {finding.where} {finding.path}: {finding.detail}")
    for finding in faults:
        typer.echo(f"{finding.state.upper()}: {finding.where} {finding.path}: {finding.detail}", err=True)
    if faults:
        raise typer.Exit(1)
    if not quiet:
        typer.echo("verified: nothing differs")
