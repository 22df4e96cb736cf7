"""MLflow's page of a whole run, written at its end: table, charts per round, flipped questions.

longview run        # writes it once the candidate is registered
"""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import compare, pictures
from flows.versions import Facts, RunVersion

REPORT = Path("artifacts/report/report.html")


def publish(root: Path, run_id: str | None, facts: Facts, made: RunVersion | None) -> None:
    """Make the parent run useful as it opens. Nothing without a comparison, a decision and a parent run."""
    if run_id and all((root / path).is_file() for path in (compare.COMPARISON, compare.DECISION)):
        write(str(root), run_id, facts, (made.tag, made.commit) if made else (None, None))


@task(cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=10)
def write(root: str, run_id: str, ran: Facts, made: tuple[str | None, str | None]) -> None:
    """The comparison of this checkout onto its MLflow run. May be repeated."""
    from tasks import flips, params, promote, run_view, side_by_side
    from tasks.registry import Registry

    base = Path(root)
    found = compare.make(base, [])
    decision = json.loads((base / compare.DECISION).read_text(encoding="utf-8"))
    facts = run_view.Facts(ran.data, ran.profile, decision, *made)
    pair, page = side_by_side.flipped(found.rows), None
    if pair:
        before, after = pair
        changed = flips.flips(before.rows, after.rows)
        with pictures.source(base, after.data) as source:
            page = flips.page(changed, before.title, after.title, source, found)
    with chdir(base):
        settings = params.load("promote", promote.Params)
        registry = Registry(settings.model, settings.alias)
        run_view.write(
            registry.client, run_id, found, facts, page, [path for path in [REPORT] if path.is_file()]
        )
        run_view.describe_version(registry, found, facts)
