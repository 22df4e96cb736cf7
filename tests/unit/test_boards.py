"""Boards: answers by an independent recomputation, the oracle, disjoint scans, drawing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.answers import matches
from models.boards.chains import STRATEGIES, TERSENESS, chain, strategy_shares
from models.boards.lessons import graded_paths, misread, spoil, turns
from models.boards.oracle import assess_path, check_claim, claims
from models.boards.questions import (
    FAMILIES,
    BoardQuestion,
    Digits,
    ask,
    ask_on,
    condition_in,
    order_of,
    random_digits,
    read_cell,
)
from models.boards.scans import CELL_PX, SIDE, _move, draw_board, load_scans, pick_scans, split_scans
from models.reasoning import parse_thoughts
from models.records import Step

KINDS = [*FAMILIES, "read"]


def questions(family: str, count: int = 40, seed: int = 0) -> list[BoardQuestion]:
    generator = np.random.default_rng([seed, KINDS.index(family)])
    if family == "read":
        return [read_cell(random_digits(generator), generator) for _ in range(count)]
    return [ask(generator, family) for _ in range(count)]


# An answer from the text and the digits alone: shares no code with models.boards.questions.


def lines(text: str, board: list[list[int]]) -> list[list[int]]:
    """The digits of every row and column that the text names, in its order."""
    rows, columns = ["top", "middle", "bottom"], ["left", "centre", "right"]
    found = re.findall(r"(\w+) (row|column)", text)
    return [
        board[rows.index(name)] if kind == "row" else [row[columns.index(name)] for row in board]
        for name, kind in found
        if name in rows + columns
    ]


def holds(text: str) -> Callable[[int], bool]:
    """The condition at the end of a counting question."""
    tests: list[Callable[[int], bool]] = []
    if match := re.search(r"greater than (\d)", text):
        tests.append(lambda d, n=int(match[1]): d > n)
    if match := re.search(r"less than (\d)", text):
        tests.append(lambda d, n=int(match[1]): d < n)
    if re.search(r"\beven\b", text):
        tests.append(lambda d: d in (0, 2, 4, 6, 8))
    if re.search(r"\bodd\b", text):
        tests.append(lambda d: d in (1, 3, 5, 7, 9))
    assert tests, text
    return lambda d: all(test(d) for test in tests)


def solve(text: str, board: list[list[int]]) -> str:
    """The answer to any question of any family."""
    named = lines(text, board)
    if match := re.fullmatch(r"Which digit is at the (top|middle|bottom) (left|centre|right)\?", text):
        row, column = lines(f"{match[1]} row, {match[2]} column", [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
        (cell,) = set(row) & set(column)
        return str(board[cell // 3][cell % 3])
    if text == "What is the sum of the falling diagonal?":
        return str(board[0][0] + board[1][1] + board[2][2])
    if text == "What is the sum of the rising diagonal?":
        return str(board[2][0] + board[1][1] + board[0][2])
    if text.startswith("What is the sum of"):
        return str(sum(named[0]))
    if text.startswith("What is the difference"):
        return str(abs(sum(named[0]) - sum(named[1])))
    if match := re.fullmatch(r"Which has the larger sum, the (\w+ \w+) or the (\w+ \w+)\?", text):
        assert sum(named[0]) != sum(named[1])
        return match[1] if sum(named[0]) > sum(named[1]) else match[2]
    if text.startswith("How many digits"):
        cells = [d for line in (named or board) for d in line]
        return str(sum(map(holds(text.rpartition(" are ")[2]), cells)))
    if match := re.fullmatch(r"What is the (largest|smallest) digit in .*", text):
        return str(max(named[0]) if match[1] == "largest" else min(named[0]))
    if match := re.fullmatch(r"In which column of the \w+ row is the (largest|smallest) digit\?", text):
        wanted = max(named[0]) if match[1] == "largest" else min(named[0])
        assert named[0].count(wanted) == 1
        return f"{['left', 'centre', 'right'][named[0].index(wanted)]} column"
    if text.startswith("Is the sum of"):
        return ("even", "odd")[sum(named[0]) % 2]
    if text.startswith("Do the digits of"):
        return "yes" if named[0][0] < named[0][1] < named[0][2] else "no"
    if match := re.fullmatch(r"Which (row|column) has the largest sum\?", text):
        sums = [sum(line) for line in (board if match[1] == "row" else zip(*board, strict=True))]
        assert sums.count(max(sums)) == 1
        names = ["top", "middle", "bottom"] if match[1] == "row" else ["left", "centre", "right"]
        return f"{names[sums.index(max(sums))]} {match[1]}"
    raise AssertionError(f"no family asks {text!r}")


@pytest.mark.parametrize("family", KINDS)
def test_answers_are_right(family: str) -> None:
    asked = questions(family)
    for question in asked:
        assert question.family == family
        assert question.answer == solve(question.text, question.digits.tolist()), question
    assert len({question.answer for question in asked}) > 1


@pytest.mark.parametrize("family", KINDS)
def test_rules_can_tell_every_answer_from_every_other(family: str) -> None:
    answers = sorted({question.answer for question in questions(family)})
    for one in answers:
        assert [matches(one, other) for other in answers] == [one == other for other in answers]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "order"])
def test_a_question_on_a_given_board_is_about_that_board(family: str) -> None:
    generator = np.random.default_rng(3)
    digits = random_digits(generator)
    asked = [question for _ in range(30) if (question := ask_on(digits, generator, family))]
    assert asked
    for question in asked:
        assert np.array_equal(question.digits, digits)
        assert question.answer == solve(question.text, digits.tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", KINDS)
def test_the_oracle_finds_every_true_chain_right(family: str, strategy: str) -> None:
    for question in questions(family, 15, seed=1):
        steps = chain(question, strategy)
        holds = condition_in(question.text)
        said = [
            check_claim(claim, question.digits, holds) for step in steps for claim in claims(step.content)
        ]
        assert False not in said, (question, steps)
        assert steps[-1].content == question.answer
        assert steps[-1].title == ("Guess" if strategy in ("glance", "brief") else "Answer")
        assert [step.next_action for step in steps] == ["continue"] * (len(steps) - 1) + ["final_answer"]
        if strategy != "glance":
            assert True in said


def certain(claim: str) -> bool:
    """Claims that one other digit always makes false: reads and sums (not 9 > 4, which 9 > 5 may replace)."""
    return (" is " in claim and not claim.endswith(("even", "odd"))) or (" = " in claim and "+" in claim)


@pytest.mark.parametrize("family", KINDS)
def test_the_oracle_finds_every_spoiled_chain_wrong_where_it_can_be_checked(family: str) -> None:
    generator = np.random.default_rng(5)
    caught = 0
    for question in questions(family, 25, seed=2):
        steps = chain(question, "checked")
        spoiled = spoil(steps, generator)
        before = [claim for step in steps for claim in claims(step.content)]
        after = [claim for step in spoiled for claim in claims(step.content)]
        (changed,) = [(a, b) for a, b in zip(before, after, strict=True) if a != b] or [(None, None)]
        if changed is None or check_claim(changed[0], question.digits) is None or not certain(changed[0]):
            continue
        caught += 1
        assert check_claim(changed[1], question.digits) is False, changed
        true, false = (
            assess_path(chain_, True, question.digits, question.text) for chain_ in (steps, spoiled)
        )
        assert true.wrong == 0 and true.step_accuracy == 1
        assert false.wrong == 1 and false.step_accuracy < 1 and false.score < true.score
    assert caught


def test_care_pays_a_higher_score_and_a_wrong_answer_less() -> None:
    for question in questions("difference", 5):
        scores = [
            assess_path(chain(question, s), True, question.digits, question.text).score for s in STRATEGIES
        ]
        assert scores == sorted(scores) and len(set(scores)) == len(scores)
        wrong = assess_path(chain(question, "checked"), False, question.digits, question.text)
        assert (
            wrong.score < assess_path(chain(question, "checked"), True, question.digits, question.text).score
        )


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ("top row is 3 5 8", True),
        ("top row backwards is 8 5 3", True),
        ("top row is 358", False),
        ("lower row is 6 7 2", None),
        ("left column is 3 4 6", True),
        ("middle right is 1", True),
        ("bottom left is 7", False),
        ("rising diagonal is 6 0 8", True),
        ("3 + 5 = 9", False),
        ("5 - 3 = 2", True),
        ("3 to 5 rises", True),
        ("3 to 5 falls", False),
        ("top row 16 to middle row 5 falls", True),
        ("left 3 to centre 5 falls", False),
        ("greater than 6 means 7 8 9", True),
        ("even and greater than 3 means 4 6", False),
        ("love means 7", False),
        ("3 no 5 no 8 yes makes 1", True),
        ("3 no 5 no 8 yes makes 2", False),
        ("3 no 5 yes 8 yes makes 2", False),
        ("16 is odd", False),
        ("9" * 5000 + " + 1 = 2", None),
        ("top row is " + "3 " * 4000, False),
        ("I see a cat", None),
        ("", None),
    ],
)
def test_claims(claim: str, verdict: bool | None) -> None:
    board = np.array([[3, 5, 8], [4, 0, 1], [6, 7, 2]])
    assert check_claim(claim.strip(), board, lambda digit: digit > 5) is verdict


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ("How many digits are greater than 4?", [5, 6, 7, 8, 9]),
        ("How many digits in the top row and the middle row are less than 2?", [0, 1]),
        ("How many digits are odd?", [1, 3, 5, 7, 9]),
        ("Which of 1 2 3 are even and greater than 4?", [6, 8]),
        ("How many digits are there?", None),
        ("What is the sum of the top row?", None),
    ],
)
def test_the_condition_of_a_question_is_read_back(asked: str, held: list[int] | None) -> None:
    holds = condition_in(asked)
    assert (None if holds is None else [digit for digit in range(10) if holds(digit)]) == held


def test_graded_paths_can_be_read_back() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        question, paths, scores = graded_paths(generator, 4)
        assert 1 <= len(paths) == len(scores) <= 4 and all(1 <= score <= 100 for score in scores)
        for path, score in zip(paths, scores, strict=True):
            steps = parse_thoughts(path)
            right = steps[-1].content == question.answer
            assert assess_path(steps, right, question.digits, question.text).score == score


@pytest.mark.parametrize("family", KINDS)
def test_a_misread_digit_is_followed_to_the_end(family: str) -> None:
    generator, changed = np.random.default_rng(4), 0

    def retell(digits: Digits) -> BoardQuestion | None:
        same = np.random.default_rng(7)
        if family == "read":
            return read_cell(digits, same)
        return order_of(digits, "top row") if family == "order" else ask_on(digits, same, family)

    while changed < 10:
        if not (question := retell(random_digits(generator))):
            continue
        seen = misread(question, retell, generator)
        assert seen.text == question.text and seen.plan.reads != question.plan.reads
        assert (seen.digits != question.digits).sum() == 1
        assert seen.answer == solve(question.text, seen.digits.tolist())
        right = seen.answer == question.answer
        verdict = assess_path(chain(seen, "detailed"), right, question.digits, question.text)
        assert verdict.wrong == 1, "one read is false, what follows from it is not"
        changed += 1


def test_spoil_leaves_a_chain_without_digits_alone() -> None:
    steps = [Step("Answer", "even", "final_answer")]
    assert spoil(steps, np.random.default_rng(0)) == steps


def test_lessons_for_the_base_hold_no_chain() -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        _, lesson = turns(generator, "short", 2)
        assert not any("thoughts" in text or "title" in text for turn in lesson for text in turn)


@pytest.mark.parametrize("family", TERSENESS)
def test_strategy_shares_are_probabilities(family: str) -> None:
    assert sum(strategy_shares(family).values()) == pytest.approx(1)


def test_pools_of_scans_are_disjoint_and_hold_every_scan() -> None:
    pools = split_scans()
    members = np.concatenate(list(pools.values()))
    assert len(members) == len(set(members.tolist())) == len(load_scans()[1])
    for pool, scans in pools.items():
        assert set(load_scans()[1][scans]) == set(range(10)), pool


def test_a_picked_scan_is_of_its_pool_and_shows_its_digit() -> None:
    generator = np.random.default_rng(0)
    for pool, members in split_scans().items():
        digits: Digits = generator.integers(0, 10, size=(SIDE, SIDE))
        picked = pick_scans(digits, pool, generator)
        assert np.isin(picked, members).all()
        assert np.array_equal(load_scans()[1][picked], digits)


@pytest.mark.parametrize("edge", ["left", "right", "top", "bottom"])
def test_moved_ink_is_cut_off_and_never_wraps(edge: str) -> None:
    cells = np.zeros((200, CELL_PX, CELL_PX), np.uint8)
    strip = {"left": np.s_[:, :, 0], "right": np.s_[:, :, -1], "top": np.s_[:, 0], "bottom": np.s_[:, -1]}
    far = {"left": np.s_[:, :, 8:], "right": np.s_[:, :, :8], "top": np.s_[:, 8:], "bottom": np.s_[:, :8]}
    cells[strip[edge]] = 255
    moved = _move(cells, np.random.default_rng(0), jitter_px=2, turn=0.15)
    assert moved.any() and not moved[far[edge]].any()


def test_a_board_keeps_every_digit_in_its_cell() -> None:
    scans = pick_scans(np.arange(9).reshape(3, 3), "test", np.random.default_rng(0))
    still, moved = draw_board(scans), draw_board(scans, np.random.default_rng(1), 1, 0.15)
    assert still.shape == moved.shape == (SIDE * CELL_PX, SIDE * CELL_PX)
    images, _ = load_scans()
    for row in range(SIDE):
        for column in range(SIDE):
            cell = np.s_[row * CELL_PX : (row + 1) * CELL_PX, column * CELL_PX : (column + 1) * CELL_PX]
            assert np.array_equal(255 - still[cell][::2, ::2], images[scans[row, column]])
            ink, drawn = (255 - still[cell]).sum(dtype=int), (255 - moved[cell]).sum(dtype=int)
            assert 0.6 * ink < drawn <= 1.1 * ink


def test_the_data_set_is_right_disjoint_and_the_same_every_time(tmp_path: Path) -> None:
    from tasks import boards

    parts = tuple(
        boards.Part(part.name, part.scans, part.split, part.set, 24, part.pool) for part in boards.PARTS
    )
    for folder in ("a", "b"):
        assert boards.build(tmp_path / folder, parts) == {part.name: 24 for part in parts}
    rows = [json.loads(line) for line in (tmp_path / "a/records.jsonl").read_text().splitlines()]
    owners: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        assert row["answer"] == solve(row["question"], row["annotation"]["digits"])
        owners.setdefault(row["images"][0], set()).add((row["split"], str(row["pool"])))
    assert len({row["id"] for row in rows}) == len(rows) and all(len(o) == 1 for o in owners.values())
    one, other = (sorted(p for p in (tmp_path / f).rglob("*") if p.is_file()) for f in ("a", "b"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]
