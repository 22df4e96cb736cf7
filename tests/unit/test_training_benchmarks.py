"""Benchmarks of training: how figures are judged, without running one.

pytest tests/unit/test_training_benchmarks.py
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import preference, sft, training_scale


def test_preference_training_is_judged_by_speed_numbers_and_memory() -> None:
    def run(speed: float, loss: float, memory: int) -> dict[str, Any]:
        return {"pairs_per_second": speed, "seconds": 9.0, "losses": [1.0, loss], "peak_bytes": memory}

    check = {"difference": 1e-6, "prompt": 40.0, "completion": 10.0}
    sides = {preference.PLAIN: [run(10, 0.5, 100)], preference.OURS: [run(21, 0.5 + 1e-5, 90)]}
    rows, _ = preference.judge({preference.CASES["4"]: {"check": check, **sides}})
    assert [row.holds for row in rows if row.target] == [True] * 5
    assert rows[2].value == pytest.approx(21 / 10 / (20 / 9))
    sides[preference.OURS].append(run(20, 0.5 + 1e-3, 120))
    rows, _ = preference.judge({preference.CASES["4"]: {"check": check | {"difference": 1e-3}, **sides}})
    assert [row.holds for row in rows if row.target] == [True, True, False, False, False]


def test_supervised_training_is_judged_by_tokens_losses_waiting_and_memory() -> None:
    def run(speed: float, loss: float, memory: int, waiting: float = 0.01) -> dict[str, Any]:
        return {"tokens_per_second": speed, "padding": 0.1, "waiting": waiting, "seconds": 9.0,
                "losses": [1.0, loss], "peak_bytes": memory}  # fmt: skip

    sides = {
        sft.PLAIN: [run(10, 0.5, 100)] * 3,
        sft.BY_LENGTH: [run(14, 0.7, 100)] * 3,
        sft.OURS: [run(21, 0.5, 50)] * 3,
    }
    rows, table = sft.judge({"embedded": sides})
    assert [row.holds for row in rows if row.target] == [True] * 4
    assert (rows[0].value, rows[-1].value) == (pytest.approx(2.1), pytest.approx(1.5)) and len(
        table.rows
    ) == 3
    sides[sft.OURS] = [run(14, 0.6, 150, waiting=0.2)] * 3
    rows, _ = sft.judge({"embedded": sides})
    assert [row.holds for row in rows if row.target] == [False] * 4


def test_another_row_must_cost_what_the_rows_before_did() -> None:
    def runs(*seconds: float) -> dict[int, dict[str, Any]]:
        sizes = (1_000, 10_000, 100_000)
        return {
            size: {"seconds": taken, "waited": 1.0, "before": 0, "peak": 1024 * size}
            for size, taken in zip(sizes, seconds, strict=True)
        }

    rows, table = training_scale.judge({"sft": runs(3.0, 12.0, 102.0)})
    assert [row.holds for row in rows if row.target] == [True, True] and len(table.rows) == 3
    assert [row.value for row in rows] == [pytest.approx(102 / 100 / 3), pytest.approx(1), pytest.approx(1)]
    rows, _ = training_scale.judge({"sft": runs(3.0, 12.0, 402.0)})
    assert [row.holds for row in rows if row.target] == [False, False]
