"""What MLflow shows of a whole run as it opens: description, charts per round, tags to filter by, pages.

    python -c "from tasks.run_view import description; help(description)"

Everything is written onto the flow's own run and the candidate's registered version, with what MLflow has for
it: a note in Markdown, metrics with the round as step, tags, a table, artifacts. Writing it again changes
nothing: points have the run's own start as their time, and files replace files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import results
from tasks import side_by_side
from tasks.registry import Agents, Registry
from tasks.side_by_side import HEAD, Comparison, Generation

CHARTS = "by_round"
"""The section of the run's charts, `by_round/accuracy_reasoning` and so on: the page sorts sections by name,
and this is the first."""
PAGE, TABLE, TEXT = "comparison.html", "generations.json", "comparison.md"
MOST = 8000
"""Characters that MLflow keeps of a tag."""
ABOUT = (
    "Pairs of agents, one that reasons and one that answers: every generation that was a candidate. The "
    "weights are in DVC (`longview explain NUMBER` says where from); `champion` is in use, `challenger` "
    "waits or was not promoted (`longview model list`)."
)


@dataclass(frozen=True)
class Facts:
    """What the comparison does not say. tag, commit: the run as a version in git, None without one."""

    data: str
    profile: str
    decision: Mapping[str, Any]
    tag: str | None = None
    commit: str | None = None


def write(
    client: Any, run_id: str, found: Comparison, facts: Facts, page: str | None, files: list[Path]
) -> None:
    """All of it onto the run. page: the HTML of comparison and flips, None if answers are gone; files: other
    artifacts that belong beside it."""
    from mlflow.entities import Metric, RunTag
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_RUN_NOTE

    started = client.get_run(run_id).info.start_time
    points = [Metric(key, value, started, step) for key, value, step in charts(found)]
    own = {
        **tags(found, facts),
        MLFLOW_RUN_NOTE: description(found, facts),
        MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": TABLE, "type": "table"}]),
    }
    client.log_batch(run_id, metrics=points, tags=[RunTag(key, value) for key, value in own.items()])
    # As `log_table` writes it, which would append to what an earlier attempt wrote.
    rows = [side_by_side.cells(row) for row in found.rows]
    client.log_text(run_id, json.dumps({"columns": HEAD, "data": rows}), TABLE)
    client.log_text(run_id, side_by_side.markdown(found), TEXT)
    if page:
        client.log_text(run_id, page, PAGE)
    for path in files:
        client.log_artifact(run_id, str(path))


def charts(found: Comparison) -> list[tuple[str, float, int]]:
    """Name, value and step of every point: step 0 is the agents before any round, t is round t."""
    points: list[tuple[str, float | None, int]] = []
    reasoning = [row for row in found.rows if row.generation.policy is not None]
    for step, row in enumerate(reasoning):
        generation, facts = row.generation, row.generation.round
        for name in results.SETS:
            share = generation.system["accuracy"][name]
            for part, suffix in (("mean", ""), ("low", "_low"), ("high", "_high")):
                points.append((f"accuracy_{name}{suffix}", share[part] if share["n"] else None, step))
        pairs, reward, length = (facts.get(key) or {} for key in ("pairs", "reward", "length"))
        agreement = facts.get("agreement") or {}
        points += [
            ("gain", row.previous["mean"] if row.previous else None, step),
            ("reward", reward.get("mean"), step),
            ("margin", reward.get("margin_mean"), step),
            ("pairs_kept", pairs.get("kept"), step),
            ("length_tokens", generation.system.get("reasoning_tokens"), step),
            ("length_chosen_words", length.get("chosen_mean"), step),
            ("length_rejected_words", length.get("rejected_mean"), step),
            ("judge_auc", agreement.get("auc"), step),
            ("judge_rank_correlation", agreement.get("rank_correlation"), step),
        ]
        points += [
            (f"pairs_dropped_{why}", count, step) for why, count in (pairs.get("dropped") or {}).items()
        ]
    return [(f"{CHARTS}/{name}", float(value), step) for name, value, step in points if value is not None]


def tags(found: Comparison, facts: Facts) -> dict[str, str]:
    """To filter runs by: `tags."longview.decision" = 'promote'`."""
    chosen = candidate(found)
    own = {
        "longview.data_version": facts.data,
        "longview.candidate": str(facts.decision["candidate"]),
        "longview.decision": str(facts.decision["decision"]),
        "longview.opponent": str(facts.decision["opponent"]),
        "longview.checkpoint": next(iter(chosen.checkpoints.values()), None) if chosen else None,
        "longview.version": facts.tag,
        "longview.commit": facts.commit,
    }
    return {key: value for key, value in own.items() if value}


def candidate(found: Comparison) -> Generation | None:
    """The generation that the gate decided on."""
    return next((row.generation for row in reversed(found.rows) if row.generation.candidate), None)


def description(found: Comparison, facts: Facts) -> str:
    """The note on the run, in Markdown. Where the table is too long for a tag, the oldest rounds go."""
    for first in range(len(found.rows)):
        shown = Comparison(found.rows[first:], found.champion, found.verdict)
        text = "\n\n".join(
            [side_by_side.markdown(shown), *(["Earlier rounds: " + TEXT] if first else []), *_more(facts)]
        )
        if len(text) <= MOST:
            break
    return text[:MOST]


def _more(facts: Facts) -> list[str]:
    name = facts.tag or ""
    at = f" --at {name}" if name else ""
    commands = [
        f"longview compare {name} latest --rounds".replace("  ", " ") if name else "longview compare",
        f"longview compare {f'{name} --rounds ' if name else ''}--html page.html",
        f"longview explain {facts.decision['candidate']}{at}",
        f"longview data diff {facts.data[:8]}",
    ]
    version = f"version `{facts.tag}`" if facts.tag else "no version in git"
    return [
        f"**Decision.** {facts.decision['reason']}",
        f"Data `{facts.data[:8]}`, {version}, profile `{facts.profile}`. Charts per round: *Model metrics*, "
        f"`{CHARTS}`. Questions that flipped: artifact `{PAGE}`.",
        "```\n" + "\n".join(commands) + "\n```",
    ]


def describe_version(registry: Registry, found: Comparison, facts: Facts) -> None:
    """The description of the candidate's registered version, and of the model if it has none."""
    agents = facts.decision.get("candidate_agents")
    version = registry.with_agents(Agents(**agents)) if agents else None
    chosen = candidate(found)
    if version is None or chosen is None:
        return
    shares = [
        f"| {name} | {results.percent(share)} | {share['n']:,} |"
        for name, share in chosen.system["accuracy"].items()
        if share["n"]
    ]
    parents = (
        f"trained from {chosen.policy} (`{(chosen.policy_md5 or '')[:8]}`)" if chosen.policy else "the base"
    )
    text = "\n".join(
        [
            f"**{found.verdict}** {facts.decision['reason']}",
            "",
            "| questions | right, % | number |",
            "|---|---|---|",
            *shares,
            "",
            f"{chosen.name}, {parents}, on data `{facts.data[:8]}`; {facts.tag or 'no version in git'}.",
            f"`longview explain {version.number}` prints the whole chain.",
        ]
    )
    client = registry.client
    if client.get_model_version(registry.model, version.number).description != text:
        client.update_model_version(registry.model, version.number, description=text)
    if not client.get_registered_model(registry.model).description:
        client.update_registered_model(registry.model, description=ABOUT)
