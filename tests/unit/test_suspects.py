"""Which request kills an engine, found by asking again."""

from __future__ import annotations

import random
from collections.abc import Collection

import pytest

from models.engines.suspects import RESTARTS, Suspects


def asked_again(
    suspects: Suspects, requests: Collection[int], kills: Collection[int], seed: int = 0
) -> tuple[list[int], int]:
    """What was answered, in order, and the deaths, of an engine that answers in any order until it comes to
    one that kills it. A request's prompt is its number modulo 1,000."""
    order, answered, deaths = random.Random(seed), list[int](), 0
    left = list(requests)
    while left := [number for number in left if not suspects.is_deadly(number % 1000)]:
        under_way = {number: number % 1000 for number in left if suspects.may_ask(number)}
        for number in order.sample(sorted(under_way), len(under_way)):
            if number % 1000 in kills:
                suspects.died(under_way)
                deaths += 1
                break
            suspects.left(number, answered=True)
            under_way.pop(number)
            left.remove(number)
            answered.append(number)
        if suspects.hopeless:
            break
        for number in left:
            if suspects.is_deadly(number % 1000):
                suspects.left(number)
    return answered, deaths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "deaths"), [(1, 2), (8, 2), (9, 3), (40, 3), (256, 3), (1000, 3)])
def test_one_deadly_request_is_found_with_its_third_death_at_most(count: int, deaths: int, seed: int) -> None:
    suspects = Suspects()
    answered, died = asked_again(suspects, range(count), {count // 3}, seed)
    assert sorted(answered) == [n for n in range(count) if n != count // 3]
    assert died <= deaths and suspects.unexplained == 0


@pytest.mark.parametrize("seed", range(20))
def test_several_deadly_requests_are_found_wherever_they_stand(seed: int) -> None:
    kills = set(random.Random(seed).sample(range(256), 3))
    suspects = Suspects()
    answered, died = asked_again(suspects, range(256), kills, seed)
    assert set(answered) == set(range(256)) - kills and len(answered) == 253
    assert died <= 7 and suspects.unexplained == 0 and not suspects.hopeless


def test_neighbours_that_are_deadly_are_no_sign_of_a_broken_engine() -> None:
    for count in (8, 40, 256):
        answered, _ = asked_again(Suspects(), range(count), {0, 1, 2})
        assert set(answered) == set(range(3, count))


def test_requests_with_the_prompt_that_was_named_are_not_asked_again() -> None:
    samples = [1000 * sample + question for question in range(16) for sample in range(16)]
    answered, died = asked_again(Suspects(), samples, {5})
    assert sorted(answered) == sorted(n for n in samples if n % 1000 != 5) and died <= 4


@pytest.mark.parametrize("count", [1, 5, 40, 256])
def test_an_engine_that_dies_whatever_it_is_asked_is_given_up(count: int) -> None:
    suspects = Suspects()
    for round_ in range(10):
        answered, _ = asked_again(suspects, range(count * round_, count * (round_ + 1)), range(1000))
        assert not answered
        if suspects.hopeless:
            break
    assert suspects.fruitless == RESTARTS + 1


def test_what_is_no_suspect_waits_until_there_are_none() -> None:
    suspects = Suspects()
    suspects.died({1: "a", 2: "b"})
    assert [suspects.may_ask(number) for number in (1, 2, 3)] == [True, False, False]
    assert suspects.left(1, answered=True)
    assert [suspects.may_ask(number) for number in (2, 3)] == [True, False]
    assert suspects.left(2)
    assert suspects.may_ask(3)


def test_deaths_that_no_request_is_guilty_of_add_up() -> None:
    suspects = Suspects()
    for number in range(RESTARTS):
        assert not suspects.hopeless
        suspects.died({number: "a"} if number % 2 else {})
        suspects.left(number, answered=True)
    assert suspects.unexplained == RESTARTS and not suspects.hopeless
    suspects.died({})
    assert suspects.hopeless


def test_a_death_before_the_suspect_was_asked_names_nobody() -> None:
    suspects = Suspects()
    suspects.died({1: "a"})
    suspects.died({})
    assert not suspects.is_deadly("a") and suspects.may_ask(1)
