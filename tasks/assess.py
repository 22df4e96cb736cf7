"""Multi-granularity assessment of the generated paths: answer filter, then path scores (METHOD 1.2).

    python -m tasks.assess

All surviving paths of a question are scored in one call. On annotated data the judge's agreement with the
oracle is reported, over right and wrong paths alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks import engines, params, roles
from tasks.assessing import mark_all, score_all, surviving
from tasks.stage import StageError, StageRun, open_stage, settings

GENERATED = Path("artifacts/generate")


@dataclass(frozen=True)
class Params:
    """prompts: the judge's set; agreement_questions: how many questions' paths,
    wrong ones too, the judge is tested on."""

    prompts: str = "full"
    answer_filter: Literal["rules", "model"] = "rules"
    agreement_questions: int = 200


def run(p: Params, stage: StageRun) -> dict[str, Any]:
    """Write paths.jsonl with `right`, `score` and `oracle`; returns counts and agreement."""
    from models.agreement import agreement, with_oracle
    from models.records import read_paths, read_questions, write_jsonl

    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    asked = list(questions.values())
    with roles.answer_filter(p.answer_filter, asked, stage) as filter:
        paths, how = mark_all(list(read_paths(GENERATED / "paths.jsonl")), questions, filter, p.prompts)
    right = surviving(paths)
    if not right:
        raise StageError(
            "no generated path has the right answer: train the generator longer or choose a stronger one"
        )
    tested = set(sorted({path.question_id for path in paths})[: p.agreement_questions])
    with roles.path_judge(roles.JUDGE, p.prompts, asked, stage) as judge:
        scored, unreadable = score_all(right, questions, judge)
        probe, _ = score_all([path for path in paths if path.question_id in tested], questions, judge)
    by_key = {(path.question_id, path.sample): path for path in scored}
    merged, _ = with_oracle([by_key.get((q.question_id, q.sample), q) for q in paths], questions)
    write_jsonl(stage.out / "paths.jsonl", merged)
    return {
        "paths": len(paths),
        "right_share": len(right) / len(paths),
        "filtered": dict(how),
        "unreadable": unreadable,
        "agreement": agreement(*with_oracle(probe, questions), judge.from_answers),
        "score_mean": _mean([path.score for path in scored if path.score is not None]),
        "oracle_step_accuracy": _mean([path.oracle["step_accuracy"] for path in merged if path.oracle]),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main() -> None:
    """Run the stage in the checkout's root."""
    p = params.load("assess", Params)
    with open_stage(
        "assess",
        params=settings(p, engines.identities("answer_judge", "path_judge")),
        inputs=["data", GENERATED, roles.JUDGE, roles.GENERATOR],
        out="artifacts/assess",
    ) as stage:
        stage.metrics(run(p, stage))


if __name__ == "__main__":
    main()
