"""Multi-granularity assessment of the generated paths: answer filter, then path scores (METHOD 1.2).

    python -m tasks.assess

All surviving paths of a question are scored in one call. On annotated data the judge's agreement with the
oracle is reported, over right and wrong paths alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks import params, roles
from tasks.meter import meter
from tasks.stage import StageError, StageRun, open_stage, settings

GENERATED, JUDGE = Path("artifacts/generate"), Path("artifacts/judge")


@dataclass(frozen=True)
class Params:
    """prompts: the judge's set; agreement_questions: how many questions' paths,
    wrong ones too, the judge is tested on."""

    prompts: str = "full"
    answer_filter: Literal["rules", "model"] = "rules"
    batch_size: int = 128
    agreement_questions: int = 200


def run(p: Params, stage: StageRun) -> dict[str, Any]:
    """Write paths.jsonl with `right`, `score` and `oracle`; returns counts and agreement."""
    from models.agreement import agreement, with_oracle
    from models.assessment import filter_answers, score_paths
    from models.records import read_paths, read_questions, write_jsonl

    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    paths, how = filter_answers(
        read_paths(GENERATED / "paths.jsonl"),
        questions,
        roles.answer_filter(p.answer_filter, p.batch_size),
        p.prompts,
    )
    surviving = [path for path in paths if path.right is True]
    if not surviving:
        raise StageError(
            "no generated path has the right answer: train the generator longer or choose a stronger one"
        )
    judge = roles.path_judge(JUDGE, p.prompts, p.batch_size)
    with meter("paths scored", len(surviving)) as advance:
        scored, unreadable = score_paths(surviving, questions, judge)
        advance(len(scored), len(scored))
    by_key = {(path.question_id, path.sample): path for path in scored}
    merged, _ = with_oracle([by_key.get((q.question_id, q.sample), q) for q in paths], questions)
    write_jsonl(stage.out / "paths.jsonl", merged)
    tested = set(sorted({path.question_id for path in paths})[: p.agreement_questions])
    probe, _ = score_paths([path for path in paths if path.question_id in tested], questions, judge)
    return {
        "paths": len(paths),
        "right_share": len(surviving) / len(paths),
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
        params=settings(p),
        inputs=["data", GENERATED, JUDGE, roles.GENERATOR],
        out="artifacts/assess",
    ) as stage:
        stage.metrics(run(p, stage))


if __name__ == "__main__":
    main()
