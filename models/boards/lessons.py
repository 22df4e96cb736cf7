"""What the embedded foundation is taught on its own boards: looking and answering for the base,
the step protocol for the generator, scoring for the judge.

    python -c "import numpy as np; from models.boards.lessons import turns; \
        print(turns(np.random.default_rng(0), 'short'))"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from models.boards.chains import STRATEGIES, chain, pick_strategy
from models.boards.oracle import assess_path
from models.boards.questions import (
    COLUMNS,
    DIAGONALS,
    FAMILIES,
    LINES,
    BoardQuestion,
    Digits,
    ask,
    ask_on,
    condition,
    line_digits,
    meaning,
    named,
    random_digits,
    read_cell,
    rising,
    running_extreme,
    running_sum,
    step_between,
    tally,
    two_conditions,
)
from models.boards.scans import SIDE
from models.prompts import fill
from models.reasoning import thoughts
from models.records import Step

DRILLS = {
    "add": 0.18,
    "take": 0.16,
    "extreme": 0.12,
    "leader": 0.14,
    "where": 0.08,
    "order": 0.06,
    "count": 0.2,
    "parity": 0.06,
}
"""Share of each kind of drill."""


def turns(
    generator: np.random.Generator, prompts: str, direct: int = 2, drills: int = 3
) -> tuple[Digits, list[tuple[str, str]]]:
    """A board and questions about it: reads, `direct` reasoning questions answered at once, `drills`.

    No turn holds reasoning: the base answers at once (METHOD 1.3, general visual question answering).
    """
    opening = ask(generator, "order") if generator.random() < 1 / 3 else None
    digits = opening.digits if opening else random_digits(generator)
    lesson = [_read_line(digits, generator) for _ in range(2)]
    if generator.random() < 0.3:
        rows = ", ".join(f"{line} is {_join(line_digits(digits, line))}" for line in LINES[:SIDE])
        lesson.append(("Read the board.", rows))
    for cell in (read_cell(digits, generator) for _ in range(2)):
        lesson.append((fill(prompts, "direct", question=cell.text), cell.answer))
    lesson += [drill(generator) for _ in range(drills)]
    asked = [opening] if opening else []
    while len(asked) < direct:
        question = ask_on(digits, generator, str(generator.choice([f for f in FAMILIES if f != "order"])))
        asked += [question] if question else []
    lesson += [(fill(prompts, "direct", question=q.text), q.answer) for q in asked]
    order = generator.permutation(len(lesson))
    return digits, [lesson[i] for i in order]


def _read_line(digits: Digits, generator: np.random.Generator) -> tuple[str, str]:
    line = str(generator.choice(LINES + DIAGONALS))
    back = " backwards" if generator.random() < 0.25 else ""
    return (
        f"Read the {line}{back}.",
        f"{line}{back} is {_join(line_digits(digits, line)[:: -1 if back else 1])}",
    )


def drill(generator: np.random.Generator) -> tuple[str, str]:
    """A small exercise with numbers that are written down: adding, taking away, comparing, counting."""
    values = [int(d) for d in generator.integers(0, 10, size=SIDE)]
    first, second, third = (int(n) for n in generator.integers(0, 10, size=(3, SIDE)).sum(axis=1))
    kind = str(generator.choice(list(DRILLS), p=list(DRILLS.values())))
    if kind == "add":
        return f"Add {_join(values)}.", ", ".join(running_sum(values))
    if kind == "take":
        low, high = sorted((first, second))
        work = [step_between(first, second), f"{high} - {low} = {high - low}"]
        return f"How far is {first} from {second}?", ", ".join(work)
    if kind == "extreme":
        largest = bool(generator.integers(2))
        numbers = values if generator.integers(2) else [first, second, third]
        work, _ = running_extreme(numbers, largest)
        return f"{'Largest' if largest else 'Smallest'} of {_join(numbers)}.", ", ".join(work)
    if kind == "count":
        phrase, holds = (two_conditions if generator.random() < 0.4 else condition)(generator)
        return f"Which of {_join(values)} are {phrase}?", f"{meaning(phrase, holds)}, {tally(values, holds)}"
    if kind == "leader":
        names = generator.permutation(_lines_of_a_kind(generator))[: 2 + int(generator.integers(2))].tolist()
        sums = [first, second, third][: len(names)]
        work, best = running_extreme(sums, largest=True)
        leader = names[sums.index(best)]
        return f"{', '.join(named(names, sums))}. Which leads?", f"{', '.join(work)}, {leader}"
    if kind == "where":
        wanted = int(generator.integers(SIDE))
        column = COLUMNS[values.index(values[wanted])]
        return f"{', '.join(named(COLUMNS, values))}. Where is {values[wanted]}?", f"{column} column"
    if kind == "order":
        if generator.integers(2):
            values = sorted(values)
        work, answer = rising(values)
        return f"Do {_join(values)} increase?", f"{', '.join(work)}, {answer}"
    return f"Is {first} even or odd?", f"{first} is {'odd' if first % 2 else 'even'}"


def _lines_of_a_kind(generator: np.random.Generator) -> list[str]:
    return LINES[:SIDE] if generator.integers(2) else LINES[SIDE:]


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
        if letter.isdigit()
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


def _another_answer(question: BoardQuestion, generator: np.random.Generator) -> str:
    """A wrong answer of the right kind: that of the same question family on other boards."""
    while True:
        if question.family == "read":
            other = read_cell(random_digits(generator), generator)
        else:
            other = ask(generator, question.family)
        if other.answer != question.answer:
            return other.answer


def graded_paths(generator: np.random.Generator, most: int = 4) -> tuple[BoardQuestion, list[str], list[int]]:
    """A question, one to `most` paths of mixed strategies, some spoiled or with another answer,
    and the oracle's scores."""
    question = any_question(generator)
    paths, scores = [], []
    for _ in range(int(generator.integers(1, most + 1))):
        steps = chain(question, str(generator.choice(STRATEGIES)))
        for _ in range(int(generator.choice(3, p=[0.5, 0.35, 0.15]))):
            steps = spoil(steps, generator)
        if generator.random() < 0.3:
            steps = [*steps[:-1], replace(steps[-1], content=_another_answer(question, generator))]
        right = steps[-1].content == question.answer
        scores.append(assess_path(steps, right, question.digits, question.text).score)
        paths.append(thoughts(steps))
    return question, paths, scores


def _join(digits: Sequence[int]) -> str:
    return " ".join(map(str, digits))
