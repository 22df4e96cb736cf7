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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import params
from tasks.meter import meter
from tasks.stage import open_stage, settings

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


def run(p: Params, seed: int, data: Path, out: Path) -> dict[str, int]:
    """Write the instruction set; returns counts."""
    if json.loads((data / "source.json").read_text(encoding="utf-8")).get("kind") == "boards":
        return _boards(p, seed, out)
    return _records(p, data, out)


def _boards(p: Params, seed: int, out: Path) -> dict[str, int]:
    import numpy as np

    from models.boards.lessons import demonstration, graded_paths, turns
    from models.mimicit import Instruction, Meta, write_folder
    from models.records import to_json, write_jsonl

    generator = np.random.default_rng([2306, 5425, seed])
    images: dict[str, bytes] = {}
    boards: list[dict[str, Any]] = []

    def draw(digits: Any) -> str:
        name = f"board-{len(images):06d}"
        images[name] = _png(digits, generator)
        boards.append({"image": name, "digits": digits.ravel().tolist()})
        return name

    instructions: list[Instruction] = []
    last: list[str] = []
    with meter("boards", p.boards + p.demonstrations + p.graded) as advance:
        for index in range(p.boards):
            digits, lesson = turns(generator, p.prompts, p.direct_questions, p.drills)
            image = draw(digits)
            names = [f"{image}-{turn}" for turn in range(len(lesson))]
            for turn, (asked, answer) in enumerate(lesson):
                instructions.append(Instruction(names[turn], asked, answer, [image], names[:turn]))
            last.append(names[-1])
            advance(index + 1, index + 1)
        demonstrations = []
        for index in range(p.demonstrations):
            question, strategy, steps = demonstration(generator)
            row = {"image": draw(question.digits), "question": question.text, "answer": question.answer}
            demonstrations.append({**row, "strategy": strategy, "steps": [to_json(step) for step in steps]})
            advance(p.boards + index + 1, p.boards + index + 1)
        graded = []
        for index in range(p.graded):
            question, paths, scores = graded_paths(generator, p.judge_paths)
            row = {"image": draw(question.digits), "question": question.text, "answer": question.answer}
            graded.append({**row, "paths": paths, "scores": scores})
            advance(p.boards + p.demonstrations + index + 1, p.boards + p.demonstrations + index + 1)
    write_folder(out, instructions, images, Meta("1", META_TIME, "Longview handwriting boards"), last)
    write_jsonl(out / "boards.jsonl", boards)
    write_jsonl(out / "demonstrations.jsonl", demonstrations)
    write_jsonl(out / "graded.jsonl", graded)
    return {
        "instructions": len(instructions),
        "images": len(images),
        "demonstrations": len(demonstrations),
        "graded": len(graded),
    }


def _png(digits: Any, generator: Any) -> bytes:
    from PIL import Image

    from models.boards.scans import draw_board, pick_scans

    board = draw_board(pick_scans(digits, "foundation", generator), generator, jitter_px=2, turn=0.15)
    buffer = io.BytesIO()
    Image.fromarray(board).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _records(p: Params, data: Path, out: Path) -> dict[str, int]:
    """Imported data: every training record as one instruction, asked for a direct answer."""
    from models.images import read_image
    from models.mimicit import Instruction, Meta, write_folder
    from models.prompts import fill
    from models.records import read_questions

    questions = read_questions(data / "records.jsonl", split="train")

    def rows() -> Iterator[Instruction]:
        for q in questions:
            asked = fill(p.prompts, "direct", question=q.question)
            yield Instruction(q.id, asked, q.answer, [_image_id(path) for path in q.images], [])

    paths = {_image_id(path): path for q in questions for path in q.images}
    images = {name: read_image(data, path) for name, path in sorted(paths.items())}
    instructions = list(rows())
    write_folder(out, instructions, images, Meta("1", META_TIME, "imported data"))
    return {"instructions": len(instructions), "images": len(images)}


def _image_id(path: str) -> str:
    return path.replace("/", "-")


def main() -> None:
    """Run the stage in the checkout's root."""
    p = params.load("instruct", Params)
    out = Path("artifacts/instruct")
    with open_stage("instruct", params=settings(p), inputs=["data"], out=out) as stage:
        stage.metrics(run(p, params.seed(), Path("data"), stage.out))


if __name__ == "__main__":
    main()
