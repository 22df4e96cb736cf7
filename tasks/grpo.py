"""How a round trains by GRPO instead of on pairs: the section `grpo`, for rounds with `trainer: grpo`
(METHOD 1.4).

    numbers = train(params.load("grpo", Params), seed, this, stage, model, processor)

It is the stage `dpo` that runs it (tasks.dpo): checkpoint, generation and evaluation are those of any round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from models.adapters import Lora
from models.distributed import processes
from models.grpo import Grpo
from models.rewards import RewardWeights
from models.training import Budget
from tasks import roles, rounds
from tasks.assessing import by_question, mixed
from tasks.stage import StageError, StageRun
from tasks.training_log import training_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Params:
    """group: a question's completions and their loss. budget.batch_size counts completions."""

    prompts: str = "full"
    answer_filter: Literal["rules", "model"] = "rules"
    group: Grpo = field(default_factory=Grpo)
    reward: RewardWeights = field(default_factory=RewardWeights)
    lora: Lora | None = None
    budget: Budget = field(default_factory=lambda: Budget(epochs=1, learning_rate=1e-6, batch_size=64))


def train(
    p: Params,
    seed: int,
    this: rounds.Round,
    stage: StageRun,
    model: PreTrainedModel,
    processor: ProcessorMixin,
) -> dict[str, Any]:
    """Train M_t in place on the round's questions that it answers sometimes right and sometimes wrong;
    returns the run's numbers. Raises StageError without such questions."""
    from models.agents import reason_prompt
    from models.grpo import train_grpo
    from models.records import read_paths, read_questions
    from models.rewards import judged_reward

    paths = read_paths(this.folder("score") / "paths.jsonl")
    names = list(by_question(mixed(paths)))
    if not names:
        raise StageError(
            f"round {this.t} has no question with right and wrong paths, and GRPO learns from no other: "
            "sample more questions or paths, or raise the temperature"
        )
    if processes() > 1 and "model" in (p.answer_filter, roles.judge_kind(roles.JUDGE)):
        raise StageError(
            "several processes cannot share a model as judge: train by GRPO in one, or with judge.kind: "
            "rules and grpo.answer_filter: rules"
        )
    asked = roles.by_id(read_questions(roles.RECORDS, split="train"))
    questions = [asked[name] for name in names]
    with (
        roles.answer_filter(p.answer_filter, questions, stage) as filter,
        roles.path_judge(roles.JUDGE, p.prompts, questions, stage) as judge,
        training_report(stage, "grpo") as report,
    ):
        numbers = train_grpo(
            model,
            processor,
            [reason_prompt(p.prompts, question) for question in questions],
            judged_reward(questions, p.reward, p.prompts, judge, filter),
            p.group,
            p.budget,
            stage.scratch / "steps",
            seed,
            roles.DATA,
            report,
        )
    return {**numbers, "left_out": len(by_question(paths)) - len(questions)}
