"""Progressive long-chain generation: N chains a question, one model call a step (METHOD 1.1).

    python -m tasks.generate

Every failed chain is a record with its reason in failures.jsonl. Chunks of questions are journalled:
killed, the next run asks only for what is missing and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.reasoning import Settings
from tasks import engines, params, roles
from tasks.ahead import judging_ahead
from tasks.outcomes import Outcomes
from tasks.sampling import Enough, open_sampler, sample_chains
from tasks.stage import StageError, StageRun, open_stage, settings

if TYPE_CHECKING:
    from models.engines.base import Engine
    from models.records import Question
    from tasks.scale_out import ScaledOut


@dataclass(frozen=True)
class Params:
    """questions: how many of the pool; samples: N chains a question; stop: fewer, once there are enough right
    and wrong ones; chunk: questions a journal entry."""

    questions: int = 2000
    samples: int = 4
    stop: Enough | None = None
    chunk: int = 64
    chain: Settings = field(default_factory=Settings)


def run(
    p: Params, seed: int, questions: Sequence[Question], engine: Engine | ScaledOut, stage: StageRun
) -> dict[str, Any]:
    """Write paths.jsonl and failures.jsonl; returns counts. Raises StageError
    when not one chain was finished."""
    from models.reasoning import progressive_chain

    with Outcomes(stage.out) as outcomes, judging_ahead("assess", questions, stage) as then:
        sample_chains(
            engine,
            questions,
            p.samples,
            lambda engine, question, sample: progressive_chain(engine, question, sample, p.chain, seed),
            [p.chain.__dict__, seed],
            p.chunk,
            stage.scratch,
            take=outcomes.add,
            stop=p.stop,
            then=then,
        )
        if not outcomes.paths:
            raise StageError(
                f"none of {outcomes.chains} chains was finished: {outcomes.reasons}. "
                "Look at one in the journal."
            )
    steps = outcomes.steps
    return {
        "questions": len(questions),
        "paths": outcomes.paths,
        "failed": outcomes.failures.total(),
        "failures": outcomes.reasons,
        "steps_mean": sum(number * count for number, count in steps.items()) / outcomes.paths,
        "steps": dict(sorted((str(number), count) for number, count in steps.items())),
    }


def main() -> None:
    """Run the stage in the checkout's root."""
    p = params.load("generate", Params)
    obeyed = settings(p, engines.identities("generator"))
    inputs: list[str | Path] = ["data", roles.GENERATOR]
    with open_stage("generate", params=obeyed, inputs=inputs, out="artifacts/generate") as stage:
        questions = roles.training_questions("generate", p.questions)
        with open_sampler("generator", roles.GENERATOR, questions, stage) as engine:
            stage.metrics(run(p, params.seed(), questions, engine, stage))


if __name__ == "__main__":
    main()
