"""The gate and the registry behind it: pytest tests/stages/test_promote.py."""

import json
from pathlib import Path

import pytest

from tasks import compare, promote, tracking
from tasks.fingerprint import fingerprint
from tasks.registry import Agents, Registry
from tasks.stage import StageError
from tests.support.results_data import predictions, round_metrics, write_rounds, write_system


def decided(base, candidate, margin=0.01):
    rows = {"base": base, "r1": candidate}
    comparison = compare.run(rows, {"r1": round_metrics(1)}, resamples=2000, seed=0)
    opponent = promote.Opponent("base", base)
    return promote.run(comparison, candidate, opponent, agents=None, perception_margin=margin, resamples=2000)


def test_the_first_generation_that_beats_base_is_promoted():
    decision = decided(predictions(0.40), predictions(0.50))
    assert decision["decision"] == "promote" and decision["reasoning"]["low"] > 0
    assert "r1 is promoted: +10.0 points on reasoning against base" in decision["reason"]


def test_a_gain_within_noise_keeps_the_champion():
    base = predictions(0.50)
    candidate = [dict(row) for row in base]
    for index, row in enumerate(
        row for row in candidate if row["set"] == "reasoning" and row["split"] == "test"
    ):
        if index % 10 == 0:  # as many gained as lost, but for two
            row["right"] = not row["right"]
    decision = decided(base, candidate)
    assert decision["decision"] == "keep" and "within noise" in decision["reason"]


def test_a_loss_of_perception_is_refused_whatever_the_gain():
    decision = decided(predictions(0.40, 0.90), predictions(0.60, 0.88))
    assert decision["decision"] == "keep"
    assert "although it gains +20.0 points" in decision["reason"] and "-2.0 points" in decision["reason"]
    assert decided(predictions(0.40, 0.90), predictions(0.60, 0.88), margin=0.03)["decision"] == "promote"


def test_validation_chooses_and_test_does_not():
    rows = {
        "base": predictions(0.4, 0.9, 0.4),
        "multi_agent": predictions(0.6, 0.9, 0.6),
        "r1": predictions(0.7, 0.9, 0.65),
        "r2": predictions(0.9, 0.9, 0.65),
    }
    comparison = compare.run(rows, {}, resamples=100, seed=0)
    assert promote.choose(comparison) == ("r1", {"multi_agent": 0.6, "r1": 0.65, "r2": 0.65})
    unvalidated = {name: [r for r in own if r["split"] == "test"] for name, own in rows.items()}
    assert promote.choose(compare.run(unvalidated, {}, resamples=100, seed=0))[0] == "r2"


def test_nothing_to_promote_says_so():
    with pytest.raises(StageError, match="no generation"):
        promote.choose({"order": ["base"], "systems": {"base": {}}})


def evaluated(r1, md5="1" * 32 + ".dir", ids="", summary="5" * 32 + ".dir"):
    """The stages up to compare, without MLflow."""
    write_rounds(1)
    write_system("base", predictions(0.40, 0.90, 0.40, reasons=False, ids=ids))
    write_system("multi_agent", predictions(0.41, 0.90, 0.40, ids=ids), "a" * 32 + ".dir")
    write_system("r1", r1, md5, summary)
    systems = compare.load_predictions(["base", "multi_agent", "r1"])
    Path("artifacts/compare").mkdir(parents=True, exist_ok=True)
    found = compare.run(systems, {"r1": round_metrics(1)}, resamples=2000, seed=0)
    Path("artifacts/compare/comparison.json").write_text(json.dumps(found))


def test_champions_come_and_stay_by_the_registry(checkout):
    settings = promote.Params(resamples=2000)
    with tracking.shared_recorder():
        evaluated(predictions(0.60, 0.90, 0.60))
        first = promote.stage(settings)
        bytes_before = fingerprint("artifacts/promote", cache=False)
        registry = Registry()
        champion = registry.champion()
        assert (first["decision"], champion.number, champion.over) == ("promote", "1", "base")
        assert champion.agents == Agents("1" * 32 + ".dir", "5" * 32 + ".dir")

        promote.stage(settings)
        promote.main(["--apply"])
        assert fingerprint("artifacts/promote", cache=False) == bytes_before
        assert registry.champion() == champion

        evaluated(predictions(0.50, 0.90, 0.50), summary="6" * 32 + ".dir")
        worse = promote.stage(settings)
        assert worse["decision"] == "keep" and worse["opponent"] == "champion r1 (version 1)"
        assert registry.champion() == champion

        evaluated(predictions(0.60, 0.90, 0.60), md5="2" * 32 + ".dir")
        kept = promote.stage(settings)
        assert kept["decision"] == "keep" and kept["opponent"] == "champion r1 (version 1)"
        assert registry.champion() == champion

        evaluated(predictions(0.70, 0.90, 0.70), md5="3" * 32 + ".dir")
        better = promote.stage(settings)
        bytes_before = fingerprint("artifacts/promote", cache=False)
        assert (better["decision"], better["opponent"]) == ("promote", "champion r1 (version 1)")
        assert better["reasoning"]["mean"] == pytest.approx(0.1)
        assert (registry.champion().number, registry.champion().over) == ("2", "1")
        promote.stage(settings)
        assert fingerprint("artifacts/promote", cache=False) == bytes_before

        evaluated(predictions(0.80, 0.90, 0.80), md5="3" * 32 + ".dir", summary="7" * 32 + ".dir")
        again = promote.stage(settings)
        assert again["opponent"] == "champion r1 (version 2)"
        assert (registry.champion().number, registry.champion().over) == ("3", "2")
        assert len(registry.predictions(registry.version("2"))) == len(
            registry.predictions(registry.champion())
        )
        right = sum(row["right"] for row in registry.predictions(registry.version("2")))
        assert right < sum(row["right"] for row in registry.predictions(registry.champion()))

        evaluated(predictions(0.60, 0.90, 0.60, ids="new-"), md5="4" * 32 + ".dir", ids="new-")
        other = promote.stage(settings)
        assert other["opponent"] == "base" and "answered other questions" in other["reason"]
