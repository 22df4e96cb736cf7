"""Instruction data for the foundation, in MIMIC-IT's format (METHOD 2.1).

    python -m tasks.instruct

For the handwriting boards: questions with direct answers on boards of their own scans,
one conversation a board (each question's in-context examples are the earlier ones on the same image),
and beside them demonstrations of the step protocol and graded paths for the generator and the judge.
For imported data: its training records.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.mimicit import Instruction, Meta, write_folder
from models.records import read_questions, to_json, write_jsonl
from tasks import params
from tasks.meter import meter
from tasks.stage import StageError, open_stage, settings

META_TIME = "2026-01-01T00:00:00"


@dataclass(frozen=True)
class Params:
    """How much to teach. boards: conversations; demonstrations: chains;
    graded: questions with scored paths."""

    prompts: str = "short"
    boards: int = 6000
    direct_questions: int = 2
    drills: int = 3
    demonstrations: int = 5000
    graded: int = 2500
    judge_paths: int = 4


class InstructionSet:
    """What the stage collects: instructions with their images, demonstrations and graded paths."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.trained: list[str] = []
        self.images: dict[str, bytes] = {}
        self.boards: list[dict[str, Any]] = []
        self.demonstrations: list[dict[str, Any]] = []
        self.graded: list[dict[str, Any]] = []

    def board(self, digits: Any, generator: Any) -> str:
        """Draw a board of the foundation's scans; returns its image id."""
        name = f"board-{len(self.boards):06d}"
        self.images[name] = _png(digits, generator)
        self.boards.append({"image": name, "digits": digits.ravel().tolist()})
        return name

    def conversation(self, image_ids: list[str], name: str, turns: list[tuple[str, str]]) -> None:
        """One conversation: every turn an instruction whose in-context examples are the earlier ones."""
        names = [f"{name}-{turn}" for turn in range(len(turns))]
        for turn, (asked, answer) in enumerate(turns):
            self.instructions.append(Instruction(names[turn], asked, answer, image_ids, names[:turn]))
        self.trained.append(names[-1])

    def write(self, out: Path) -> dict[str, int]:
        """Write everything that was collected; returns counts."""
        write_folder(out, self.instructions, self.images, Meta("1", META_TIME, "Longview"), self.trained)
        counts = {"instructions": len(self.instructions), "images": len(self.images)}
        for name in ("boards", "demonstrations", "graded"):
            counts[name] = write_jsonl(out / f"{name}.jsonl", getattr(self, name))
        return counts


def run(p: Params, seed: int, data: Path, out: Path) -> dict[str, int]:
    """Write the instruction set; returns counts. Raises StageError where there is nothing to teach."""
    collected = InstructionSet()
    _board_lessons(p, seed, collected)
    if json.loads((data / "source.json").read_text(encoding="utf-8")).get("kind") != "boards":
        _imported(p, data, collected)
    if not collected.instructions:
        raise StageError("no instructions: set instruct.boards, or import training records")
    return collected.write(out)


def _board_lessons(p: Params, seed: int, collected: InstructionSet) -> None:
    import numpy as np

    from models.boards.lessons import demonstration, graded_paths, turns

    generator = np.random.default_rng([2306, 5425, seed])
    done = 0
    with meter("boards", p.boards + p.demonstrations + p.graded) as advance:

        def count() -> None:
            nonlocal done
            done += 1
            advance(done, done)

        for _ in range(p.boards):
            digits, lesson = turns(generator, p.prompts, p.direct_questions, p.drills)
            image = collected.board(digits, generator)
            collected.conversation([image], image, lesson)
            count()
        for _ in range(p.demonstrations):
            question, strategy, steps = demonstration(generator)
            row = {"image": collected.board(question.digits, generator), "question": question.text}
            row |= {"answer": question.answer, "strategy": strategy}
            collected.demonstrations.append({**row, "steps": [to_json(step) for step in steps]})
            count()
        for _ in range(p.graded):
            question, paths, scores = graded_paths(generator, p.judge_paths)
            row = {"image": collected.board(question.digits, generator), "question": question.text}
            collected.graded.append({**row, "answer": question.answer, "paths": paths, "scores": scores})
            count()


def _imported(p: Params, data: Path, collected: InstructionSet) -> None:
    """Imported data: every training record as one instruction, asked for a direct answer."""
    from models.images import read_image
    from models.prompts import fill

    for question in read_questions(data / "records.jsonl", split="train"):
        names = [path.replace("/", "-") for path in question.images]
        for name, path in zip(names, question.images, strict=True):
            collected.images.setdefault(name, read_image(data, path))
        asked = fill(p.prompts, "direct", question=question.question)
        collected.conversation(names, question.id, [(asked, question.answer)])


def _png(digits: Any, generator: Any) -> bytes:
    from PIL import Image

    from models.boards.scans import draw_board, pick_scans

    board = draw_board(pick_scans(digits, "foundation", generator), generator, jitter_px=2, turn=0.15)
    buffer = io.BytesIO()
    Image.fromarray(board).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def main() -> None:
    """Run the stage in the checkout's root."""
    p = params.load("instruct", Params)
    out = Path("artifacts/instruct")
    with open_stage("instruct", params=settings(p), inputs=["data"], out=out) as stage:
        stage.metrics(run(p, params.seed(), Path("data"), stage.out))


if __name__ == "__main__":
    main()
