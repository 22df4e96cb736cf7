"""Pair rules: ties, None, one candidate, equal text, all right or wrong, margins."""

from __future__ import annotations

import pytest

from models.pairing import (
    RULES,
    Pair,
    best_right_vs_worst_wrong,
    best_vs_worst_score,
    build_pairs,
    distinct,
    first_difference,
)
from models.records import ReasoningPath


def path(
    sample: int, right: bool | None, score: int | None, text: str | None = None, question: str = "q"
) -> ReasoningPath:
    return ReasoningPath(question, sample, [], f"text {sample}" if text is None else text, "", right, score)


def samples(outcome: object) -> object:
    return [(a.sample, b.sample) for a, b in outcome] if isinstance(outcome, list) else outcome


GROUPS = {
    "none": [],
    "one right": [path(0, True, 90)],
    "one wrong": [path(0, False, 10)],
    "all right": [path(0, True, 90), path(1, True, 90)],
    "all wrong": [path(0, False, 10), path(1, False, 30)],
    "unknown": [path(0, None, 90), path(1, None, 10)],
    "clear": [path(0, True, 60), path(1, True, 90), path(2, False, 40), path(3, False, 5)],
    "tie among right": [path(0, True, 90), path(1, True, 90), path(2, False, 5), path(3, False, 5)],
    "unknown beside": [path(0, None, 100), path(1, True, 50), path(2, False, 40), path(3, None, 1)],
    "score missing": [path(0, True, None), path(1, True, 50), path(2, False, None), path(3, False, 40)],
}


@pytest.mark.parametrize(
    ("group", "found"),
    [
        ("none", "all_wrong"),
        ("one right", "all_right"),
        ("one wrong", "all_wrong"),
        ("all right", "all_right"),
        ("all wrong", "all_wrong"),
        ("unknown", "all_wrong"),
        ("clear", [(1, 3)]),
        ("tie among right", [(0, 2)]),
        ("unknown beside", [(1, 2)]),
        ("score missing", [(1, 3)]),
    ],
)
def test_best_right_vs_worst_wrong(group: str, found: object) -> None:
    assert samples(best_right_vs_worst_wrong(GROUPS[group], 1)) == found


def test_more_pairs_go_rank_by_rank_and_use_no_path_twice() -> None:
    assert samples(best_right_vs_worst_wrong(GROUPS["clear"], 9)) == [(1, 3), (0, 2)]


@pytest.mark.parametrize(
    ("group", "found"),
    [
        ("none", "all_wrong"),
        ("one right", "tie"),
        ("one wrong", "all_wrong"),
        ("all right", "tie"),
        ("all wrong", "all_wrong"),
        ("unknown", "all_wrong"),
        ("clear", [(1, 3)]),
        ("tie among right", [(0, 3)]),
        ("unknown beside", [(1, 2)]),
    ],
)
def test_best_vs_worst_score(group: str, found: object) -> None:
    assert samples(best_vs_worst_score(GROUPS[group], 1)) == found


def test_best_vs_worst_score_ranks_a_wrong_answer_below_any_right_one() -> None:
    lucky = [path(0, True, 20), path(1, False, 95)]
    assert samples(best_vs_worst_score(lucky, 1)) == [(0, 1)]
    right = [path(0, True, 20), path(1, True, 95)]
    assert samples(best_vs_worst_score(right, 1)) == [(1, 0)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("group", GROUPS)
def test_no_rule_ever_makes_a_pair_of_equals(rule: str, group: str) -> None:
    outcome = RULES[rule](GROUPS[group], 4)
    if isinstance(outcome, str):
        return
    assert outcome
    for chosen, rejected in outcome:
        assert chosen is not rejected and chosen.right is True and rejected.right is not None
        assert (chosen.right and not rejected.right) or (chosen.score or 0) > (rejected.score or 0)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_paths_does_not_matter(rule: str) -> None:
    group = GROUPS["clear"]
    assert samples(RULES[rule](group, 2)) == samples(RULES[rule](group[::-1], 2))


def pairs(group: list[ReasoningPath], **settings: int) -> tuple[list[int], dict[str, int]]:
    kept, dropped = build_pairs([group], "best_right_vs_worst_wrong", **settings)
    return [pair.margin for pair in kept], dropped


def test_a_pair_holds_texts_scores_and_margin() -> None:
    (pair,), dropped = build_pairs([GROUPS["clear"]], "best_right_vs_worst_wrong")
    assert (pair.question_id, pair.chosen, pair.rejected) == ("q", "text 1", "text 3")
    assert (pair.chosen_score, pair.rejected_score, pair.margin) == (90, 5, 85) and dropped == {}


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ([path(0, True, 50), path(1, False, 50)], "judge_disagrees"),
        ([path(0, True, 40), path(1, False, 50)], "judge_disagrees"),
        ([path(0, True, 90, ""), path(1, False, 50)], "empty"),
        ([path(0, True, 90), path(1, False, 50, "")], "empty"),
        ([path(0, True, None), path(1, False, None)], "unscored"),
        ([path(0, True, 50), path(1, False, None)], "unscored"),
        ([path(0, True, None), path(1, False, 1)], "unscored"),
        ([path(0, True, 50), path(1, True, 50)], "all_right"),
        ([path(0, False, 50)], "all_wrong"),
    ],
)
def test_what_makes_no_pair_is_counted_by_reason(group: list[ReasoningPath], reason: str) -> None:
    assert pairs(group) == ([], {reason: 1})


def test_equal_texts_are_one_path_and_never_a_pair() -> None:
    group = [path(0, True, 90, "same"), path(1, False, 10, "same")]
    assert [p.sample for p in distinct([*group, path(2, False, 5)])] == [0, 2]
    assert pairs(group) == ([], {"all_right": 1})
    assert pairs([*group, path(2, False, 5)]) == ([85], {})


def test_margins_below_the_minimum_are_dropped() -> None:
    group = [path(0, True, 60), path(1, False, 50)]
    assert pairs(group, min_margin=10) == ([10], {})
    assert pairs(group, min_margin=11) == ([], {"judge_disagrees": 1})
    assert pairs(GROUPS["clear"], pairs_per_question=2, min_margin=50) == ([85], {"judge_disagrees": 1})


def test_groups_add_up() -> None:
    kept, dropped = build_pairs(list(GROUPS.values()), "best_right_vs_worst_wrong")
    assert len(kept) + sum(dropped.values()) == len(GROUPS)
    assert dropped == {"all_right": 2, "all_wrong": 4}


def test_pairs_beyond_the_most_are_counted() -> None:
    groups = [GROUPS["clear"], [path(0, True, 60), path(1, False, 50)], [path(0, True, 50)]]
    kept, dropped = build_pairs(groups, "best_right_vs_worst_wrong", most=1)
    assert [pair.margin for pair in kept] == [85] and dropped == {"above_max_pairs": 1, "all_right": 1}
    assert build_pairs(groups, "best_right_vs_worst_wrong", most=2)[1] == {"all_right": 1}


def test_an_unknown_rule_names_the_rules() -> None:
    with pytest.raises(ValueError, match="best_right_vs_worst_wrong"):
        build_pairs([], "best")


def chain(*steps: str) -> str:
    return "\n".join(["<thoughts>", *steps, "</thoughts>"])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prefix", "chosen_side", "rejected_side"),
    [
        (["Read: 3 4", "Answer: 7"], ["Read: 3 9", "Answer: 12"], [], "Read: 3 4\n", "Read: 3 9\n"),
        (
            ["Read: 3 4", "Work: 7", "Answer: 7"],
            ["Read: 3 4", "Answer: 6"],
            ["Read: 3 4"],
            "Work: 7\n",
            "Answer: 6\n</thoughts>",
        ),
        (
            ["Read: 3 4", "Answer: 7"],
            ["Read: 3 4", "Answer: 6"],
            ["Read: 3 4"],
            "Answer: 7\n</thoughts>",
            "Answer: 6\n</thoughts>",
        ),
        (["Answer: 7"], ["Answer: 6"], [], "Answer: 7\n</thoughts>", "Answer: 6\n</thoughts>"),
    ],
)
def test_a_pair_cut_to_its_first_difference_keeps_one_step_a_side(
    chosen: list[str], rejected: list[str], prefix: list[str], chosen_side: str, rejected_side: str
) -> None:
    pair = Pair("q", chain(*chosen), chain(*rejected), 100, 1, 99)
    cut = first_difference(pair)
    assert cut.prefix == "\n".join(["<thoughts>", *prefix, ""])
    assert (cut.chosen, cut.rejected) == (chosen_side, rejected_side)
    for whole, side, goes_on in (
        (pair.chosen, cut.chosen, cut.chosen_goes_on),
        (pair.rejected, cut.rejected, cut.rejected_goes_on),
    ):
        assert whole.startswith(cut.prefix + side)
        assert goes_on == (whole != cut.prefix + side)
    assert (cut.question_id, cut.margin) == ("q", 99)


def test_texts_that_differ_only_in_their_end_still_make_a_cut_pair() -> None:
    cut = first_difference(Pair("q", chain("Answer: 7"), chain("Answer: 7") + "\n", 100, 1, 99))
    assert (cut.chosen, cut.rejected) == ("</thoughts>", "</thoughts>\n")


@pytest.mark.parametrize(
    ("text", "answer", "stands"),
    [
        ("about 3 of them", "3", True),
        ("The Lamp.", "lamp", True),
        ("a  desk lamp", "desk lamp", True),
        ("13", "3", False),
        ("-3", "3", False),
        ("3.5", "3", False),
        ("lampshade", "lamp", False),
        ("3", "", False),
    ],
)
def test_a_rejected_answer_that_holds_the_right_one_is_no_preference(
    text: str, answer: str, stands: bool
) -> None:
    from models.pairing import contains

    assert contains(text, answer) is stands
    right = ReasoningPath("q", 0, [], "right", answer, True, 100)
    wrong = ReasoningPath("q", 1, [], "wrong", text, False, 1)
    pairs, dropped = build_pairs([[right, wrong]], "best_right_vs_worst_wrong")
    assert (len(pairs), dropped) == ((0, {"answer_contained": 1}) if stands else (1, {}))
