"""Round t, third stage: training of M_t on its own paths, which gives M_{t+1} (METHOD 1.4): on their pairs
or, in a round with `trainer: grpo`, by group relative policy optimisation.

python -m tasks.dpo --round r1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from models.adapters import Lora
from models.preference import PreferenceLoss
from models.training import Budget
from tasks import engines, grpo, launch, params, roles, rounds
from tasks.stage import StageRun, open_stage, settings
from tasks.training_log import training_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

SIDES = ("chosen", "rejected", "prefix", "chosen_goes_on", "rejected_goes_on")


@dataclass(frozen=True)
class Params:
    """reference: the policy of this round (`previous`) or the reasoning agent (`sft`). share_prompts: one
    forward pass over a prompt and both completions. Published: 1 epoch, rate 5e-7."""

    prompts: str = "full"
    reference: Literal["previous", "sft"] = "previous"
    loss: PreferenceLoss = field(default_factory=PreferenceLoss)
    share_prompts: bool = True
    lora: Lora | None = None
    budget: Budget = field(default_factory=lambda: Budget(epochs=1, learning_rate=5e-7, batch_size=64))


def run(p: Params | grpo.Params, seed: int, this: rounds.Round, stage: StageRun) -> dict[str, Any]:
    """Publish checkpoint/ and return the run's numbers."""
    from models.adapters import finished, load_for_training
    from models.probe import save_with_probe

    model, processor = load_for_training(this.checkpoint, p.lora, seed, p.budget.bf16)
    if isinstance(p, Params):
        numbers = train_on_pairs(p, seed, this, stage, model, processor)
    else:
        numbers = grpo.train(p, seed, this, stage, model, processor)
    if stage.first:
        save_with_probe(finished(model), processor, stage.out / "checkpoint")
    stage.generation(
        f"dpo_r{this.t}", stage.out / "checkpoint", round=this.t, parents=[this.parent], kind="reasoning"
    )
    return numbers


def train_on_pairs(
    p: Params,
    seed: int,
    this: rounds.Round,
    stage: StageRun,
    model: PreTrainedModel,
    processor: ProcessorMixin,
) -> dict[str, float]:
    """Train M_t in place on the pairs of `score`; returns the run's numbers."""
    from models.agents import reason_prompt
    from models.pairs import PreferenceExample
    from models.preference import train_preference
    from models.records import read_jsonl, read_questions
    from models.vlm import load

    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    pairs = [
        PreferenceExample(
            reason_prompt(p.prompts, questions[row["question_id"]]), **{name: row[name] for name in SIDES}
        )
        for row in read_jsonl(this.folder("score") / "pairs.jsonl")
    ]
    with training_report(stage, "dpo") as report:
        return train_preference(
            model,
            None if p.reference == "previous" else load(rounds.REASONING_SFT)[0],
            processor,
            pairs,
            p.loss,
            p.budget,
            stage.scratch / "steps",
            seed,
            roles.DATA,
            report,
            p.share_prompts,
        )


def main() -> None:
    """Run the stage in the checkout's root."""
    launch.spread()
    this = rounds.from_arguments(__doc__)
    p: Params | grpo.Params
    if this.trainer == "grpo":
        p = params.load("grpo", grpo.Params)
        obeyed = settings(p, engines.identities("answer_judge", "path_judge"))
        inputs = ["data", this.folder("score"), this.checkpoint, roles.JUDGE, roles.GENERATOR]
    else:
        p = params.load("dpo", Params)
        obeyed = settings(p)
        inputs = ["data", this.folder("score"), this.checkpoint, rounds.REASONING_SFT]
    with open_stage(
        "dpo",
        params=obeyed,
        inputs=sorted({str(path) for path in inputs}),
        out=this.folder("dpo"),
        round=this.t,
    ) as stage:
        stage.metrics(run(p, params.seed(), this, stage))


if __name__ == "__main__":
    main()
