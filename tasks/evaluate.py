"""Held-out answers of one system, greedy (METHOD 1.5).

    python -m tasks.evaluate --system base            # or multi_agent, r1, r2, ...

Systems: `base` answers directly; `multi_agent` is reasoner and summary agent;
rT the same with the reasoner of round T.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import params, roles, rounds
from tasks.meter import meter
from tasks.sampling import counting
from tasks.stage import StageError, StageRun, open_stage, settings

if TYPE_CHECKING:
    from models.agents import AgentAnswer
    from models.records import Question

BASE, SUMMARY = Path("artifacts/foundation/base"), Path("artifacts/summary_sft/checkpoint")


@dataclass(frozen=True)
class Params:
    """Token limits of a reasoning and of an answer; batch_size: questions decoded together;
    limit: at most so many questions of each split and set (None: all)."""

    prompts: str = "full"
    reasoning_tokens: int = 4096
    answer_tokens: int = 32
    batch_size: int = 256
    limit: int | None = None


def held_out(limit: int | None = None) -> list[Question]:
    """Validation and test questions, at most `limit` of each split and set; StageError if there are none."""
    from models.records import read_questions

    questions = [q for split in ("validation", "test") for q in read_questions(roles.RECORDS, split=split)]
    if not questions:
        raise StageError("data/ has no validation or test questions: add records with these splits")
    seen: Counter[tuple[str, str]] = Counter()
    kept = []
    for question in questions:
        seen[question.split, question.set] += 1
        if limit is None or seen[question.split, question.set] <= limit:
            kept.append(question)
    return kept


def checkpoints(system: str) -> tuple[Path | None, Path]:
    """Reasoner (None for the base) and answering checkpoint of a system."""
    if system == "base":
        return None, BASE
    return (rounds.REASONING_SFT if system == "multi_agent" else rounds.load(system).trained), SUMMARY


def answers(
    p: Params, reasoner: Path | None, answerer: Path, questions: Sequence[Question]
) -> list[AgentAnswer]:
    """The system's answers, in order."""
    from models.agents import answer_directly, answer_with_agents

    summariser = roles.engine(answerer, p.batch_size)
    if reasoner is None:
        with meter("answers", len(questions)) as advance, counting([summariser], lambda n: advance(n, n)):
            return answer_directly(summariser, questions, p.prompts, p.answer_tokens)
    engine, limits = roles.engine(reasoner, p.batch_size), (p.reasoning_tokens, p.answer_tokens)
    with (
        meter("reasonings and answers", 2 * len(questions)) as advance,
        counting([engine, summariser], lambda n: advance(n, n)),
    ):
        return answer_with_agents(engine, summariser, questions, p.prompts, *limits)


def prediction(question: Question, said: AgentAnswer) -> dict[str, Any]:
    """A row of predictions.jsonl. A rule that cannot tell counts as not right."""
    from models.answers import matches
    from models.reasoning import StepError, parse_thoughts

    own: str | None = None
    if said.reasoning is not None:
        try:
            own = parse_thoughts(said.reasoning)[-1].content
        except StepError:
            own = None
    return {
        "id": question.id,
        "set": question.set,
        "split": question.split,
        "family": question.family,
        "image": question.images[0] if question.images else None,
        "question": question.question,
        "truth": question.answer,
        "answer": said.answer,
        "right": matches(said.answer, question.answer, question.choices) is True,
        "reasoning": said.reasoning,
        "reasoning_answer": own,
        "reasoning_right": None if own is None else matches(own, question.answer, question.choices) is True,
        "reasoning_tokens": said.reasoning_tokens,
        "failure": said.failure,
    }


def run(p: Params, system: str, stage: StageRun) -> dict[str, Any]:
    """Write predictions.jsonl; returns accuracy by split and set, and failures."""
    from models.records import write_jsonl
    from models.statistics import wilson

    questions = held_out(p.limit)
    said = answers(p, *checkpoints(system), questions)
    rows = [prediction(question, answer) for question, answer in zip(questions, said, strict=True)]
    write_jsonl(stage.out / "predictions.jsonl", rows)
    accuracy: dict[str, Any] = {}
    for split, kind in sorted({(row["split"], row["set"]) for row in rows}):
        of = [row["right"] for row in rows if (row["split"], row["set"]) == (split, kind)]
        accuracy.setdefault(split, {})[kind] = wilson(sum(of), len(of)).__dict__
    failures = Counter(row["failure"] for row in rows if row["failure"])
    tokens = [row["reasoning_tokens"] for row in rows]
    return {
        "accuracy": accuracy,
        "failures": dict(failures),
        "reasoning_tokens_mean": sum(tokens) / len(tokens),
    }


def main() -> None:
    """Run the stage in the checkout's root."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", required=True, help="base, multi_agent, or a key of `rounds` such as r1")
    system = parser.parse_args().system
    p = params.load("evaluate", Params)
    inputs: list[str | Path] = ["data", *[path for path in checkpoints(system) if path is not None]]
    number = rounds.load(system).t if system not in ("base", "multi_agent") else None
    name = f"evaluate@{system}" if number is None else f"evaluate_round@{system}"
    with open_stage(
        name, params=settings(p), inputs=inputs, out=Path("artifacts/evaluate") / system, round=number
    ) as stage:
        stage.metrics(run(p, system, stage))


if __name__ == "__main__":
    main()
