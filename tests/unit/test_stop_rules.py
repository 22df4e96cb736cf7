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
        sign = divergence(history[:end], RULES, beta=0.1)
        if sign and sign.logs >= RULES.patience:
            return sign
    return None


def test_a_loss_that_explodes_strikes_with_its_beginning() -> None:
    sign = strikes(logs(loss=[2.0, 1.0, 0.9, 0.8, 0.8, 0.7, 6.0, 7.0, 9.0]))
    assert sign and sign.since == 70 and "is 9 and was 0.7" in sign.seen and "learning_rate" in sign.advice
    below_the_start = [5 / (n + 1) for n in range(20)] + [4.9] * 3
    sign = strikes(logs(loss=below_the_start))
    assert sign and sign.since == 210


def test_a_spike_a_high_start_and_late_noise_do_not_strike() -> None:
    assert strikes(logs(loss=[2.0, 1.0, 0.9, 0.8, 0.8, 6.0, 7.0, 0.8, 0.8])) is None
    assert strikes(logs(loss=[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0])) is None
    assert strikes(logs(loss=[0.7, 0.1, 0.02, 0.01, 0.01, 0.01, 0.2, 0.3, 0.2, 0.3])) is None


def test_a_loss_that_jumps_all_the_time_does_not_strike() -> None:
    """36 conversations in batches of eight: a few that are hard make every second batch."""
    jumping = [
        1.8,
        13.9,
        2.3,
        1.5,
        21.3,
        2.1,
        1.2,
        10.2,
        1.0,
        14.0,
        1.3,
        8.4,
        0.7,
        0.7,
        10.8,
        0.6,
        0.9,
        0.4,
        6.4,
    ]
    high = [5.5, 7.3, 5.1]
    assert strikes(logs(loss=[*jumping, 8.6, 0.3, 0.3, 0.6, *high, 0.3])) is None
    sign = strikes(logs(loss=[*jumping, 8.6, 0.3, 0.3, 0.6, *(5 * loss for loss in high)]))
    assert sign and sign.since == 240


def test_the_loss_of_a_policy_gradient_says_nothing() -> None:
    about_zero = [1e-3, -2e-3, 1e-3, 2e-3, 1e-3, 3.0, 4.0, 5.0]
    assert strikes(logs(loss=about_zero, completions__clipped_ratio=[0.1] * 8)) is None


def test_collapsing_chosen_completions_strike() -> None:
    lengths = [100.0] * 6
    fallen = logs(loss=[0.5] * 6, rewards__chosen=[0.0, -1, -4, -11, -12, -13], chosen_length=lengths)
    sign = strikes(fallen)
    assert sign and sign.since == 40 and "fallen by 1.3 nats" in sign.seen
    usual = logs(loss=[0.5] * 6, rewards__chosen=[0.0, -1, -4, -5, -6, -7], chosen_length=lengths)
    assert strikes(usual) is None


def test_completions_that_reach_the_limit_strike_where_they_did_not_before() -> None:
    name = "completions__clipped_ratio"
    sign = strikes(logs(loss=[0.5] * 5, **{name: [0.1, 0.4, 0.7, 0.8, 0.9]}))
    assert sign and sign.since == 30 and "90%" in sign.seen
    assert strikes(logs(loss=[0.5] * 5, **{name: [0.6, 0.62, 0.7, 0.9, 0.9]})) is None


def test_the_end_of_a_run_is_no_log() -> None:
    assert divergence([*logs(loss=[1.0, 0.5]), {"step": 20, "train_loss": 0.7}], RULES) is None
    assert divergence([], RULES) is None
