"""The summary agent: the base fine-tuned to judge a chain and answer,
with general questions mixed in (METHOD 1.4).

python -m tasks.summary_sft
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.adapters import Lora
from models.training import Budget
from tasks import launch, params, roles
from tasks.stage import StageRun, open_stage, settings
from tasks.training_log import training_report

BASE, RECORDS, INSTRUCT = (
    Path("artifacts/foundation/base"),
    Path("artifacts/summary_data"),
    Path("artifacts/instruct"),
)


@dataclass(frozen=True)
class Params:
    """general: conversations of instruct's set for every summary record.
    Published: 1.2M records, 1 epoch, rate 1e-5."""

    prompts: str = "full"
    general: float = 0.5
    lora: Lora | None = None
    budget: Budget = field(default_factory=lambda: Budget(epochs=1, learning_rate=1e-5, batch_size=16))


def conversations(p: Params, seed: int) -> list[Any]:
    """Summary records and a random share of the general conversations, as training conversations."""
    from models.agents import summary_prompt
    from models.mimicit import general_conversations
    from models.records import read_jsonl, read_questions
    from models.vlm import Conversation

    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    rows = []
    for row in read_jsonl(RECORDS / "records.jsonl"):
        asked = summary_prompt(p.prompts, questions[row["question_id"]], row["thoughts"])
        rows.append(Conversation(asked.images, [(asked.turns[0][0], row["answer"])]))
    return rows + general_conversations(INSTRUCT, round(p.general * len(rows)), seed)


def run(p: Params, seed: int, stage: StageRun) -> dict[str, float]:
    """Publish checkpoint/ and return the run's numbers."""
    from models.adapters import finished, load_for_training
    from models.images import data_and_instruct_images
    from models.probe import save_with_probe
    from models.sft import train_sft

    model, processor = load_for_training(BASE, p.lora, seed, p.budget.bf16)
    images = data_and_instruct_images(roles.DATA, INSTRUCT)
    with training_report(stage, "summary_sft") as report:
        numbers = train_sft(
            model, processor, conversations(p, seed), p.budget, stage.scratch / "steps", seed, images, report
        )
    if stage.first:
        save_with_probe(finished(model), processor, stage.out / "checkpoint")
    stage.generation("summary_sft", stage.out / "checkpoint", round=None, parents=["base"], kind="summary")
    return numbers


def main() -> None:
    """Run the stage in the checkout's root."""
    launch.spread()
    p = params.load("summary_sft", Params)
    inputs: list[str | Path] = ["data", BASE, RECORDS, INSTRUCT]
    with open_stage("summary_sft", params=settings(p), inputs=inputs, out="artifacts/summary_sft") as stage:
        stage.metrics(run(p, params.seed(), stage))


if __name__ == "__main__":
    main()
