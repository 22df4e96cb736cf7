"""The gate and the registry behind it: pytest tests/stages/test_promote.py."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from tasks import compare, promote, promotion, tracking
from tasks.fingerprint import fingerprint
from tasks.registry import CHALLENGER, Agents, Registry
from tasks.stage import StageError
from tests.support.accounts import refuse_deletes
from tests.support.results_data import predictions, round_metrics, write_rounds, write_system


def decided(base, candidate, margin=0.01):
    rows = {"base": base, "r1": candidate}
    comparison = compare.run(rows, {"r1": round_metrics(1)}, resamples=2000, seed=0)
    opponent = promote.Opponent("base", base)
    return promote.run(comparison, candidate, opponent, agents=None, perception_margin=margin, resamples=2000)


def test_the_first_generation_that_beats_base_is_promoted():
    decision = decided(predictions(0.40), predictions(0.50))
    assert decision["decision"] == "promote" and decision["reasoning"]["low"] > 0
    assert "r1 passes the gate: +10.0 points on reasoning against base" in decision["reason"]


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


def decide_and_apply(settings):
    """What a whole run does: decide, then carry out."""
    decision = promote.stage(settings)
    return decision, promote.apply(settings, version={"run": "run/1", "commit": "c" * 40})


def test_champions_come_and_stay_by_the_registry(checkout):
    settings = promote.Params(resamples=2000)
    with tracking.shared_recorder():
        evaluated(predictions(0.60, 0.90, 0.60))
        first = promote.stage(settings)
        bytes_before = fingerprint("artifacts/promote", cache=False)
        registry = Registry()
        assert first["decision"] == "promote" and registry.champion() is None, "the stage only decides"
        promote.main(["--apply"])
        champion = registry.champion()
        assert (champion.number, champion.over, champion.generation) == ("1", "base", "r1")
        assert champion.agents == Agents("1" * 32 + ".dir", "5" * 32 + ".dir")
        assert champion.accuracy["reasoning"]["mean"] == 0.6 and "run" not in champion.tags

        _, again = decide_and_apply(settings)
        assert fingerprint("artifacts/promote", cache=False) == bytes_before
        assert again.state == "champion" and registry.champion() == champion
        assert registry.champion().tags["run"] == "run/1" and len(registry.history()) == 1

        evaluated(predictions(0.50, 0.90, 0.50), summary="6" * 32 + ".dir")
        worse, kept = decide_and_apply(settings)
        assert worse["decision"] == "keep" and worse["opponent"] == "champion r1 (version 1)"
        assert (registry.champion(), registry.challenger(), kept.state) == (champion, kept.version, "kept")

        evaluated(predictions(0.70, 0.90, 0.70), md5="3" * 32 + ".dir")
        better, _ = decide_and_apply(settings)
        bytes_before = fingerprint("artifacts/promote", cache=False)
        assert (better["decision"], better["opponent"]) == ("promote", "champion r1 (version 1)")
        assert better["reasoning"]["mean"] == pytest.approx(0.1)
        assert (registry.champion().number, registry.champion().over) == ("3", "1")
        promote.stage(settings)
        assert fingerprint("artifacts/promote", cache=False) == bytes_before

        evaluated(predictions(0.80, 0.90, 0.80), md5="3" * 32 + ".dir", summary="7" * 32 + ".dir")
        again, _ = decide_and_apply(settings)
        assert again["opponent"] == "champion r1 (version 3)"
        assert (registry.champion().number, registry.champion().over) == ("4", "3")
        right = sum(row["right"] for row in registry.predictions(registry.version("3")))
        assert right < sum(row["right"] for row in registry.predictions(registry.champion()))

        promotion.roll_back(registry, registry.version("3"), "misreads sevens")
        _, held = decide_and_apply(settings)
        assert held.state == "declined" and "misreads sevens" in held.sentence
        assert registry.champion().number == "3" and registry.previous(registry.champion()) == "1"
        assert [(c.before, c.after, c.how) for c in registry.history()] == [
            (None, "1", "gate"),
            ("1", "3", "gate"),
            ("3", "4", "gate"),
            ("4", "3", "rollback"),
        ]

        evaluated(predictions(0.60, 0.90, 0.60, ids="new-"), md5="4" * 32 + ".dir", ids="new-")
        other = promote.stage(settings)
        assert other["opponent"] == "base" and "answered other questions" in other["reason"]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


WRITES = (
    "log_model_artifact",
    "create_registered_model",
    "_create_model_version",
    "set_model_version_tag",
    "delete_model_version_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_registered_model_tag",
    "delete_registered_model_tag",
)


def kill_at(monkeypatch, count):
    """The process ends instead of making its count-th write to MLflow; returns what is left to count."""
    from mlflow import MlflowClient

    left = [count]

    def counted(write):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed(write.__name__)
            return write(*arguments, **options)

        return call

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    return left


def agents(number):
    return Agents(str(number) * 32, str(number) * 32)


def candidate(number, folder):
    rows = folder / "predictions.jsonl"
    rows.write_text('{"id": "1"}\n')
    tags = {"run": f"run/{number}", "reason": "better"}
    return promotion.Candidate(f"r{number}", agents(number), rows, tags)


def settle(registry, number, folder, approval=None, over=None):
    """A candidate that passed the gate, against the one before it unless told otherwise."""
    gain = {"mean": 0.1, "low": 0.1, "high": 0.1}
    passed = {"decision": "promote", "opponent": "base", "reason": f"r{number} is better"}
    over = number - 1 if over is None else over
    passed |= {"opponent": f"r{over}", "opponent_agents": asdict(agents(over))} if over else {}
    passed |= {"reasoning": gain, "perception": gain}
    return promotion.settle(registry, passed, candidate(number, folder), approval)


def test_a_champion_made_since_the_decision_is_not_replaced_unseen(checkout):
    """Two checkouts with one registry: both beat version 1, the second was never compared with the first."""
    registry = Registry("shared")
    settle(registry, 1, checkout)
    assert settle(registry, 2, checkout).state == "champion"
    for approval in (None, promotion.Approval(24)):
        third = settle(registry, 3, checkout, approval, over=1)
        assert third.state == "kept" and "version 2 (r2) became champion" in third.sentence
        assert registry.champion().number == "2" and registry.waiting() is None
    assert settle(registry, 3, checkout, over=2).state == "champion"
    assert settle(registry, 2, checkout).state == "kept", "an old decision, carried out again"
    assert registry.champion().number == "3"


def test_who_may_not_delete_may_approve_reject_promote_and_roll_back(checkout, monkeypatch):
    refuse_deletes(monkeypatch)
    registry, wait = Registry("of-another"), promotion.Approval(24)
    waits = settle(registry, 1, checkout, wait).version
    assert promotion.rule(registry, waits.number, "promote", "looked at forty").awaiting is None
    assert registry.champion() == waits and registry.challenger() is None and registry.waiting() is None
    assert registry.aliases() == {"champion": "1"}

    settle(registry, 2, checkout, wait)
    rejected = promotion.rule(registry, "2", "keep", "misreads sevens")
    assert rejected.declined.reason == "misreads sevens" and rejected.awaiting is None
    assert registry.champion().number == "1" and registry.challenger().number == "2"

    promotion.promote(registry, rejected, "by hand", "after all")
    assert registry.champion().number == "2" and registry.champion().declined is None
    assert registry.challenger() is None
    settle(registry, 3, checkout)
    assert registry.champion().number == "3" and registry.challenger() is None, "not the champion before it"
    promotion.roll_back(registry, registry.version("1"), "reads sixes as nines")
    assert registry.champion().number == "1" and registry.challenger() is None


def test_a_rejected_candidate_whose_wait_was_not_cleared_is_not_promoted_when_its_time_is_over(checkout):
    registry = Registry("half-rejected")
    settle(registry, 1, checkout)
    waits = settle(registry, 2, checkout, promotion.Approval(1e-9, "promote")).version
    over = waits.tags["awaiting"]
    promotion.decline(registry, waits, "approval", "misreads sevens")
    registry.client.set_model_version_tag(registry.model, waits.number, "awaiting", over)
    assert registry.waiting() is None and promotion.take_default(registry) is None
    assert registry.champion().number == "1"


def roll_back(registry, folder):
    if registry.champion().number == "2":
        promotion.roll_back(registry, registry.version("1"), "misreads sevens")


def approve(registry, folder):
    waits = settle(registry, 2, folder, promotion.Approval(24)).version
    promotion.rule(registry, waits.number, "promote", "looked at forty")


def reject(registry, folder):
    waits = settle(registry, 2, folder, promotion.Approval(24)).version
    promotion.rule(registry, waits.number, "keep", "misreads sevens")


def follow(registry, folder):
    """The gate's champion after one that a person approved, on which the alias of what waited is left."""
    if registry.champion().number == "1":
        registry.client.set_registered_model_alias(registry.model, CHALLENGER, "1")
    settle(registry, 2, folder)


CHANGES = {
    "follow": (1, follow),
    "approve": (1, approve),
    "reject": (1, reject),
    "roll back": (2, roll_back),
}


def state(registry):
    """All that the registry says, without times."""
    tags = [{k: v for k, v in found.tags.items() if k != "declined"} for found in registry.versions()]
    down = [found.declined and found.declined.how for found in registry.versions()]
    changes = [(c.before, c.after, c.how, c.reason) for c in registry.history()]
    return registry.aliases(), changes, tags, down


@pytest.mark.parametrize("change", CHANGES)
def test_killed_before_any_write_and_called_again_ends_the_same(checkout, monkeypatch, change):
    before, act = CHANGES[change]
    ends, writes = [], 0
    while not ends or ends[-1][1] < 0:
        registry = Registry(f"killed-at-{writes}")
        for number in range(1, before + 1):
            settle(registry, number, checkout)
        held = registry.champion()
        with monkeypatch.context() as killing:
            left = kill_at(killing, writes)
            with suppress(Killed):
                act(registry, checkout)
        found = registry.champion()
        if found != held:
            assert registry.history()[-1].after == found.number and "promoted_over" in found.tags
        act(registry, checkout)
        ends.append((state(registry), left[0]))
        writes += 1
    assert writes > 3
    assert all(end == ends[-1][0] for end, _ in ends)
