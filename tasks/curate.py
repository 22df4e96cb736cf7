"""The reasoning set and the pieces of the summary set (METHOD 1.3).

    python -m tasks.curate

reasoning.jsonl: for each question the highest-scored right path. summary.jsonl: optimal paths,
flawed right paths drawn across score bands, and wrong-answer paths; the label is always the ground truth.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import params
from tasks.stage import StageError, StageRun, open_stage, settings

if TYPE_CHECKING:
    import numpy as np

    from models.records import ReasoningPath

ASSESSED = Path("artifacts/assess")


@dataclass(frozen=True)
class Params:
    """Ratios of the summary pieces to the number of optimal paths; bands:
    score bands flawed paths are drawn across."""

    min_score: int = 1
    optimal: float = 1.0
    flawed: float = 0.5
    wrong: float = 1.0
    bands: int = 4


def best_paths(paths: Sequence[ReasoningPath], min_score: int) -> list[ReasoningPath]:
    """The highest-scored right path of each question that reaches `min_score`; the first sample on a tie."""
    best: dict[str, ReasoningPath] = {}
    for path in paths:
        if path.right is not True or (path.score or 0) < min_score:
            continue
        held = best.get(path.question_id)
        if held is None or (path.score or 0) > (held.score or 0):
            best[path.question_id] = path
    return list(best.values())


def across_bands(
    paths: Sequence[ReasoningPath], count: int, bands: int, generator: np.random.Generator
) -> list[ReasoningPath]:
    """`count` paths, as evenly as they allow from `bands` equal bands of scores 1-100."""
    by_band: dict[int, list[ReasoningPath]] = defaultdict(list)
    for path in paths:
        by_band[min(bands - 1, ((path.score or 1) - 1) * bands // 100)].append(path)
    queues = [
        [by_band[band][i] for i in generator.permutation(len(by_band[band]))] for band in sorted(by_band)
    ]
    drawn: list[ReasoningPath] = []
    while len(drawn) < count and any(queues):
        for queue in queues:
            if queue and len(drawn) < count:
                drawn.append(queue.pop())
    return drawn


def run(p: Params, seed: int, paths: Sequence[ReasoningPath], stage: StageRun) -> dict[str, Any]:
    """Write reasoning.jsonl and summary.jsonl; returns counts.
    Raises StageError where no path is good enough."""
    import numpy as np

    from models.records import write_jsonl

    generator = np.random.default_rng(seed)
    best = best_paths(paths, p.min_score)
    if not best:
        raise StageError(
            "no question has a right path with the minimum score: lower curate.min_score, or generate more"
        )
    chosen = {(path.question_id, path.sample) for path in best}
    flawed = [path for path in paths if path.right is True and (path.question_id, path.sample) not in chosen]
    wrong = [path for path in paths if path.right is False]
    pieces = {
        "optimal": _draw(best, round(p.optimal * len(best)), generator),
        "flawed": across_bands(flawed, round(p.flawed * len(best)), p.bands, generator),
        "wrong": _draw(wrong, round(p.wrong * len(best)), generator),
    }
    write_jsonl(stage.out / "reasoning.jsonl", best)
    rows = [
        {"piece": name, "question_id": q.question_id, "text": q.text}
        for name, drawn in pieces.items()
        for q in drawn
    ]
    write_jsonl(stage.out / "summary.jsonl", rows)
    return {
        "reasoning": len(best),
        "reasoning_score_mean": sum(path.score or 0 for path in best) / len(best),
        "reasoning_steps": dict(sorted(Counter(str(len(path.steps)) for path in best).items())),
        "summary": {name: len(drawn) for name, drawn in pieces.items()},
    }


def _draw(paths: Sequence[ReasoningPath], count: int, generator: np.random.Generator) -> list[ReasoningPath]:
    return [paths[i] for i in generator.permutation(len(paths))[:count]]


def main() -> None:
    """Run the stage in the checkout's root."""
    from models.records import read_paths

    p = params.load("curate", Params)
    with open_stage("curate", params=settings(p), inputs=["data", ASSESSED], out="artifacts/curate") as stage:
        stage.metrics(run(p, params.seed(), read_paths(ASSESSED / "paths.jsonl"), stage))


if __name__ == "__main__":
    main()
