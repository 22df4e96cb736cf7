"""What a person reads on a phone: a run in five lines.

    python -m flows.notify        # the lines of what artifacts/ holds now

A run that did something ends with these lines as a Prefect artifact and in the event `longview.run.finished`,
which an automation of the server sends on (flows/automations.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

FINISHED, AWAITED = "longview.run.finished", "longview.approval.awaited"
COMPARISON, DECISION = Path("artifacts/compare/comparison.json"), Path("artifacts/promote/decision.json")

NEXT = {
    "champion": "next: `longview report`; to undo: `longview model rollback`",
    "waiting": "next: `longview model approve --reason …`, or with --reject",
    "declined": "next: nothing; why: `longview model list --history`",
    "kept": "next: `dvc repro --force --single-item promote`, then `longview run`",
    "passed": "next: `longview model list`",
    "left": "next: `longview run` makes it a version and carries that out",
    "missed": "next: nothing; why: `longview report`",
}


class Done(Protocol):
    """What a run did (flows.retrain.Summary)."""

    @property
    def data_version(self) -> str: ...
    @property
    def ran(self) -> list[str]: ...
    @property
    def restored(self) -> list[str]: ...
    @property
    def tag(self) -> str | None: ...


def finished(root: Path, done: Done, seconds: float, state: str | None = None) -> None:
    """Publish the summary of a run: a Prefect artifact, and the event that notifications are made from."""
    from prefect.artifacts import create_markdown_artifact
    from prefect.events import emit_event
    from prefect.runtime import flow_run

    lines = summary(root, done, seconds, state)
    create_markdown_artifact("\n".join(f"- {line}" for line in lines), key="summary")
    emit_event(
        FINISHED,
        resource={"prefect.resource.id": f"longview.run.{flow_run.id}", "prefect.resource.name": "run"},
        payload={"summary": "\n".join(lines), "tag": done.tag, "data": done.data_version},
    )


def awaited(candidate: str, until: str, question: str) -> None:
    """Tell that a candidate waits for a person until then (ISO time)."""
    from prefect.events import emit_event
    from prefect.runtime import flow_run

    emit_event(
        AWAITED,
        resource={"prefect.resource.id": f"longview.run.{flow_run.id}", "prefect.resource.name": "run"},
        payload={"candidate": candidate, "until": until[:16].replace("T", " "), "question": question},
    )


def summary(root: Path, done: Done, seconds: float, state: str | None = None) -> list[str]:
    """What ran, how long, on which data; accuracy before and after; what became of the candidate (`state`, as
    flows.approval.settle says it; "left": the run ended with it, by `until`); what to do next."""
    restored = f", {len(done.restored)} restored" if done.restored else ""
    decided = set(done.ran + done.restored) & {"compare", "promote"}
    lines = [
        f"{len(done.ran)} stages run{restored} in {_span(seconds)}: {_listed(done.ran or done.restored)}",
        f"data {done.data_version[:8]}" + (f", version {done.tag}" if done.tag else ""),
    ]
    decision = _read(root / DECISION) if decided else None
    if not decision:
        return [
            *lines,
            "next: `longview report`" if done.tag else "next: `longview status` says what is left",
        ]
    return [*lines, *_outcome(decision, _read(root / COMPARISON), state)]


def _outcome(decision: dict[str, Any], comparison: dict[str, Any] | None, state: str | None) -> list[str]:
    """Before and after are of the same questions: before = after − their paired difference."""
    change, candidate = decision["reasoning"], decision["candidate"]
    shares = ((comparison or {}).get("systems", {}).get(candidate) or {}).get("accuracy", {})
    after = shares.get("reasoning", {}).get("mean")
    lines = []
    if change.get("n") and after is not None:
        lines.append(
            f"accuracy {after - change['mean']:.1%} → {after:.1%}, {_points(change['mean'])} points "
            f"(95%: {_points(change['low'])} to {_points(change['high'])}, n = {change['n']:,})"
        )
    opponent, passed = decision["opponent"], decision["decision"] == "promote"
    outcome = (state or "passed") if passed else "missed"
    said = {
        "champion": f"{candidate} is champion now, before it {opponent}",
        "waiting": f"{candidate} waits for approval: it passed the gate against {opponent}",
        "declined": f"{candidate} passed the gate against {opponent}, and was declined",
        "kept": f"{candidate} is not promoted: another became champion since it was compared with {opponent}",
        "passed": f"{candidate} passed the gate against {opponent}",
        "left": f"{candidate} passed the gate against {opponent}",
        "missed": f"{candidate} is not promoted: {opponent} stays",
    }
    return [*lines, said[outcome], NEXT[outcome]]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names if len(names) <= most else [*names[: most - 2], "…", names[-1]])


def _span(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main() -> None:
    """Print the summary that the artifacts give."""
    from types import SimpleNamespace

    from flows import data
    from flows.environment import root

    base = root()
    done = SimpleNamespace(
        data_version=data.version(base) or "unknown", ran=["compare", "promote"], restored=[], tag=None
    )
    print("\n".join(summary(base, done, 0)))


if __name__ == "__main__":
    main()
