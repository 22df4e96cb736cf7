"""The path judge, and how good it is (METHOD 1.2).

    python -m tasks.judge

`kind: model` with `train: true` (embedded) trains the generator further on graded paths, and on the verdicts
of their answers (what the answer filter may ask a model); without, the generator judges as it is.
`kind: rules` scores verifiable answers without a model.
Where data/ is annotated, the judge's agreement with the oracle is measured on validation boards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.training import Budget
from tasks import engines, params, roles
from tasks.stage import StageRun, open_stage, settings, write_json
from tasks.training_log import training_report


@dataclass(frozen=True)
class Params:
    """kind: model or rules; train: whether the model is trained on instruct's graded paths first."""

    kind: Literal["model", "rules"] = "model"
    train: bool = True
    prompts: str = "short"
    budget: Budget = field(default_factory=Budget)
    held_out_questions: int = 200


def run(p: Params, seed: int, instruct: Path, foundation: Path, stage: StageRun) -> dict[str, Any]:
    """Publish checkpoint/ (for a model judge of our own) and judge.json; returns the numbers of its training
    and its agreement."""
    from models.probe import carry_over, save_with_probe
    from models.vlm import load, save

    numbers: dict[str, Any] = {}
    write_json(stage.out / roles.JUDGE_FILE, {"kind": p.kind})
    if p.kind == "model" and engines.engine_params("path_judge").model is None:
        kept = stage.scratch / "checkpoint"
        if not (kept / "done").exists():
            model, processor = load(foundation / "generator")
            training = _train(model, processor, p, seed, instruct, stage) if p.train else None
            (save_with_probe if p.train else save)(model, processor, kept)
            (kept / "done").write_text(json.dumps(training), encoding="utf-8")
        if training := json.loads((kept / "done").read_text(encoding="utf-8")):
            numbers["training"] = training
        model, processor = load(kept)
        save(model, processor, stage.out / "checkpoint")
        carry_over(kept, stage.out / "checkpoint")
        stage.generation("judge", stage.out / "checkpoint", round=None, parents=["generator"], kind="judge")
    if (instruct / "graded.jsonl").stat().st_size:  # boards take part
        numbers["agreement"] = held_out_agreement(p, seed, stage)
    return numbers


def _train(
    model: Any, processor: Any, p: Params, seed: int, instruct: Path, stage: StageRun
) -> dict[str, float]:
    from models.sft import train_sft

    lessons, steps, images = _lessons(p.prompts, instruct), stage.scratch / "steps", _images(instruct)
    with training_report(stage, "judge") as report:
        return train_sft(model, processor, lessons, p.budget, steps, seed, images, report)


def _lessons(prompts: str, instruct: Path) -> list[Any]:
    """For every graded question its paths with their scores, for every path whether its answer is right."""
    from models.assessment import judge_prompt, scores_json
    from models.prompts import fill
    from models.reasoning import parse_thoughts
    from models.records import Question, read_jsonl
    from models.vlm import Conversation

    lessons = []
    for row in read_jsonl(instruct / "graded.jsonl"):
        question = Question("", [row["image"]], row["question"], row["answer"])
        asked = judge_prompt(prompts, question, row["paths"]).turns[0][0]
        lessons.append(Conversation([row["image"]], [(asked, scores_json(row["scores"]))]))
        for said in [parse_thoughts(path)[-1].content for path in row["paths"]]:
            text = fill(prompts, "verdict", question=question.question, truth=question.answer, answer=said)
            lessons.append(Conversation([], [(text, "1" if said == question.answer else "0")]))
    return lessons


def _images(instruct: Path) -> Any:
    from models.images import data_and_instruct_images

    return data_and_instruct_images("data", instruct)


def held_out_agreement(p: Params, seed: int, stage: StageRun) -> dict[str, Any]:
    """Agreement with the oracle on graded paths that nobody trained on, on boards of validation scans."""
    import numpy as np

    from models.agreement import agreement
    from models.boards.lessons import graded_paths
    from models.boards.scans import draw_board, pick_scans
    from models.reasoning import parse_thoughts
    from models.records import Question, ReasoningPath
    from tasks.assessing import score_all

    generator = np.random.default_rng([1, 100, seed])
    pictures: dict[str, Any] = {}
    asked: dict[str, Question] = {}
    paths: list[ReasoningPath] = []
    truths: list[float | None] = []
    for index in range(p.held_out_questions):
        board, texts, scores = graded_paths(generator)
        name = f"held-out-{index}"
        pictures[name] = draw_board(pick_scans(board.digits, "validation", generator), generator, jitter_px=1)
        asked[name] = Question(name, [name], board.text, board.answer)
        truths += scores
        for sample, text in enumerate(texts):
            steps = parse_thoughts(text)
            right = steps[-1].content == board.answer
            paths.append(ReasoningPath(name, sample, steps, text, steps[-1].content, right))
    questions, images = list(asked.values()), _pictures(pictures)
    with roles.path_judge(stage.out, p.prompts, questions, stage, images) as judge:
        scored, unreadable = score_all(paths, asked, judge)
    return agreement(scored, truths, judge.from_answers) | {"unreadable": unreadable}


def _pictures(boards: dict[str, Any]) -> Any:
    from PIL import Image

    return lambda name: Image.fromarray(boards[name]).convert("RGB")


def main() -> None:
    """Run the stage in the checkout's root."""
    p = params.load("judge", Params)
    instruct, foundation = Path("artifacts/instruct"), Path("artifacts/foundation")
    obeyed = settings(p, engines.identities("path_judge"))
    with open_stage("judge", params=obeyed, inputs=[instruct, foundation], out="artifacts/judge") as stage:
        stage.metrics(run(p, params.seed(), instruct, foundation, stage))


if __name__ == "__main__":
    main()
