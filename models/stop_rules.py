"""When a training run has diverged: rules on what it logs, which stop it while its last checkpoint is good.

    sign = divergence(trainer.state.log_history, StopRules())
    if sign: sign.seen, sign.since, sign.advice

A rule strikes after `patience` logs in succession. From the first of these on no checkpoint is written, so
that the last one is from before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Log = Mapping[str, Any]

SAMPLED = "completions/clipped_ratio"
"""Logged where training samples itself: the share of completions that reach the limit of tokens."""
WINDOW, SETTLED = 20, 5
"""Logs that a running median looks back on, and that there must be before it counts."""


@dataclass(frozen=True)
class StopRules:
    """patience: logs in succession. loss: times the median of the last twenty logs, if it is above that of
    the start, too. chosen_drop: nats a token by which preference training lowers the log-probability of the
    chosen completions from where it began. Some fall is usual where they resemble the rejected ones
    (likelihood displacement, arXiv 2410.08847); at one nat a token is a third as likely as it was. cut:
    share of sampled completions that reach the limit of tokens, where training samples itself."""

    patience: int = 3
    loss: float = 3.0
    chosen_drop: float = 1.0
    cut: float = 0.5


@dataclass(frozen=True)
class Sign:
    """What was seen in the last `logs` logs, from the step `since` on, and what to try."""

    seen: str
    since: int
    logs: int
    advice: str


def divergence(history: Sequence[Log], rules: StopRules) -> Sign | None:
    """The sign of the rule that has been broken for longest up to the last log; None if none is."""
    logs = [entry for entry in history if "loss" in entry]
    found = [sign for rule in RULES if (sign := rule(logs, rules))]
    return max(found, key=lambda sign: sign.logs, default=None)


def _loss(logs: Sequence[Log], rules: StopRules) -> Sign | None:
    if logs and SAMPLED in logs[-1]:
        return None  # of a policy gradient: a number about zero, whose size says nothing
    losses = [entry["loss"] for entry in logs]

    def bad(index: int) -> bool:
        before = losses[max(0, index - WINDOW) : index]
        level = statistics.median(before) if len(before) >= SETTLED else float("inf")
        return bool(losses[index] > max(rules.loss * level, losses[0]))

    return _sign(
        logs,
        bad,
        lambda entry: f"the loss is {entry['loss']:.3g} and began at {losses[0]:.3g}",
        "lower `learning_rate`, raise `warmup`, or look for broken records",
    )


def _chosen(logs: Sequence[Log], rules: StopRules) -> Sign | None:
    if not logs or not logs[0].get("chosen_length") or "logps/chosen" not in logs[0]:
        return None
    each = [entry["logps/chosen"] / entry["chosen_length"] for entry in logs]
    return _sign(
        logs,
        lambda index: bool(each[index] < each[0] - rules.chosen_drop),
        lambda entry: (
            f"the log-probability of a token of the chosen completions is {each[-1]:.3g} and began at "
            f"{each[0]:.3g}"
        ),
        "lower `learning_rate`, raise `loss.beta`, give the loss `sft` more weight, or take pairs that "
        "differ more (`score.min_margin`)",
    )


def _cut(logs: Sequence[Log], rules: StopRules) -> Sign | None:
    return _sign(
        logs,
        lambda index: bool(logs[index].get(SAMPLED, 0) > max(rules.cut, logs[0].get(SAMPLED, 0))),
        lambda entry: f"{entry[SAMPLED]:.0%} of the sampled completions reach the limit of tokens",
        "lower `learning_rate`, or raise `max_new_tokens` if these are good completions",
    )


RULES = (_loss, _chosen, _cut)


def _sign(
    logs: Sequence[Log], bad: Callable[[int], bool], seen: Callable[[Log], str], advice: str
) -> Sign | None:
    """Of a rule that the last log breaks, and since when it does."""
    count = 0
    while count < len(logs) and bad(len(logs) - 1 - count):
        count += 1
    return Sign(seen(logs[-1]), int(logs[-count]["step"]), count, advice) if count else None
