"""Round t, second stage: judge the sampled paths and pair them (METHOD 1.2, 1.4).

    python -m tasks.score --round r1

All paths of a question, right and wrong, are scored in one call.
Ties, all-right and all-wrong questions make no pair; every drop is counted by its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks import engines, params, roles, rounds
from tasks.assessing import by_question, mark_all, mixed, score_all
from tasks.stage import StageError, StageRun, open_stage, settings


@dataclass(frozen=True)
class Params:
    """rule: a name of models.pairing.RULES; min_margin: least difference of scores; max_pairs: most pairs
    kept; scope: pairs of whole paths, or of the first step in which they differ (Step-DPO)."""

    prompts: str = "full"
    answer_filter: Literal["rules", "model"] = "rules"
    rule: str = "best_right_vs_worst_wrong"
    pairs_per_question: int = 1
    min_margin: int = 1
    max_pairs: int = 15000
    scope: Literal["path", "step"] = "path"


def run(p: Params, this: rounds.Round, stage: StageRun) -> dict[str, Any]:
    """Write paths.jsonl and pairs.jsonl; returns what the comparison of rounds needs.
    Raises StageError without pairs."""
    from models.agreement import agreement, with_oracle
    from models.pairing import build_pairs, first_difference
    from models.records import FailedPath, read_jsonl, read_paths, read_questions, write_jsonl

    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    sampled = this.folder("sample")
    asked = list(questions.values())
    with roles.answer_filter(p.answer_filter, asked, stage) as filter:
        paths, _ = mark_all(list(read_paths(sampled / "paths.jsonl")), questions, filter, p.prompts)
    failures = [
        FailedPath(r["question_id"], r["sample"], r["reason"]) for r in read_jsonl(sampled / "failures.jsonl")
    ]
    with roles.path_judge(roles.JUDGE, p.prompts, asked, stage) as judge:
        scored, unreadable = score_all(mixed(paths), questions, judge)
    by_key = {(path.question_id, path.sample): path for path in scored}
    scored_paths, truths = with_oracle([by_key.get((q.question_id, q.sample), q) for q in paths], questions)
    groups = by_question(scored_paths).values()
    pairs, dropped = build_pairs(groups, p.rule, p.pairs_per_question, p.min_margin, p.max_pairs)
    if not pairs:
        raise StageError(
            f"round {this.t} gave no preference pair (dropped: {dropped}): sample more questions or "
            "paths, raise the temperature, or lower score.min_margin"
        )
    write_jsonl(stage.out / "paths.jsonl", scored_paths)
    cut = [first_difference(pair) for pair in pairs] if p.scope == "step" else pairs
    write_jsonl(stage.out / "pairs.jsonl", cut)
    return {
        "questions": len({path.question_id for path in paths}),
        "paths": len(paths),
        "failed": len(failures),
        "unreadable": unreadable,
        "right_share": sum(path.right is True for path in paths) / len(paths),
        **_rewards(scored, pairs),
        **_lengths(scored_paths, pairs),
        "pairs": {"kept": len(pairs), "dropped": dropped},
        "agreement": agreement(scored_paths, truths, judge.from_answers),
    }


def _rewards(scored: Sequence[Any], pairs: Sequence[Any]) -> dict[str, Any]:
    return {
        "reward": {
            "mean": _mean([path.score for path in scored if path.score is not None]),
            "chosen_mean": _mean([pair.chosen_score for pair in pairs]),
            "rejected_mean": _mean([pair.rejected_score for pair in pairs]),
            "margin_mean": _mean([pair.margin for pair in pairs]),
        }
    }


def _lengths(paths: Sequence[Any], pairs: Sequence[Any]) -> dict[str, Any]:
    """Lengths in words."""
    return {
        "length": {
            "mean": _mean([len(path.text.split()) for path in paths]),
            "chosen_mean": _mean([len(pair.chosen.split()) for pair in pairs]),
            "rejected_mean": _mean([len(pair.rejected.split()) for pair in pairs]),
        }
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main() -> None:
    """Run the stage in the checkout's root."""
    this, p = rounds.from_arguments(__doc__), params.load("score", Params)
    inputs: list[str | Path] = ["data", this.folder("sample"), roles.JUDGE]
    with open_stage(
        "score",
        params=settings(p, engines.identities("answer_judge", "path_judge")),
        inputs=inputs,
        out=this.folder("score"),
        round=this.t,
    ) as stage:
        stage.metrics(run(p, this, stage))


if __name__ == "__main__":
    main()
