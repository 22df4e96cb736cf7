"""The reasoning agent: the base fine-tuned on the reasoning set (METHOD 1.4).

python -m tasks.reasoning_sft
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from models.training import Budget
from tasks import params, roles
from tasks.stage import StageRun, open_stage, settings
from tasks.training_log import training_report

BASE, CURATED = Path("artifacts/foundation/base"), Path("artifacts/curate")


@dataclass(frozen=True)
class Params:
    """Published: 200K paths, 2 epochs, learning rate 5e-6, batch 64 a node."""

    prompts: str = "full"
    budget: Budget = field(default_factory=lambda: Budget(epochs=2, learning_rate=5e-6, batch_size=64))


def run(p: Params, seed: int, stage: StageRun) -> dict[str, float]:
    """Publish checkpoint/ and return the run's numbers."""
    from models.agents import reason_prompt
    from models.records import read_paths, read_questions
    from models.training import train_sft
    from models.vlm import Conversation, load, save

    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    conversations = []
    for path in read_paths(CURATED / "reasoning.jsonl"):
        asked = reason_prompt(p.prompts, questions[path.question_id])
        conversations.append(Conversation(asked.images, [(asked.turns[0][0], path.text)]))
    model, processor = load(BASE)
    with training_report(stage, "reasoning_sft") as report:
        numbers = train_sft(
            model, processor, conversations, p.budget, stage.scratch / "steps", seed, roles.DATA, report
        )
    save(model, processor, stage.out / "checkpoint")
    stage.generation("reasoning_sft", stage.out / "checkpoint", round=0, parents=["base"], kind="reasoning")
    return numbers


def main() -> None:
    """Run the stage in the checkout's root."""
    p = params.load("reasoning_sft", Params)
    with open_stage(
        "reasoning_sft", params=settings(p), inputs=["data", BASE, CURATED], out="artifacts/reasoning_sft"
    ) as stage:
        stage.metrics(run(p, params.seed(), stage))


if __name__ == "__main__":
    main()
