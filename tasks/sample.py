"""Round t, first stage: sample N paths a question from the current policy M_t (METHOD 1.4).

    python -m tasks.sample --round r1

Each round asks questions of the pool `rounds` that the rounds before did not, as long as there are any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks import engines, params, roles, rounds
from tasks.ahead import judging_ahead
from tasks.outcomes import Outcomes
from tasks.sampling import Enough, Row, open_sampler, sample_reasoner
from tasks.stage import StageError, StageRun, open_stage, settings


@dataclass(frozen=True)
class Params:
    """questions: of each round; samples: paths a question; stop: fewer, once there are enough right and wrong
    ones. most_cut: share of the paths that may reach max_new_tokens; beyond it the policy has run away."""

    prompts: str = "full"
    questions: int = 2000
    samples: int = 8
    stop: Enough | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 4096
    most_cut: float = 0.5
    chunk: int = 64


def run(p: Params, seed: int, this: rounds.Round, stage: StageRun) -> dict[str, Any]:
    """Write paths.jsonl and failures.jsonl; returns counts. Raises StageError when no path is usable, or
    their length has run away."""
    from models.agents import CUT_OFF
    from models.engines.base import derived_seed

    def take(row: Row) -> None:
        if "reason" not in row:
            row["answer"] = row["steps"][-1]["content"]
        outcomes.add(row)

    questions = roles.training_questions("rounds", p.questions, offset=(this.t - 1) * p.questions)
    with Outcomes(stage.out) as outcomes:
        with (
            judging_ahead("score", questions, stage) as then,
            open_sampler("reasoner", this.checkpoint, questions, stage) as engine,
        ):
            sample_reasoner(
                engine, questions, p, derived_seed(seed, this.t), stage.scratch, take, p.stop, then
            )
        if not outcomes.paths:
            raise StageError(
                f"none of {outcomes.chains} sampled paths could be read: "
                f"is {this.checkpoint} a reasoning agent?"
            )
        cut = outcomes.failures[CUT_OFF] / outcomes.chains
        if cut > p.most_cut:
            raise StageError(
                f"{cut:.0%} of {outcomes.chains:,} sampled paths reach the limit of {p.max_new_tokens} "
                f"tokens: {this.checkpoint} has run away in length, and pairs of what is left would teach it "
                "more of that. Train it anew with a lower dpo.budget.learning_rate, more weight of `sft` in "
                "dpo.loss, or score.scope `step`; if these are good chains, raise sample.max_new_tokens (or "
                "the rule, sample.most_cut)"
            )
    return {
        "questions": len(questions),
        "paths": outcomes.paths,
        "failed": outcomes.failures.total(),
        "failures": outcomes.reasons,
    }


def main() -> None:
    """Run the stage in the checkout's root."""
    this, p = rounds.from_arguments(__doc__), params.load("sample", Params)
    with open_stage(
        "sample",
        params=settings(p, engines.identities("reasoner")),
        inputs=["data", this.checkpoint],
        out=this.folder("sample"),
        round=this.t,
    ) as stage:
        stage.metrics(run(p, params.seed(), this, stage))


if __name__ == "__main__":
    main()
