"""What a chain earns while the policy trains on its own samples: the answer filter and the path judge of the
preference pairs (METHOD 1.2), as one number.

    reward = judged_reward(questions, RewardWeights(), "short", judge)
    reward([0, 0, 1], completions)          # models.grpo.Reward: the completions of a question stand together

Accuracy and form after DeepSeek-R1 (arXiv 2501.12948, section 2.2.2); the judge's score of the path is the
reward of Insight-V (section 3.2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from models.assessment import PathJudge, mark_answer, score_paths
from models.engines.base import Engine
from models.reasoning import StepError, parse_thoughts
from models.records import Question, ReasoningPath


@dataclass(frozen=True)
class RewardWeights:
    """answer: of a right one; path: of the judge's score, 1 to 100, as a share; form: of a chain that can be
    read. No wrong answer earns more than a right one: path must not be above answer."""

    answer: float = 1.0
    path: float = 0.5
    form: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.path <= self.answer or self.form < 0:
            raise ValueError(f"reward: expected 0 <= path <= answer and 0 <= form, found {self}")


def reward_of(path: ReasoningPath | None, weights: RewardWeights) -> float | None:
    """Reward of an assessed path, 0 without one (no chain that can be read). None where nobody could tell
    whether the answer is right."""
    if path is None:
        return 0.0
    if path.right is None:
        return None
    return weights.form + weights.answer * path.right + weights.path * (path.score or 0) / 100


def judged_reward(
    questions: Sequence[Question],
    weights: RewardWeights,
    prompts: str,
    judge: PathJudge,
    answer_filter: Engine | None = None,
) -> Callable[[Sequence[int], Sequence[str]], list[float]]:
    """The reward of completions by the index of their question. All paths of a question are scored in one
    call; questions are judged at the same time. A path of which nobody could tell whether it is right earns
    the mean of the others: its advantage is then 0, and it teaches nothing."""
    engines = [*judge.engines, *([answer_filter] if answer_filter else [])]

    async def assessed(index: int, texts: Sequence[str]) -> list[float]:
        question = questions[index]
        read = [read_chain(question.id, sample, text) for sample, text in enumerate(texts)]
        paths = [path for path in read if path is not None]
        marked = [(await mark_answer(path, question, answer_filter, prompts))[0] for path in paths]
        scored, _ = await score_paths(marked, question, judge)
        by_sample = {path.sample: path for path in scored}
        rewards = [reward_of(by_sample.get(sample), weights) for sample in range(len(texts))]
        known = [reward for reward in rewards if reward is not None]
        mean = sum(known) / len(known) if known else 0.0
        return [mean if reward is None else reward for reward in rewards]

    async def every(groups: Sequence[tuple[int, list[str]]]) -> list[float]:
        try:
            rewards = await asyncio.gather(*(assessed(index, texts) for index, texts in groups))
        finally:
            for engine in engines:
                await engine.close()
        return [reward for group in rewards for reward in group]

    def reward(indices: Sequence[int], completions: Sequence[str]) -> list[float]:
        rows = groupby(zip(indices, completions, strict=True), lambda row: row[0])
        return asyncio.run(every([(index, [text for _, text in group]) for index, group in rows]))

    return reward


def read_chain(question_id: str, sample: int, text: str) -> ReasoningPath | None:
    """A completion as a path, its answer what the last step says; None where it is no chain."""
    try:
        steps = parse_thoughts(text)
    except StepError:
        return None
    return ReasoningPath(question_id, sample, steps, text.strip(), steps[-1].content)
