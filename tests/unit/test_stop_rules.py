"""Rules that stop a run: what strikes, what does not, and since when.

pytest tests/unit/test_stop_rules.py
"""

from __future__ import annotations

from typing import Any

from models.stop_rules import Sign, StopRules, divergence

RULES = StopRules()


def logs(**columns: list[float]) -> list[dict[str, Any]]:
    count = len(next(iter(columns.values())))
    return [
        {"step": 10 * (n + 1), **{key.replace("__", "/"): values[n] for key, values in columns.items()}}
        for n in range(count)
    ]


def strikes(history: list[dict[str, Any]]) -> Sign | None:
    """The sign at the log at which training would stop."""
    for end in range(1, len(history) + 1):
        sign = divergence(history[:end], RULES)
        if sign and sign.logs >= RULES.patience:
            return sign
    return None


def test_a_loss_that_explodes_strikes_with_its_beginning() -> None:
    sign = strikes(logs(loss=[2.0, 1.0, 0.9, 0.8, 0.8, 0.7, 6.0, 7.0, 9.0]))
    assert sign and sign.since == 70 and "began at 2" in sign.seen and "learning_rate" in sign.advice


def test_a_spike_a_high_start_and_late_noise_do_not_strike() -> None:
    assert strikes(logs(loss=[2.0, 1.0, 0.9, 0.8, 0.8, 6.0, 7.0, 0.8, 0.8])) is None
    assert strikes(logs(loss=[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0])) is None
    assert strikes(logs(loss=[0.7, 0.1, 0.02, 0.01, 0.01, 0.01, 0.2, 0.3, 0.2, 0.3])) is None


def test_the_loss_of_a_policy_gradient_tells_nothing() -> None:
    about_zero = logs(loss=[-0.03, -0.02, -0.01, 0.0, -0.02, 0.2, 0.3, 0.2, 0.1])
    assert strikes(about_zero)
    assert strikes([{**log, "completions/clipped_ratio": 0.0} for log in about_zero]) is None


def test_collapsing_chosen_completions_strike() -> None:
    lengths = [100.0] * 6
    fallen = logs(loss=[0.5] * 6, logps__chosen=[-50.0, -60, -90, -160, -170, -180], chosen_length=lengths)
    sign = strikes(fallen)
    assert sign and sign.since == 40 and "is -1.8 and began at -0.5" in sign.seen
    usual = logs(loss=[0.5] * 6, logps__chosen=[-50.0, -60, -80, -90, -95, -99], chosen_length=lengths)
    assert strikes(usual) is None


def test_completions_of_other_lengths_are_no_collapse() -> None:
    longer = logs(loss=[0.5] * 5, logps__chosen=[-50.0, -250, -250, -250, -250],
                  chosen_length=[100.0, 500, 500, 500, 500])  # fmt: skip
    assert strikes(longer) is None


def test_completions_that_reach_the_limit_strike_unless_they_did_at_the_start() -> None:
    name = "completions__clipped_ratio"
    assert strikes(logs(loss=[0.5] * 5, **{name: [0.1, 0.4, 0.7, 0.8, 0.9]}))
    assert strikes(logs(loss=[0.5] * 5, **{name: [0.9, 0.9, 0.8, 0.8, 0.9]})) is None


def test_the_end_of_a_run_is_no_log() -> None:
    assert divergence([*logs(loss=[1.0, 0.5]), {"step": 20, "train_loss": 0.7}], RULES) is None
    assert divergence([], RULES) is None
