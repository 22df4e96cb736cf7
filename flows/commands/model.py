"""`longview model`: the versions of the registered model, and who decides which of them is champion.

longview model list
longview model rollback --reason "misreads sevens"
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from tasks.registry import Registry, Version

app = typer.Typer(
    help="Which generation is champion: list, approve, promote, roll back.", no_args_is_help=True
)

Reason = Annotated[str, typer.Option("--reason", "-m", help="Why; it is kept with the version.")]
Number = Annotated[str, typer.Argument(help="A version of `longview model list`.")]
AsJson = Annotated[bool, typer.Option("--json", help="For other programs.")]
History = Annotated[bool, typer.Option("--history", help="Every change of the champion instead.")]
Reject = Annotated[bool, typer.Option("--reject", help="Keep the champion.")]
To = Annotated[str | None, typer.Option("--to", help="This version instead of the champion before.")]


@app.command("list")
def list_(as_json: AsJson = False, history: History = False) -> None:
    """Every version: generation, alias, accuracy in % with 95% interval, data version, run, when, who, why.

    Examples:

        longview model list

        longview model list --history

        longview model list --json
    """
    with _registry() as (registry, _):
        if history:
            _print_history(registry, as_json)
            return
        rows = [_facts(registry, version) for version in registry.versions()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    if not rows:
        typer.echo("no versions yet: a `longview run` that reaches its end registers its best generation")
        return
    from rich.console import Console
    from rich.table import Table

    heads = "version", "generation", "alias", "reasoning", "perception", "data", "run", "when", "who", "why"
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(str, _cells(row)))
    console = Console()
    console = console if console.is_terminal else Console(width=240)
    console.print(table)


@app.command()
def approve(reason: Reason, reject: Reject = False) -> None:
    """Say whether the candidate that waits becomes champion. A run that is paused for it goes on.

    Examples:

        longview model approve --reason "looked at forty flipped questions"

        longview model approve --reject --reason "reads sevens as ones"
    """
    from flows import approval
    from tasks import promotion

    with _registry() as (registry, root):
        waiting = registry.waiting()
        if waiting is None or waiting.awaiting is None:
            _stop("nothing waits for approval: `longview model list` shows every version")
        if not reject:
            _check_checkpoints(root, registry, waiting)
        who, run = promotion.user(), waiting.awaiting.run
        ended = promotion.rule(registry, waiting.number, "keep" if reject else "promote", reason, who=who)
        said = approval.Ruling(decision="keep" if reject else "promote", reason=reason, who=who)
        resumed = approval.resume(run, said)
    typer.echo(f"{ended.title} is {'not promoted' if ended.declined else 'champion'}")
    if resumed:
        typer.echo("the paused run goes on")


@app.command()
def promote(version: Number, reason: Reason) -> None:
    """Make a version champion whatever the gate said of it.

    Example:

        longview model promote 4 --reason "the only one trained on the new receipts"
    """
    from tasks import promotion

    with _registry() as (registry, root):
        target = _find(registry, version)
        if registry.champion() == target:
            typer.echo(f"{target.title} is champion already")
            return
        _check_checkpoints(root, registry, target)
        promotion.promote(registry, target, "by hand", reason)
    typer.echo(f"{target.title} is champion")


@app.command()
def rollback(reason: Reason, to: To = None) -> None:
    """Make the champion before this one champion again. The gate does not put back what was taken down.

    The files in artifacts/ stay as they are; `longview model list` names the run that has the version's own.

    Examples:

        longview model rollback --reason "misreads sevens"

        longview model rollback --to 2 --reason "the last one that customers saw"
    """
    from tasks import promotion

    with _registry() as (registry, root):
        champion = registry.champion()
        if champion is None:
            _stop("there is no champion to roll back from: `longview model list`")
        before = to or registry.previous(champion)
        if before is None:
            _stop(f"{champion.title} is the first champion: `longview model rollback --to VERSION`")
        target = _find(registry, before)
        if target == champion:
            _stop(f"{target.title} is champion already")
        _check_checkpoints(root, registry, target)
        promotion.roll_back(registry, target, reason)
    typer.echo(f"{target.title} is champion, {champion.title} is not")


@contextmanager
def _registry() -> Iterator[tuple[Registry, Path]]:
    """The registry of this checkout; what stops a command becomes one message."""
    from flows.environment import root as find_root
    from tasks import params, promote, tracking
    from tasks.registry import Registry

    root = find_root()
    with chdir(root):
        if not tracking.enabled():
            _stop("LONGVIEW_TRACKING=off: there is no registry")
        from mlflow.exceptions import MlflowException

        try:
            settings = params.load("promote", promote.Params)
            yield Registry(settings.model, settings.alias), root
        except (params.ParamsError, tracking.TrackingError, MlflowException) as error:
            _stop(str(error))


def _find(registry: Registry, number: str) -> Version:
    found = registry.version(number) if number.isdigit() else None
    if found is None:
        known = ", ".join(version.number for version in reversed(registry.versions())) or "none"
        _stop(f"no version {number}; there are: {known}")
    return found


def _check_checkpoints(root: Path, registry: Registry, version: Version) -> None:
    """Refuse a version whose weights nobody could load."""
    from dvc.exceptions import DvcException

    from flows import checkpoints

    try:
        lost = [name for name, md5 in registry.outputs(version).items() if not checkpoints.where(root, md5)]
    except (DvcException, OSError) as error:
        _stop(f"DVC cannot say where the checkpoints of {version.title} are: {error}")
    if lost:
        run = version.tags.get("run")
        worktree = f"`git worktree add ../then {run}`, there " if run else ""
        _stop(
            f"{version.title}: neither DVC's cache nor the remote has the {' and '.join(lost)} checkpoint.\n"
            "Where the run was made, `dvc push` brings it to the remote; "
            f"else {worktree}`dvc repro` trains it again."
        )


def _facts(registry: Registry, version: Version) -> dict[str, Any]:
    aliases = [name for name, holder in registry.aliases().items() if holder == version.number]
    came = [c for c in registry.history() if c.after == version.number]
    last = came[-1] if came and (aliases or not version.declined) else version.declined
    return {
        "version": version.number,
        "generation": version.generation,
        "aliases": aliases,
        "accuracy": version.accuracy,
        "data_version": version.tags.get("data_version"),
        "run": version.tags.get("run"),
        "commit": version.tags.get("commit"),
        "when": last.when if last else version.created.isoformat(timespec="seconds"),
        "who": last.who if last else version.tags.get("who"),
        "reason": last.reason if last else version.tags.get("reason"),
        "awaiting": asdict(version.awaiting) if version.awaiting else None,
        "declined": asdict(version.declined) if version.declined else None,
        "checkpoints": asdict(version.agents),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    from tasks.promotion import share

    waits = [f"waits until {row['awaiting']['until'][:16]}"] if row["awaiting"] else []
    return [
        row["version"],
        row["generation"],
        ", ".join(row["aliases"] + waits),
        *(share(row["accuracy"].get(name)) for name in ("reasoning", "perception")),
        (row["data_version"] or "–")[:8],
        row["run"] or "–",
        row["when"][:16].replace("T", " "),
        row["who"] or "–",
        (row["reason"] or "–").replace("\n", " "),
    ]


def _print_history(registry: Registry, as_json: bool) -> None:
    champion, changes = registry.champion(), registry.history()
    if changes and (champion is None or changes[-1].after != champion.number):
        changes = changes[:-1]  # written down, and killed before it was made
    if as_json:
        typer.echo(json.dumps([asdict(change) for change in changes], indent=1, ensure_ascii=False))
        return
    for c in changes:
        typer.echo(f"{c.when[:19]}Z  {c.before or 'none'} → {c.after}  {c.how}  {c.who}  {c.reason}")
    if not changes:
        typer.echo("no champion yet")


def _stop(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
