"""The reasoning agent: the base fine-tuned on the reasoning set (METHOD 1.4).

python -m tasks.reasoning_sft
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from models.adapters import Lora
from models.training import Budget
from tasks import launch, params, roles
from tasks.stage import StageRun, open_stage, settings
from tasks.training_log import training_report

BASE, CURATED, INSTRUCT = (
    Path("artifacts/foundation/base"),
    Path("artifacts/curate"),
    Path("artifacts/instruct"),
)


@dataclass(frozen=True)
class Params:
    """general: conversations of instruct's set for every path, for models that would forget what they saw
    (published: none). Published: 200K paths, 2 epochs, learning rate 5e-6, batch 64 a node."""

    prompts: str = "full"
    general: float = 0.0
    lora: Lora | None = None
    budget: Budget = field(default_factory=lambda: Budget(epochs=2, learning_rate=5e-6, batch_size=64))


def run(p: Params, seed: int, stage: StageRun) -> dict[str, float]:
    """Publish checkpoint/ and return the run's numbers."""
    from models.adapters import finished, load_for_training
    from models.agents import reason_prompt
    from models.images import data_and_instruct_images
    from models.mimicit import general_conversations
    from models.probe import save_with_probe
    from models.records import read_paths, read_questions
    from models.sft import train_sft
    from models.vlm import Conversation

    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    conversations = []
    for path in read_paths(CURATED / "reasoning.jsonl"):
        asked = reason_prompt(p.prompts, questions[path.question_id])
        conversations.append(Conversation(asked.images, [(asked.turns[0][0], path.text)]))
    conversations += general_conversations(INSTRUCT, round(p.general * len(conversations)), seed)
    images = data_and_instruct_images(roles.DATA, INSTRUCT)
    model, processor = load_for_training(BASE, p.lora, seed, p.budget.bf16)
    with training_report(stage, "reasoning_sft") as report:
        numbers = train_sft(
            model, processor, conversations, p.budget, stage.scratch / "steps", seed, images, report
        )
    if stage.first:
        save_with_probe(finished(model), processor, stage.out / "checkpoint")
    stage.generation("reasoning_sft", stage.out / "checkpoint", round=0, parents=["base"], kind="reasoning")
    return numbers


def main() -> None:
    """Run the stage in the checkout's root."""
    launch.spread()
    p = params.load("reasoning_sft", Params)
    inputs: list[str | Path] = ["data", BASE, CURATED, INSTRUCT]
    with open_stage(
        "reasoning_sft", params=settings(p), inputs=inputs, out="artifacts/reasoning_sft"
    ) as stage:
        stage.metrics(run(p, params.seed(), stage))


if __name__ == "__main__":
    main()
