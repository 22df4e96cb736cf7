"""`longview run`: the flow, or nothing at all when everything is up to date.

longview run --until judge
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

import typer

Profile = Annotated[str | None, typer.Option("--profile", "-p", help="A file of profiles/, by name.")]
Rounds = Annotated[int | None, typer.Option("--rounds", "-T", min=1, help="Number of preference rounds T.")]
Until = Annotated[
    str | None, typer.Option("--until", help="Stop after this stage (`judge`, `dpo@r2`, `dpo`): no version.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Drop edits of params.yaml that --profile would overwrite.")
]
Timeout = Annotated[float, typer.Option("--stage-timeout", min=0.01, help="Hours one stage may take.")]
Hardware = Annotated[
    str | None, typer.Option("--hardware", help="Where to train: a file of hardware/, by name.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would run, and what it takes.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run that did not end, with the options that it had.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log too.")]


def run(
    profile: Profile = None,
    rounds: Rounds = None,
    until: Until = None,
    force: Force = False,
    stage_timeout: Timeout = 24.0,
    hardware: Hardware = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    verbose: Verbose = False,
) -> None:
    """Bring every stage up to date.

    Without options it runs what params.yaml says. Finished stages are never run again; a run that was killed
    continues where it stopped.

    Examples:

        longview run

        longview run --profile tiny --rounds 2

        longview run --until judge

        longview run --profile llava-next-8b --dry-run

        longview run --profile llava-next-8b --hardware 8gpu-zero3

        longview run --resume
    """
    if resume and (dry_run or any(given is not None for given in (profile, rounds, until, hardware))):
        raise typer.BadParameter(
            "it takes the options of the run that it continues: give it alone", param_hint="--resume"
        )
    if dry_run:
        _plan(profile, rounds, hardware)
        return
    asked: dict[str, Any] = {
        "profile_name": profile,
        "rounds": rounds,
        "until": until,
        "stage_timeout_s": stage_timeout * 3600,
    }
    if resume:
        asked = _unfinished()
        hardware = asked.pop("hardware", None)
    if hardware:
        _use(hardware)
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    began = time.monotonic()
    from flows import data, pipeline, recovery, settled
    from flows import profile as profiles
    from flows.environment import root as find_root
    from flows.parent_run import read_note, write_note
    from tasks.params import ParamsError

    root = find_root()
    try:
        with recovery.exclusive(root) as cleaned:
            changed = profiles.activate(root, asked["profile_name"], asked["rounds"], force=force)
            for line in [*cleaned, *(f"params.yaml: {c}" for c in changed)]:
                typer.echo(line)
            with pipeline.opened(root):  # read once for all three questions
                names = [s.name for s in pipeline.select(pipeline.stages(root), asked["until"])]
                current = data.is_current(root) and not pipeline.pending(root, names)
            finished = not read_note(root).get("unfinished")
            left = "promote" in names and not settled.is_settled(root)
            whole = asked["until"] is None
            if finished and current and not (whole and left):
                done = f"{len(names)} stages, nothing to run"
                typer.echo(f"everything is up to date: {done} ({_since(began)})")
                if left:
                    typer.echo(settled.LEFT)
                write_note(root, asked=None)
                return
    except (profiles.ProfileError, pipeline.PipelineError, recovery.BusyError, ParamsError) as error:
        _stop(error)
    _flow({**asked, "force": force}, began)


def _unfinished() -> dict[str, Any]:
    """What the run that did not end was asked for."""
    from flows.environment import root
    from flows.parent_run import read_note

    asked = read_note(root()).get("asked")
    if not asked:
        text = "the last run came to its end. `longview run` brings every stage up to date"
        _stop(ValueError(f"nothing to resume: {text}"))
    shown = [f"{name} {value}" for name, value in asked.items() if value and name != "stage_timeout_s"]
    typer.echo(f"resuming the run with {', '.join(shown) or 'the parameters of params.yaml'}")
    return dict(asked)


def _use(hardware: str) -> None:
    """Say to the stages where to train; refuse now what they would refuse in an hour."""
    from flows.environment import root
    from tasks import launch

    try:
        launch.check(launch.read(hardware, root()))
    except launch.HardwareError as error:
        _stop(error)
    os.environ[launch.VARIABLE] = hardware


def _plan(profile: str | None, rounds: int | None, hardware: str | None) -> None:
    """Stages, models, estimates and every problem; nothing is written. Exit status 1 if something would stop
    the run."""
    from flows import pipeline, plan
    from flows import profile as profiles
    from flows.environment import root as find_root
    from tasks import launch
    from tasks.params import ParamsError

    root = find_root()
    try:
        parsed = profiles.parse(root, profile, rounds)
        trains_on = launch.read(hardware, root) if hardware else None
        names = [stage.name for stage in pipeline.stages(root)]
    except (profiles.ProfileError, pipeline.PipelineError, ParamsError, launch.HardwareError) as error:
        _stop(error)
    typer.echo(f"stages: {', '.join(name for name in names if '@r' not in name)}")
    typer.echo(f"each of {len(parsed['rounds'])} rounds: sample, score, dpo, evaluate\n")
    if parsed["foundation"].hub is None:
        typer.echo("the models are trained here, on this machine's CPU: no GPU is needed")
        return
    for line in plan.lines(parsed, trains_on):
        typer.echo(line)
    found = list(plan.problems(parsed, root, trains_on))
    for finding in found:
        typer.echo(f"\n{finding.level}: {finding.subject}: {finding.text}\n    {finding.advice}", nl=False)
    typer.echo(f"\n\n{sum(f.level == 'problem' for f in found)} problems; nothing was run")
    raise typer.Exit(1 if any(f.level == "problem" for f in found) else 0)


def _flow(asked: Mapping[str, Any], began: float) -> None:
    address = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    temporary = "a temporary server is starting (`longview up` keeps one running)"
    typer.echo(f"Prefect: {address or temporary}")
    from flows.environment import root
    from flows.interruption import reason
    from flows.recovery import marked
    from flows.retrain import EXPECTED, retrain

    try:
        with marked(root()):
            done = retrain(**asked)
    except EXPECTED as error:
        _stop(error)
    except KeyboardInterrupt:
        typer.echo("\nstopped; `longview run --resume` continues from here", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if sentence := reason(error):
            _stop(Exception(sentence))
        raise
    typer.echo(
        f"{len(done['ran'])} stages run, {len(done['restored'])} restored, {len(done['skipped'])} up to date,"
        f" {done['pushed']} files pushed, data version {done['data_version']} ({_since(began)})"
    )


def _stop(error: Exception) -> NoReturn:
    typer.echo(f"\n{error}", err=True)
    raise typer.Exit(1) from None


def _since(began: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
