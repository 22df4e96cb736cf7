"""The models that every later stage starts from (METHOD 1.4,
ARCHITECTURE of the embedded profile in docs/method.md).

    python -m tasks.foundation

With `hub` set: resolve and verify that model at its pinned revision. Without: train the embedded one,
first its vision tower, then the *base* on instruction data (it looks and answers at once,
and has seen no chain), then from the base the *generator*, which follows the step protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.alignment import Alignment
from models.tiny import TinyConfig
from models.training import Budget
from tasks import params
from tasks.meter import meter
from tasks.stage import StageError, StageRun, open_stage, settings
from tasks.training_log import training_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from models.families import Family
    from models.vlm import Encoder


@dataclass(frozen=True)
class Params:
    """hub: "owner/name@<40-digit revision>", or None to train the embedded model with the rest.

    replay: conversations of the base among the generator's demonstrations, so that it keeps what it knows.
    """

    hub: str | None = None
    prompts: str = "short"
    sizes: TinyConfig = field(default_factory=TinyConfig)
    vision: Alignment = field(default_factory=Alignment)
    base: Budget = field(default_factory=Budget)
    generator: Budget = field(default_factory=Budget)
    replay: int = 0


def families() -> Sequence[Family]:
    """The families of models that a foundation may be of."""
    from models.families import FAMILIES

    return FAMILIES


def run(p: Params, seed: int, instruct: Path, stage: StageRun) -> dict[str, Any]:
    """Publish base/ and generator/ (or the verified hub reference) and return numbers."""
    if p.hub:
        return _resolve(p.hub, stage)
    from transformers import set_seed

    from models.images import data_and_instruct_images
    from models.mimicit import general_conversations
    from models.probe import carry_over, save_with_probe
    from models.vlm import Encoder, load, save

    set_seed(seed)
    images = data_and_instruct_images("data", instruct)
    encoder: Encoder | None = None  # one for all: every board is opened and processed once
    numbers: dict[str, Any] = {}
    lessons = general_conversations(instruct)
    for role, parent, conversations, budget in (
        ("base", None, lessons, p.base),
        ("generator", "base", [*_protocol(instruct, p.prompts), *lessons[: p.replay]], p.generator),
    ):
        kept = stage.scratch / role
        if not (kept / "done").exists():
            if parent:
                model, processor = load(stage.scratch / parent)
                encoder = encoder or Encoder(processor, images)
            else:
                model, encoder = _new_model(p, seed, instruct, images, stage)
                processor = encoder.processor
            numbers[role] = _train(role, model, encoder, conversations, budget, seed, stage)
            save_with_probe(model, processor, kept)
            (kept / "done").write_text(_dump(numbers[role]))
        numbers[role] = _read(kept / "done")
    for role in ("base", "generator"):
        model, processor = load(stage.scratch / role)
        save(model, processor, stage.out / role)
        carry_over(stage.scratch / role, stage.out / role)
        stage.generation(
            role, stage.out / role, round=None, parents=[] if role == "base" else ["base"], kind=role
        )
    return numbers


def _train(
    role: str,
    model: PreTrainedModel,
    encoder: Encoder,
    conversations: list[Any],
    budget: Budget,
    seed: int,
    stage: StageRun,
) -> dict[str, Any]:
    from models.sft import train_sft

    steps = stage.scratch / f"{role}-steps"
    with training_report(stage, role) as report:
        return train_sft(model, encoder.processor, conversations, budget, steps, seed, encoder, report)


def _new_model(
    p: Params, seed: int, instruct: Path, images: Callable[[str], Any], stage: StageRun
) -> tuple[PreTrainedModel, Encoder]:
    """Tokenizer from the lessons' texts, untrained model, vision pre-training on the boards."""
    import torch

    from models.alignment import align_vision
    from models.records import read_jsonl
    from models.tiny import build_model, build_processor, train_tokenizer
    from models.vlm import Encoder

    tokenizer = train_tokenizer(_texts(instruct, p.prompts), p.sizes.vocabulary)
    processor = build_processor(tokenizer, p.sizes)
    torch.manual_seed(seed)
    model = build_model(p.sizes, tokenizer)
    boards = list(read_jsonl(instruct / "boards.jsonl"))
    encoder = Encoder(processor, images, cache=len(boards))

    def pixels(chosen: list[int]) -> torch.Tensor:
        return torch.cat([encoder.pixels([boards[i]["image"]])["pixel_values"][:, 0] for i in chosen])

    with meter("steps of vision", p.vision.steps) as advance:

        def report(loss: float, step: int, steps: int) -> None:
            advance(step, step)
            stage.log_metrics({"vision/loss": loss}, step=step)

        align_vision(model, pixels, torch.tensor([b["digits"] for b in boards]), p.vision, seed, report)
    return model, encoder


def _protocol(instruct: Path, prompts: str) -> list[Any]:
    """Demonstrations of the step protocol: one turn a step, then the answer (METHOD 1.1)."""
    from models.prompts import fill, prompt
    from models.reasoning import step_json
    from models.records import Step, read_jsonl
    from models.vlm import Conversation

    conversations = []
    for row in read_jsonl(instruct / "demonstrations.jsonl"):
        steps = [Step(**step) for step in row["steps"]]
        asked = [fill(prompts, "step", question=row["question"])] + [prompt(prompts, "next")] * (
            len(steps) - 1
        )
        turns = [(user, step_json(step)) for user, step in zip(asked, steps, strict=True)]
        conversations.append(
            Conversation([row["image"]], [*turns, (prompt(prompts, "answer"), row["answer"])])
        )
    return conversations


def _texts(instruct: Path, prompts: str) -> list[str]:
    """Everything the embedded model will read or write, for its tokenizer."""
    from models.assessment import judge_prompt, scores_json
    from models.mimicit import general_conversations
    from models.prompts import ROLES, prompt
    from models.records import Question, read_jsonl

    texts = [prompt(prompts, role) for role in ROLES]
    texts += [text for c in general_conversations(instruct)[:2000] for turn in c.turns for text in turn]
    texts += [text for c in _protocol(instruct, prompts)[:2000] for turn in c.turns for text in turn]
    for row in list(read_jsonl(instruct / "graded.jsonl"))[:500]:
        question = Question("", [], row["question"], row["answer"])
        texts += [judge_prompt(prompts, question, row["paths"]).turns[0][0], scores_json(row["scores"])]
    return texts


def _resolve(hub: str, stage: StageRun) -> dict[str, Any]:
    """Fetch exactly the pinned revision of a hub model, as base and generator."""
    import re

    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", hub)
    if not match:
        raise StageError(f"foundation.hub: expected owner/name@<40 hex digits of a revision>, found {hub!r}")
    from models.vlm import load, save

    model, processor = load(match.group(1), dtype="auto", revision=match.group(2))
    for role in ("base", "generator"):
        save(model, processor, stage.out / role)
        stage.generation(role, stage.out / role, round=None, parents=[], kind=role)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def _dump(value: Any) -> str:
    import json

    return json.dumps(value)


def _read(path: Path) -> Any:
    import json

    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Run the stage in the checkout's root."""
    p = params.load("foundation", Params)
    with open_stage(
        "foundation", params=settings(p), inputs=["artifacts/instruct"], out="artifacts/foundation"
    ) as stage:
        stage.metrics(run(p, params.seed(), Path("artifacts/instruct"), stage))


if __name__ == "__main__":
    main()
