"""Build data/ of the embedded profile: handwriting boards with questions, the same bytes on every machine.

    python -m tasks.boards                 # writes data/; `dvc add data` then makes it a version

No scan is in two pools (models.boards.scans.POOLS): the foundation learns from its own,
the generation stage and the preference rounds meet others, validation and test are unseen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.boards.questions import FAMILIES, BoardQuestion

QUESTIONS_PER_BOARD = 4
SHARED = [family for family in FAMILIES if family != "order"]
CREDIT = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
    "CC BY 4.0, as distributed with scikit-learn"
)


@dataclass(frozen=True)
class Part:
    """Questions of one kind: which scans they are drawn from, how many, and what they are for."""

    name: str
    scans: str
    split: str
    set: str
    questions: int
    pool: str | None = None


PARTS = (
    Part("generate", "generate", "train", "reasoning", 2400, "generate"),
    Part("generate-read", "generate", "train", "perception", 300, "generate"),
    Part("rounds", "rounds", "train", "reasoning", 6000, "rounds"),
    Part("rounds-read", "rounds", "train", "perception", 600, "rounds"),
    Part("validation", "validation", "validation", "reasoning", 600),
    Part("validation-read", "validation", "validation", "perception", 150),
    Part("test", "test", "test", "reasoning", 1500),
    Part("test-read", "test", "test", "perception", 500),
)


def build(folder: Path, parts: tuple[Part, ...] = PARTS) -> dict[str, int]:
    """Write records.jsonl, images/ and source.json; returns how many records each part has."""
    from models.records import write_jsonl
    from tasks.meter import meter

    part_folder = folder.with_name(folder.name + ".part")
    shutil.rmtree(part_folder, ignore_errors=True)
    (part_folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    with meter("questions", sum(part.questions for part in parts)) as advance:
        for number, part in enumerate(parts):
            for row in _questions(part, number, part_folder):
                rows.append(row)
                advance(len(rows), len(rows))
    write_jsonl(part_folder / "records.jsonl", rows)
    source = {"kind": "boards", "credit": CREDIT, "parts": {part.name: part.questions for part in parts}}
    (part_folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part_folder.replace(folder)
    return {part.name: part.questions for part in parts}


def _opening_family(board: int) -> str:
    """Family of a board's first question. Every third board opens with `order`,
    which sets the digits it needs, so that it is as frequent as the others;
    the rest of the board's questions come from the other families."""
    return "order" if board % 3 == 0 else SHARED[board % len(SHARED)]


def _questions(part: Part, number: int, folder: Path) -> Iterator[dict[str, Any]]:
    import numpy as np

    from models.boards.questions import ask, ask_on, random_digits, read_cell

    generator = np.random.default_rng([2411, 14432, number])
    board = 0
    for index in range(part.questions):
        turn = index % QUESTIONS_PER_BOARD
        asked: BoardQuestion | None
        if part.set == "perception":
            if turn == 0:
                digits = random_digits(generator)
            asked = read_cell(digits, generator)
        else:
            asked = ask(generator, _opening_family(index // QUESTIONS_PER_BOARD)) if turn == 0 else None
            while asked is None:
                asked = ask_on(digits, generator, str(generator.choice(SHARED)))
            digits = asked.digits
        if turn == 0:
            board += 1
            image = f"images/{part.name}-{board:05d}.png"
            _draw(digits, part.scans, generator, folder / image)
        yield {
            "id": f"{part.name}-{index:05d}",
            "images": [image],
            "question": asked.text,
            "answer": asked.answer,
            "split": part.split,
            "set": part.set,
            "pool": part.pool,
            "family": asked.family,
            "annotation": {"digits": digits.tolist()},
        }


def _draw(digits: Any, pool: str, generator: Any, path: Path) -> None:
    from PIL import Image

    from models.boards.scans import draw_board, pick_scans

    board = draw_board(pick_scans(digits, pool, generator), generator, jitter_px=1)
    Image.fromarray(board).save(path, optimize=False, compress_level=6)


def main() -> None:
    """Build data/ in the working directory."""
    counts = build(Path("data"))
    parts = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    print(f"data/: {sum(counts.values()):,} questions ({parts})")


if __name__ == "__main__":
    main()
