"""The reasoning set takes the best right path of a question; flawed paths come from all score bands."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from models.records import ReasoningPath
from tasks.curate import across_bands, best_paths
from tasks.summary_data import longest


def path(sample: int, score: int | None, right: bool | None = True, question: str = "q") -> ReasoningPath:
    return ReasoningPath(question, sample, [], f"text {sample}", "", right, score)


@pytest.mark.parametrize(
    ("paths", "least", "samples"),
    [
        ([], 1, []),
        ([path(0, 50), path(1, 90), path(2, 70)], 1, [1]),
        ([path(0, 90), path(1, 90)], 1, [0]),
        ([path(0, 50, False), path(1, 20)], 1, [1]),
        ([path(0, 99, None), path(1, 1)], 1, [1]),
        ([path(0, None)], 1, []),
        ([path(0, None)], 0, [0]),
        ([path(0, 50), path(1, 59)], 60, []),
        ([path(0, 60)], 60, [0]),
        ([path(0, 9), path(1, 5, question="r"), path(2, 7, question="r")], 1, [0, 2]),
    ],
)
def test_best_paths(paths: list[ReasoningPath], least: int, samples: list[int]) -> None:
    assert [p.sample for p in best_paths(paths, least)] == samples


def draw(paths: list[ReasoningPath], count: int, seed: int = 0) -> list[ReasoningPath]:
    return across_bands(paths, count, 4, np.random.default_rng(seed))


def band(path: ReasoningPath) -> int:
    return ((path.score or 1) - 1) // 25


def test_bands_are_drawn_from_evenly() -> None:
    paths = [path(n, n % 100 + 1) for n in range(400)]
    assert Counter(map(band, draw(paths, 40))) == {0: 10, 1: 10, 2: 10, 3: 10}
    crowded = [path(n, 99) for n in range(90)] + [path(100, 1), path(101, 30)]
    assert Counter(map(band, draw(crowded, 10))) == {0: 1, 1: 1, 3: 8}


def test_no_path_is_drawn_twice_and_never_more_than_there_are() -> None:
    paths = [path(n, score) for n, score in enumerate([1, 25, 26, 50, 51, 75, 76, 100])]
    assert sorted(p.sample for p in draw(paths, 99)) == list(range(8))
    assert Counter(map(band, draw(paths, 4))) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert draw(paths, 0) == [] and draw([], 5) == []


def test_the_draw_hangs_on_the_seed_alone() -> None:
    paths = [path(n, n % 100 + 1) for n in range(200)]
    assert draw(paths, 20, 1) == draw(paths, 20, 1) != draw(paths, 20, 2)


def test_the_longest_chain_of_a_question_is_kept_the_first_of_several() -> None:
    def chain(question: str, sample: int, steps: int) -> dict:
        return {"question_id": question, "sample": sample, "steps": [{}] * steps}

    chains = [chain("q", 0, 1), chain("q", 1, 3), chain("q", 2, 3), chain("r", 0, 2), chain("r", 1, 1)]
    assert [(c["question_id"], c["sample"]) for c in longest(chains)] == [("q", 1), ("r", 0)]
    assert longest([]) == []
