"""Question families on boards: twelve kinds that need one to four reads
and some arithmetic, and single reads.

    python -c "import numpy as np; from models.boards.questions import ask; \
        print(ask(np.random.default_rng(0)))"

A read is one look at a line (a row, a column, a diagonal) or at a cell. Every family is
a function of a random generator that sets the digits it needs, and gives the text, the answer and the plan:
what to look at and how to work it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from models.boards.scans import SIDE

Digits = NDArray[np.int64]

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
CELLS = [f"{row} {column}" for row in ROWS for column in COLUMNS]
LINES = [f"{name} row" for name in ROWS] + [f"{name} column" for name in COLUMNS]
DIAGONALS = ["falling diagonal", "rising diagonal"]
EXTREMES = ("smallest", "largest")
LIMITS = (3, 6)
"""Limits of the conditions "greater than" and "less than"."""

_CONDITION = re.compile(
    r"(?: are |^)(?=\w)(?:(?P<parity>even|odd)(?: and )?)?(?:(?P<sign>greater|less) than (?P<limit>\d+))?\??$"
)


@dataclass(frozen=True)
class Plan:
    """How to answer: the opening statements, the lines to read, the working after each line, and the
    closing working.

    opening: what is asked for, what the condition means; reads: (line name, its digits); work: for each read,
    statements such as "3 + 5 = 8"; close: statements that join the lines, the answer in the last.
    """

    reads: list[tuple[str, list[int]]]
    work: list[list[str]]
    close: list[str]
    opening: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BoardQuestion:
    """A question with its answer, the digits of the board and the plan that leads to the answer."""

    family: str
    text: str
    answer: str
    digits: Digits
    plan: Plan


class Resample(Exception):
    """The drawn digits do not give a question with one answer: draw again."""


def line_digits(digits: Digits, line: str) -> list[int]:
    """The digits along a line, left to right or top down. Lines: "top row", "left column", …
    "falling diagonal" (from the top left), "rising diagonal" (from the bottom left); a cell: "top left"."""
    if line == "falling diagonal":
        return [int(digits[i, i]) for i in range(SIDE)]
    if line == "rising diagonal":
        return [int(digits[SIDE - 1 - i, i]) for i in range(SIDE)]
    name, kind = line.split()
    if kind in COLUMNS:
        return [int(digits[ROWS.index(name), COLUMNS.index(kind)])]
    values = digits[ROWS.index(name)] if kind == "row" else digits[:, COLUMNS.index(name)]
    return [int(d) for d in values]


def running_sum(values: list[int]) -> list[str]:
    """Statements of a running sum: [3, 5, 8] -> ["3 + 5 = 8", "8 + 8 = 16"]."""
    total, statements = values[0], []
    for value in values[1:]:
        statements.append(f"{total} + {value} = {total + value}")
        total += value
    return statements


def _line(generator: np.random.Generator) -> str:
    return str(generator.choice(LINES))


def _of_kind(kind: str) -> list[str]:
    return [line for line in LINES if line.endswith(kind)]


def _two_lines(generator: np.random.Generator) -> tuple[str, str]:
    first, second = generator.choice(_of_kind(str(generator.choice(["row", "column"]))), 2, replace=False)
    return str(first), str(second)


def _sum_line(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    line = _line(generator)
    values = line_digits(digits, line)
    plan = Plan([(line, values)], [running_sum(values)], [])
    return BoardQuestion("sum_line", f"What is the sum of the {line}?", str(sum(values)), digits, plan)


def _sum_diagonal(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    line = str(generator.choice(DIAGONALS))
    values = line_digits(digits, line)
    plan = Plan([(line, values)], [running_sum(values)], [])
    return BoardQuestion("sum_diagonal", f"What is the sum of the {line}?", str(sum(values)), digits, plan)


def _summed(lines: list[tuple[str, list[int]]], close: list[str]) -> Plan:
    """Lines named, then read and summed one by one; what each has is said after its sum and in the close."""
    has = named([line for line, _ in lines], [sum(values) for _, values in lines])
    work = [[*running_sum(values), said] for (_, values), said in zip(lines, has, strict=True)]
    return Plan(lines, work, has + close, [_all_of(lines)])


def _all_of(lines: list[tuple[str, list[int]]]) -> str:
    return " and ".join(line for line, _ in lines)


def _difference(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    first, second = _two_lines(generator)
    one, two = line_digits(digits, first), line_digits(digits, second)
    high, low = max(sum(one), sum(two)), min(sum(one), sum(two))
    taken = [step_between(sum(one), sum(two)), f"{high} - {low} = {high - low}"]
    plan = _summed([(first, one), (second, two)], taken)
    text = f"What is the difference between the sums of the {first} and the {second}?"
    return BoardQuestion("difference", text, str(high - low), digits, plan)


def _compare(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    first, second = _two_lines(generator)
    one, two = line_digits(digits, first), line_digits(digits, second)
    if sum(one) == sum(two):
        raise Resample
    answer = first if sum(one) > sum(two) else second
    leading, _ = running_extreme([sum(one), sum(two)], "largest", [first, second])
    plan = _summed([(first, one), (second, two)], leading)
    return BoardQuestion(
        "compare", f"Which has the larger sum, the {first} or the {second}?", answer, digits, plan
    )


def condition(generator: np.random.Generator) -> tuple[str, Callable[[int], bool]]:
    """A condition on a digit: how it is said, and whether a digit meets it."""
    kind = generator.choice(["greater", "less", "even", "odd"])
    limit = int(generator.choice(LIMITS))
    if kind == "greater":
        return f"greater than {limit}", lambda d: d > limit
    if kind == "less":
        return f"less than {limit}", lambda d: d < limit
    return str(kind), lambda d: d % 2 == (kind == "odd")


def condition_in(text: str) -> Callable[[int], bool] | None:
    """The condition that a question (or a bare phrase) puts on a digit; None where it puts none."""
    match = _CONDITION.search(text)
    if not match:
        return None
    parity, sign, limit = match["parity"], match["sign"], int(match["limit"] or 0)

    def holds(digit: int) -> bool:
        if parity and digit % 2 != (parity == "odd"):
            return False
        return not sign or (digit > limit if sign == "greater" else digit < limit)

    return holds


def meaning(phrase: str, holds: Callable[[int], bool]) -> str:
    """The digits that meet a condition: "greater than 6 means 7 8 9"."""
    return f"{phrase} means {' '.join(str(digit) for digit in range(10) if holds(digit))}"


def tally(values: list[int], holds: Callable[[int], bool]) -> str:
    """One verdict a digit and how many hold: "3 no 5 yes 8 yes makes 2"."""
    verdicts = [holds(value) for value in values]
    said = " ".join(f"{value} {'yes' if ok else 'no'}" for value, ok in zip(values, verdicts, strict=True))
    return f"{said} makes {sum(verdicts)}"


def _counted(
    lines: list[tuple[str, list[int]]], phrase: str, holds: Callable[[int], bool]
) -> tuple[Plan, int]:
    """A count over lines: a verdict for every digit, what each line has, the total at the end."""
    counts = [sum(map(holds, values)) for _, values in lines]
    has = named([line for line, _ in lines], counts)
    work = [[tally(values, holds), said] for (_, values), said in zip(lines, has, strict=True)]
    opening = [_all_of(lines), meaning(phrase, holds)]
    return Plan(lines, work, has + running_sum(counts), opening), sum(counts)


def _count_lines(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    first, second = _two_lines(generator)
    phrase, holds = condition(generator)
    lines = [(line, line_digits(digits, line)) for line in (first, second)]
    plan, total = _counted(lines, phrase, holds)
    text = f"How many digits in the {first} and the {second} are {phrase}?"
    return BoardQuestion("count_lines", text, str(total), digits, plan)


def _count_board(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    phrase, holds = condition(generator)
    lines = [(line, line_digits(digits, line)) for line in _of_kind("row")]
    plan, total = _counted(lines, phrase, holds)
    return BoardQuestion("count_board", f"How many digits are {phrase}?", str(total), digits, plan)


def two_conditions(generator: np.random.Generator) -> tuple[str, Callable[[int], bool]]:
    """Two conditions on a digit at once."""
    parity, limit = str(generator.choice(["even", "odd"])), int(generator.choice(LIMITS))
    return f"{parity} and greater than {limit}", lambda d: d % 2 == (parity == "odd") and d > limit


def _two_conditions(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    first, second = _two_lines(generator)
    phrase, holds = two_conditions(generator)
    lines = [(line, line_digits(digits, line)) for line in (first, second)]
    plan, total = _counted(lines, phrase, holds)
    text = f"How many digits in the {first} and the {second} are {phrase}?"
    return BoardQuestion("two_conditions", text, str(total), digits, plan)


def step_between(first: int, second: int) -> str:
    """How two numbers compare, both of them said before the verdict: "3 to 8 rises"."""
    return f"{first} to {second} {'rises' if first < second else 'falls' if first > second else 'stays'}"


def running_extreme(values: Sequence[int], word: str, names: Sequence[str] = ()) -> tuple[list[str], int]:
    """Statements of a running comparison and the index of the largest (smallest) value, the first of equals.

    word: "largest" or "smallest"; with names they stand beside their values, and the name is what is found:
    "top row 9 to middle row 13 rises, largest is middle row" (without: "9 to 13 rises, largest is 13").
    """
    best, statements = 0, []
    for index in range(1, len(values)):
        if names:
            verdict = step_between(values[best], values[index]).split()[-1]
            said = f"{names[best]} {values[best]} to {names[index]} {values[index]} {verdict}"
        else:
            said = step_between(values[best], values[index])
        ahead = values[index] > values[best] if word == "largest" else values[index] < values[best]
        best = index if ahead else best
        statements += [said, f"{word} is {names[best] if names else values[best]}"]
    return statements, best


def named(names: Sequence[str], values: Sequence[int]) -> list[str]:
    """What each line or place has: "top row has 13"."""
    return [f"{name} has {value}" for name, value in zip(names, values, strict=True)]


def _largest(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    line, word = _line(generator), EXTREMES[generator.integers(2)]
    values = line_digits(digits, line)
    work, best = running_extreme(values, word)
    plan = Plan([(line, values)], [work], [], [f"{word} of {line}"])
    text = f"What is the {word} digit in the {line}?"
    return BoardQuestion("largest", text, str(values[best]), digits, plan)


def _where(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    line, word = str(generator.choice(_of_kind("row"))), EXTREMES[generator.integers(2)]
    values = line_digits(digits, line)
    leading, best = running_extreme(values, word, COLUMNS)
    if values.count(values[best]) > 1:
        raise Resample
    cells = [f"{line.split()[0]} {column}" for column in COLUMNS]
    reads = [(cell, [value]) for cell, value in zip(cells, values, strict=True)]
    plan = Plan(reads, [[] for _ in reads], leading, [f"{word} of {line}"])
    text = f"In which column of the {line} is the {word} digit?"
    return BoardQuestion("where", text, f"{COLUMNS[best]} column", digits, plan)


def _parity(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    line = _line(generator)
    values = line_digits(digits, line)
    answer = "odd" if sum(values) % 2 else "even"
    plan = Plan([(line, values)], [running_sum(values)], [f"{sum(values)} is {answer}"])
    return BoardQuestion("parity", f"Is the sum of the {line} even or odd?", answer, digits, plan)


def rising(values: list[int]) -> tuple[list[str], str]:
    """Statements of whether values increase, how many steps rise last; and the answer."""
    steps = list(pairwise(values))
    rises = sum(a < b for a, b in steps)
    work = [step_between(a, b) for a, b in steps] + [f"{rises} of {len(steps)} rise"]
    return work, "yes" if rises == len(steps) else "no"


def _order(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    line = _line(generator)
    name, kind = line.split()
    if generator.integers(2):
        ordered = np.sort(generator.choice(10, size=SIDE, replace=False))
        digits = digits.copy()
        if kind == "row":
            digits[ROWS.index(name)] = ordered
        else:
            digits[:, COLUMNS.index(name)] = ordered
    return order_of(digits, line)


def order_of(digits: Digits, line: str) -> BoardQuestion:
    """Whether the digits of the named line increase, on any board."""
    values = line_digits(digits, line)
    (*work, verdict), answer = rising(values)
    plan = Plan([(line, values)], [work], [verdict, answer])
    return BoardQuestion("order", f"Do the digits of the {line} increase?", answer, digits, plan)


def _largest_line(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    kind = str(generator.choice(["row", "column"]))
    lines = [(line, line_digits(digits, line)) for line in _of_kind(kind)]
    sums = [sum(values) for _, values in lines]
    leading, best = running_extreme(sums, "largest", [line for line, _ in lines])
    if sums.count(sums[best]) > 1:
        raise Resample
    text = f"Which {kind} has the largest sum?"
    return BoardQuestion("largest_line", text, lines[best][0], digits, _summed(lines, leading))


FAMILIES: dict[str, Callable[[Digits, np.random.Generator], BoardQuestion]] = {
    "sum_line": _sum_line,
    "sum_diagonal": _sum_diagonal,
    "difference": _difference,
    "compare": _compare,
    "count_lines": _count_lines,
    "count_board": _count_board,
    "two_conditions": _two_conditions,
    "largest": _largest,
    "where": _where,
    "parity": _parity,
    "order": _order,
    "largest_line": _largest_line,
}


def random_digits(generator: np.random.Generator) -> Digits:
    """A board's digits [SIDE, SIDE], uniform 0-9."""
    return generator.integers(0, 10, size=(SIDE, SIDE))


def ask(generator: np.random.Generator, family: str | None = None) -> BoardQuestion:
    """A random question with its board; of the named family, or of any."""
    name = family or str(generator.choice(list(FAMILIES)))
    while True:
        try:
            return FAMILIES[name](random_digits(generator), generator)
        except Resample:
            continue


def ask_on(digits: Digits, generator: np.random.Generator, family: str) -> BoardQuestion | None:
    """A question of the family on a given board, or None if these digits give none."""
    try:
        question = FAMILIES[family](digits, generator)
    except Resample:
        return None
    return question if np.array_equal(question.digits, digits) else None


def read_cell(digits: Digits, generator: np.random.Generator) -> BoardQuestion:
    """A single read (perception): one cell."""
    row, column = (int(x) for x in generator.integers(SIDE, size=2))
    cell, digit = f"{ROWS[row]} {COLUMNS[column]}", int(digits[row, column])
    plan = Plan([(cell, [digit])], [[]], [])
    return BoardQuestion("read", f"Which digit is at the {cell}?", str(digit), digits, plan)
