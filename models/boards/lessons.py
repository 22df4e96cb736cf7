"""What the embedded foundation is taught on its own boards: looking and answering for the base,
the step protocol for the generator, scoring for the judge.

    python -c "import numpy as np; from models.boards.lessons import turns; \
        print(turns(np.random.default_rng(0), 'short'))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from models.boards.chains import STRATEGIES, chain, pick_strategy
from models.boards.oracle import assess_path
from models.boards.questions import (
    COLUMNS,
    DIAGONALS,
    EXTREMES,
    FAMILIES,
    LINES,
    ROWS,
    BoardQuestion,
    Digits,
    ask,
    ask_on,
    condition,
    line_digits,
    meaning,
    named,
    order_of,
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

Retell = Callable[[Digits], BoardQuestion | None]
"""The same question about other digits; None where they give none."""

READS = 1 / 8
"""Share of single reads among the questions with chains."""

DRILLS = {
    "add": 0.28,
    "take": 0.14,
    "extreme": 0.10,
    "leader": 0.16,
    "order": 0.04,
    "count": 0.18,
    "parity": 0.10,
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
    if generator.random() < 0.15:
        row = ROWS[generator.integers(SIDE)]
        cells = [f"{row} {column}" for column in COLUMNS]
        said = ", ".join(f"{cell} is {_join(line_digits(digits, cell))}" for cell in cells)
        return f"Read the {row} row cell by cell.", said
    line = str(generator.choice(LINES + DIAGONALS))
    back = " backwards" if generator.random() < 0.25 else ""
    return (
        f"Read the {line}{back}.",
        f"{line}{back} is {_join(line_digits(digits, line)[:: -1 if back else 1])}",
    )


def drill(generator: np.random.Generator) -> tuple[str, str]:
    """A small exercise with numbers that are written down: adding, taking away, comparing, counting."""
    values = [int(d) for d in generator.integers(0, 10, size=SIDE)]
    sums = [int(n) for n in generator.integers(0, 10, size=(SIDE, SIDE)).sum(axis=1)]
    names = generator.permutation(_places(generator))[: 2 + int(generator.integers(2))].tolist()
    kind = str(generator.choice(list(DRILLS), p=list(DRILLS.values())))
    if kind == "add" and generator.random() < 0.3:
        counts = [int(n) for n in generator.integers(0, SIDE + 1, size=len(names))]
        return f"{', '.join(named(names, counts))}. How many?", ", ".join(running_sum(counts))
    if kind == "add":
        return f"Add {_join(values)}.", ", ".join(running_sum(values))
    if kind == "take":
        low, high = sorted(sums[:2])
        work = [step_between(*sums[:2]), f"{high} - {low} = {high - low}"]
        return f"{', '.join(named(names[:2], sums[:2]))}. How far apart?", ", ".join(work)
    if kind in ("extreme", "leader"):
        word = str(generator.choice(EXTREMES))
        numbers = values if generator.integers(2) else sums
        if kind == "extreme":
            return f"{word} of {_join(numbers)}?", ", ".join(running_extreme(numbers, word)[0])
        work, _ = running_extreme(numbers[: len(names)], word, names)
        return f"{', '.join(named(names, numbers[: len(names)]))}. Which is {word}?", ", ".join(work)
    if kind == "count":
        phrase, holds = (two_conditions if generator.random() < 0.4 else condition)(generator)
        return f"Which of {_join(values)} are {phrase}?", f"{meaning(phrase, holds)}, {tally(values, holds)}"
    if kind == "order":
        if generator.integers(2):
            values = sorted(values)
        work, answer = rising(values)
        return f"Do {_join(values)} increase?", f"{', '.join(work)}, {answer}"
    number = int(generator.integers(SIDE * 9 + 1))
    return f"Is {number} even or odd?", f"{number} is {'odd' if number % 2 else 'even'}"


def _places(generator: np.random.Generator) -> list[str]:
    """Names that stand side by side in a question: rows, columns, or the places of a row."""
    return (LINES[:SIDE], LINES[SIDE:], list(COLUMNS))[generator.integers(3)]


def demonstration(generator: np.random.Generator) -> tuple[BoardQuestion, str, list[Step]]:
    """A question, a strategy drawn by its family's shares, and the chain that follows it."""
    family = _any_family(generator)
    question = read_cell(random_digits(generator), generator) if family == "read" else ask(generator, family)
    strategy = pick_strategy(question.family, generator)
    return question, strategy, chain(question, strategy)


def _any_family(generator: np.random.Generator) -> str:
    return "read" if generator.random() < READS else str(generator.choice(list(FAMILIES)))


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


def misread(question: BoardQuestion, retell: Retell, generator: np.random.Generator) -> BoardQuestion:
    """The question as one sees it who takes one of its digits for another: the working follows from that,
    and so does the answer. The question itself where no other digit gives one."""
    seen = [digit for _, line in question.plan.reads for digit in line]
    for cell in generator.permutation(SIDE * SIDE):
        digits = question.digits.copy()
        digits.flat[cell] = (digits.flat[cell] + generator.integers(1, 10)) % 10
        other = retell(digits)
        if other and [digit for _, line in other.plan.reads for digit in line] != seen:
            return other
    return question


def graded_paths(generator: np.random.Generator, most: int = 4) -> tuple[BoardQuestion, list[str], list[int]]:
    """A question, one to `most` paths of mixed strategies, and the oracle's scores.

    Of ten paths about four are true; four see a wrong digit and follow it; two have a slip in one step,
    or end with the answer of another board.
    """
    question, retell = _retold_question(generator)
    paths, scores = [], []
    for _ in range(int(generator.integers(1, most + 1))):
        strategy, fault = str(generator.choice(STRATEGIES)), generator.random()
        steps = chain(misread(question, retell, generator) if fault < 0.4 else question, strategy)
        if 0.4 <= fault < 0.5:
            steps = spoil(steps, generator)
        elif 0.5 <= fault < 0.6 and (other := retell(random_digits(generator))):
            steps = [*steps[:-1], replace(steps[-1], content=other.answer)]
        right = steps[-1].content == question.answer
        scores.append(assess_path(steps, right, question.digits, question.text).score)
        paths.append(thoughts(steps))
    return question, paths, scores


def _retold_question(generator: np.random.Generator) -> tuple[BoardQuestion, Retell]:
    """A question of any family, single reads among them, and the same question about other digits."""
    family = _any_family(generator)
    if family == "order":
        question = ask(generator, family)
        return question, lambda digits: order_of(digits, question.plan.reads[0][0])
    draw = int(generator.integers(2**32))

    def retell(digits: Digits) -> BoardQuestion | None:
        same = np.random.default_rng(draw)
        return read_cell(digits, same) if family == "read" else ask_on(digits, same, family)

    while (found := retell(random_digits(generator))) is None:
        continue
    return found, retell


def _join(digits: Sequence[int]) -> str:
    return " ".join(map(str, digits))
