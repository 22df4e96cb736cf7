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
RISE = 1.0
"""Nats above the median: noise about a loss that is nearly zero is no explosion."""


@dataclass(frozen=True)
class StopRules:
    """patience: logs in succession. loss: times the median of the last twenty logs, if it is a nat above
    it, and higher than so many logs in succession have been among these: batches that differ much, as
    those of a small set do, make a loss that jumps up and down for ever. chosen_drop: nats a token by
    which preference training lowers the log-probability of the chosen completions against the reference,
    from where it began. Some fall is usual where they resemble the rejected ones (likelihood
    displacement, arXiv 2410.08847); at one nat a token is a third as likely as it was. cut: by which the
    share of sampled completions that reach the limit of tokens rises, where training samples itself."""

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


def divergence(history: Sequence[Log], rules: StopRules, beta: float = 1.0) -> Sign | None:
    """The sign of the rule that has been broken for longest up to the last log; None if none is. beta: what
    preference training multiplies log-ratios by to have rewards."""
    logs = [entry for entry in history if "loss" in entry]
    signs = _loss(logs, rules), _chosen(logs, rules, beta), _cut(logs, rules)
    found = [sign for sign in signs if sign]
    return max(found, key=lambda sign: sign.logs, default=None)


def _loss(logs: Sequence[Log], rules: StopRules) -> Sign | None:
    if logs and SAMPLED in logs[-1]:
        return None  # of a policy gradient: a number about zero, whose size says nothing
    losses = [entry["loss"] for entry in logs]

    def bad(index: int) -> bool:
        before = losses[max(0, index - WINDOW) : index]
        if len(before) < SETTLED:
            return False
        level, usual = (
            statistics.median(before),
            _highest(before[: 1 - rules.patience or None], rules.patience),
        )
        return bool(losses[index] > max(rules.loss * level, level + RISE, usual))

    return _sign(
        logs,
        bad,
        lambda entry: f"the loss is {losses[-1]:.3g} and was {min(losses):.3g}",
        "lower `learning_rate`, raise `warmup`, or look for broken records",
    )


def _highest(losses: Sequence[float], count: int) -> float:
    """The highest median of `count` losses in succession."""
    medians = (statistics.median(losses[n : n + count]) for n in range(len(losses) - count + 1))
    return max(medians, default=float("-inf"))


def _chosen(logs: Sequence[Log], rules: StopRules, beta: float) -> Sign | None:
    """By the reward, which takes from each pair what the reference gives it: pairs are not alike."""
    if not logs or not {"rewards/chosen", "chosen_length"} <= logs[0].keys():
        return None
    gained = [entry["rewards/chosen"] / beta / max(entry["chosen_length"], 1) for entry in logs]
    return _sign(
        logs,
        lambda index: bool(gained[index] < gained[0] - rules.chosen_drop),
        lambda entry: (
            f"the log-probability of a token of the chosen completions has fallen by "
            f"{gained[0] - gained[-1]:.2g} nats"
        ),
        "lower `learning_rate`, raise `loss.beta`, give the loss `sft` more weight, or take pairs that "
        "differ more (`score.min_margin`)",
    )


def _cut(logs: Sequence[Log], rules: StopRules) -> Sign | None:
    shares = [entry.get(SAMPLED, 0.0) for entry in logs]
    return _sign(
        logs,
        lambda index: bool(shares[index] > shares[0] + rules.cut),
        lambda entry: (
            f"{shares[-1]:.0%} of the sampled completions reach the limit of tokens, at first {shares[0]:.0%}"
        ),
        "lower `learning_rate`, or raise `max_new_tokens` if these are good completions",
    )


def _sign(
    logs: Sequence[Log], bad: Callable[[int], bool], seen: Callable[[Log], str], advice: str
) -> Sign | None:
    """Of a rule that the last log breaks, and since when it does."""
    count = 0
    while count < len(logs) and bad(len(logs) - 1 - count):
        count += 1
    return Sign(seen(logs[-1]), int(logs[-count]["step"]), count, advice) if count else None
