"""The summary set: curated pieces, and paths sampled from the trained reasoning agent itself (METHOD 1.3).

    python -m tasks.summary_data

The summary agent meets at inference what the reasoner writes, so part of its training set is written by it.
The label is always the ground truth. General visual questions join in `summary_sft`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks import engines, params, roles
from tasks.sampling import Row, open_sampler, sample_reasoner
from tasks.stage import StageError, StageRun, open_stage, settings

CURATED, REASONER = Path("artifacts/curate"), Path("artifacts/reasoning_sft/checkpoint")


@dataclass(frozen=True)
class Params:
    """questions and samples: how much the reasoner writes; temperature and top_p: how it is sampled;
    keep: all of a question's chains, or the one with the most steps."""

    prompts: str = "full"
    questions: int = 1000
    samples: int = 1
    keep: Literal["all", "longest"] = "all"
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 4096
    chunk: int = 256


def run(p: Params, seed: int, stage: StageRun) -> dict[str, Any]:
    """Write records.jsonl (piece, question_id, thoughts, answer); returns counts by piece."""
    from models.records import read_jsonl, read_questions, write_jsonl

    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    rows = [
        {"piece": row["piece"], "question_id": row["question_id"], "thoughts": row["text"]}
        for row in read_jsonl(CURATED / "summary.jsonl")
    ]
    asked = roles.training_questions("generate", p.questions, seed=1)
    sampled: list[Row] = []  # the summary set is held whole, here and where it is trained on
    with open_sampler("reasoner", REASONER, asked, stage) as engine:
        sample_reasoner(engine, asked, p, seed, stage.scratch, take=sampled.append)
    own = [row for row in sampled if "reason" not in row]
    failed = len(sampled) - len(own)
    if p.keep == "longest":
        own = longest(own)
    rows += [{"piece": "reasoner", "question_id": row["question_id"], "thoughts": row["text"]} for row in own]
    if not rows:
        raise StageError(
            "the summary set is empty: no curated path and no chain of the reasoner could be used"
        )
    for row in rows:
        row["answer"] = questions[row["question_id"]].answer
    write_jsonl(stage.out / "records.jsonl", rows)
    return {
        "records": len(rows),
        "pieces": dict(Counter(row["piece"] for row in rows)),
        "failed": failed,
        "left_out": len(sampled) - failed - len(own),
    }


def longest(chains: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each question the chain with the most steps, the first of several; chains: rows of ReasoningPath.

    Where the reasoner often guesses, and its guesses tell nothing, a summary agent that saw mostly those
    leaves aside the worked-out chains as well, which the preference rounds make common.
    """
    kept: dict[str, dict[str, Any]] = {}
    for chain in chains:
        name = chain["question_id"]
        if name not in kept or len(chain["steps"]) > len(kept[name]["steps"]):
            kept[name] = chain
    return list(kept.values())


def main() -> None:
    """Run the stage in the checkout's root."""
    p = params.load("summary_data", Params)
    obeyed = settings(p, engines.identities("reasoner"))
    inputs: list[str | Path] = ["data", CURATED, REASONER]
    with open_stage("summary_data", params=obeyed, inputs=inputs, out="artifacts/summary_data") as stage:
        stage.metrics(run(p, params.seed(), stage))


if __name__ == "__main__":
    main()
