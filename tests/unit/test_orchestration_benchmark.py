"""The orchestration benchmark: the project that it makes and what it computes; nothing is run here.

pytest tests/unit/test_orchestration_benchmark.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks.orchestration import DAGSTER, DVC, OURS, Times, judge, without_work

DVC_YAML = Path(__file__).resolve().parents[2] / "dvc.yaml"


def test_only_the_commands_of_dvc_yaml_are_replaced() -> None:
    real, made = (
        YAML(typ="safe").load(t) for t in (DVC_YAML.read_text(), without_work(DVC_YAML.read_text()))
    )
    for stages in (real["stages"], made["stages"]):
        for entry in stages.values():
            command = entry.get("do", entry).pop("cmd")
            assert command.startswith("mkdir -p artifacts/") == (stages is made["stages"])
    assert made == real


def test_overhead_is_above_the_bare_commands_and_by_stage() -> None:
    ours = Times(up_to_date=[2.0, 2.5, 9.0], executed=[21.0, 22.0, 40.0], bare=[2.0, 2.0, 2.0])
    slow = Times(up_to_date=[4.0], executed=[62.0], bare=[2.0])
    assert ours.overhead(20) == pytest.approx(1.0)
    rows, table = judge({OURS: ours, DVC: slow}, 20)
    assert [row.value for row in rows] == pytest.approx([2.5, 1.0, 4.0, 3.0])
    assert [row.holds for row in rows] == [True, True, None, None]
    assert "2.00 to 9.00 s" in rows[0].what and len(table.rows) == 2
    missed, _ = judge({OURS: slow}, 20)
    assert [row.holds for row in missed] == [False, False]


def test_a_peer_without_versions_has_no_run_with_nothing_to_do() -> None:
    rows, table = judge({DAGSTER: Times(up_to_date=[], executed=[12.0], bare=[2.0])}, 20)
    assert [row.value for row in rows] == pytest.approx([0.5]) and table.rows[0][1] == ""


def test_the_metaflow_peer_is_a_chain_of_all_stages() -> None:
    from benchmarks.peers.metaflow_peer import source

    text = source([["first", "true"], ["dpo@r1", "mkdir 'a b'"]])
    compile(text, "flow", "exec")
    assert [text.count(f"self.next(self.{name})") for name in ("first", "dpo_r1", "end")] == [1, 1, 1]
