"""`longview gc`: what could be deleted, and with --yes its deletion.

longview gc --keep-runs 5
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

KeepRuns = Annotated[int, typer.Option("--keep-runs", min=1, help="How many of the newest runs stay.")]
KeepDays = Annotated[float, typer.Option("--keep-days", min=0, help="Every run stays for so many days.")]
Remote = Annotated[str | None, typer.Option("--remote", help="Delete from this DVC remote, too.")]
Also = Annotated[
    list[Path] | None,
    typer.Option("--also", help="Another checkout on the same cache or remote; repeatable."),
]
Shared = Annotated[
    bool, typer.Option("--shared", help="Every checkout on a shared cache was named by --also.")
]
Failed = Annotated[
    bool, typer.Option("--failed-runs", help="Delete old failed runs of stages from MLflow, too.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Delete. Without it, only show.")]
Pin = Annotated[str | None, typer.Option("--pin", help="Keep this run whatever the policy says, and end.")]
Unpin = Annotated[str | None, typer.Option("--unpin", help="Leave this run to the policy again, and end.")]


def gc(
    keep_runs: KeepRuns = 10,
    keep_days: KeepDays = 30.0,
    remote: Remote = None,
    also: Also = None,
    shared: Shared = False,
    failed_runs: Failed = False,
    pin: Pin = None,
    unpin: Unpin = None,
    yes: Yes = False,
) -> None:
    """Show what could be deleted; with --yes delete it.

    A run stays if it is one of the newest, young, pinned, what the workspace is, or trained a version that
    has an alias or was champion once. Also kept: whatever the workspace, a branch, a tag of yours or a
    worktree needs, and data that an import replaced in these days. Refused while a run is alive in this
    checkout, in a worktree or in one that --also names, and where it cannot be known what something kept
    needs.

    Examples:

        longview gc

        longview gc --keep-runs 5 --keep-days 7 --yes

        longview gc --remote local

        longview gc --pin run/20261123-1a2b3c4d
    """
    from flows import checkouts, recovery, retention, versions
    from flows import gc as collector
    from flows.environment import root
    from flows.pipeline import PipelineError

    base = root()
    policy = retention.Policy(keep_runs, keep_days)
    others = [path.expanduser() for path in also or []]
    options: dict[str, Any] = {"remote": remote, "shared": shared, "failed_runs": failed_runs}
    try:
        if pin or unpin:
            version = retention.pin(base, pin) if pin else retention.unpin(base, str(unpin))
            typer.echo(f"{version.tag}: {'pinned' if pin else 'no longer pinned'}")
            return
        with checkouts.held(base, others, alone=yes) as projects:
            plan = collector.plan(base, projects, policy, **options)
            _show(plan)
            if yes:
                collector.carry_out(base, projects, plan, remote=remote)
        typer.echo("deleted" if yes else "nothing was deleted: the same with --yes deletes")
    except (
        checkouts.GcRefused,
        recovery.BusyError,
        versions.VersionError,
        PipelineError,
    ) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _show(plan: Any) -> None:
    from flows.lineage_view import readable

    for verdict in plan.verdicts:
        typer.echo(f"{verdict.version.tag}  data {verdict.version.data[:8]}  {_fate(verdict)}")
    for version in plan.replaced:
        typer.echo(f"data {version.md5[:8]}  {_fate(version)}")
    for store in plan.unused:
        typer.echo(f"{store.store}: {len(store.md5s)} of {store.total} objects, {readable(store.size)}")
    for path, size in plan.scratch:
        typer.echo(f"scratch: {path}, {readable(size)}")
    if plan.failed_runs:
        typer.echo(f"MLflow: {len(plan.failed_runs)} failed runs (`mlflow gc` then frees their files)")
    typer.echo(f"together {readable(plan.size)}")
    for warning in plan.warnings:
        typer.echo(f"note: {warning}")
    for obstacle in plan.obstacles:
        typer.echo(f"in the way: {obstacle}")


def _fate(judged: Any) -> str:
    return f"stays: {', '.join(judged.reasons)}" if judged.reasons else "GOES: nothing keeps it"
