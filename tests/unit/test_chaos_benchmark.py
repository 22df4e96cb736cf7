"""The chaos benchmark: what it makes of what it saw; nothing is killed here."""

from __future__ import annotations

from collections import Counter

from benchmarks.chaos import Found, judge


def test_any_trouble_is_a_target_missed() -> None:
    found = Found(Counter(flow=2, mlflow=1), runs=2, starts=5, failed_clearly=1)
    rows, table = judge(found)
    assert [row.value for row in rows] == [3, 2, 1, 0, 0, 0, 0, 0]
    assert all(row.holds for row in rows if row.holds is not None) and table.rows[0] == ["flow", "2"]
    found.trouble["twice"].append("dpo@r1 1a2b: 2 times")
    assert [row.what for row in judge(found)[0] if row.holds is False] == [
        "stages that came to their end twice on the same inputs"
    ]
