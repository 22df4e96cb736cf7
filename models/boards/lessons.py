"""What the embedded foundation is taught on its own boards: looking and answering for the base,
the step protocol for the generator, scoring for the judge.

    python -c "import numpy as np; from models.boards.lessons import turns; \
        print(turns(np.random.default_rng(0), 'short'))"
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.boards.chains import STRATEGIES, chain, pick_strategy
from models.boards.oracle import assess_path
from models.boards.questions import (
    FAMILIES,
    BoardQuestion,
    Digits,
    ask,
    ask_on,
    line_digits,
    random_digits,
    read_cell,
)
from models.boards.scans import SIDE
from models.prompts import fill
from models.reasoning import thoughts
from models.records import Step

LINES = [f"{kind} {i}" for kind in ("row", "column") for i in range(1, SIDE + 1)] + [
    "diagonal",
    "other diagonal",
]


def turns(
    generator: np.random.Generator, prompts: str, direct: int = 2
) -> tuple[Digits, list[tuple[str, str]]]:
    """A board and questions with direct answers about it: reads,
    sums of numbers, `direct` reasoning questions.

    No turn holds reasoning: the base answers at once (METHOD 1.3, general visual question answering).
    """
    opening = ask(generator, "order") if generator.random() < 1 / 3 else None
    digits = opening.digits if opening else random_digits(generator)
    lesson = [
        (
            "Read the board.",
            ", ".join(f"row {i + 1} is {_join(row)}" for i, row in enumerate(digits.tolist())),
        )
    ]
    lesson += [
        (f"Read {line}.", _join(line_digits(digits, line)))
        for line in generator.choice(LINES, size=2, replace=False)
    ]
    cell = read_cell(digits, generator)
    lesson.append((fill(prompts, "direct", question=cell.text), cell.answer))
    a, b = int(generator.integers(0, 19)), int(generator.integers(0, 10))
    lesson.append((f"What is {a} + {b}?", str(a + b)))
    asked = [opening] if opening else []
    while len(asked) < direct:
        question = ask_on(digits, generator, str(generator.choice([f for f in FAMILIES if f != "order"])))
        asked += [question] if question else []
    lesson += [(fill(prompts, "direct", question=q.text), q.answer) for q in asked]
    order = generator.permutation(len(lesson))
    return digits, [lesson[i] for i in order]


def demonstration(generator: np.random.Generator) -> tuple[BoardQuestion, str, list[Step]]:
    """A question, a strategy drawn by its family's shares, and the chain that follows it."""
    question = any_question(generator)
    strategy = pick_strategy(question.family, generator)
    return question, strategy, chain(question, strategy)


def any_question(generator: np.random.Generator) -> BoardQuestion:
    """A reasoning question of any family, or (one in eight) a single read."""
    if generator.random() < 1 / 8:
        return read_cell(random_digits(generator), generator)
    return ask(generator)


def spoil(steps: Sequence[Step], generator: np.random.Generator) -> list[Step]:
    """The chain with one digit of one step changed: a slip of the eye or of arithmetic."""
    places = [
        (index, position)
        for index, step in enumerate(steps)
        for position, letter in enumerate(step.content)
        if letter.isdigit() and not step.content[:position].endswith(("row ", "column ", "place "))
    ]
    if not places:
        return list(steps)
    index, position = places[int(generator.integers(len(places)))]
    content = steps[index].content
    wrong = str((int(content[position]) + int(generator.integers(1, 10))) % 10)
    spoiled = list(steps)
    spoiled[index] = Step(
        steps[index].title, content[:position] + wrong + content[position + 1 :], steps[index].next_action
    )
    return spoiled


def graded_paths(generator: np.random.Generator, most: int = 4) -> tuple[BoardQuestion, list[str], list[int]]:
    """A question, two to `most` paths of mixed strategies, some spoiled, and the oracle's scores."""
    question = any_question(generator)
    paths, scores = [], []
    for _ in range(int(generator.integers(2, most + 1))):
        steps = chain(question, str(generator.choice(STRATEGIES)))
        for _ in range(int(generator.choice(3, p=[0.5, 0.35, 0.15]))):
            steps = spoil(steps, generator)
        right = steps[-1].content == question.answer
        scores.append(assess_path(steps, right, question.digits).score)
        paths.append(thoughts(steps))
    return question, paths, scores


def _join(digits: Sequence[int]) -> str:
    return " ".join(map(str, digits))
