"""Multi-granularity assessment (METHOD 1.2; Insight-V section 3.2): the answer filter and the path judge.

    judge = ModelJudge(engine, "short")
    filtered = filter_answers(paths, questions); scored = score_paths(filtered, questions, judge)

1. Answer filter: same meaning as the ground truth = right. Rules first; a model is asked only where rules
   cannot tell.
2. Path score: all surviving paths of a question in one call, an integer 1-100 each, comparable within the
   question.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from models.answers import matches
from models.engines.base import Engine, Sampling
from models.prompts import fill
from models.records import Question, ReasoningPath
from models.vlm import Conversation

Scores = list[int] | None


class PathJudge(Protocol):
    """Scores all given paths of each question, each 1-100; None for a question whose reply could not be read.
    from_answers: it looks at nothing but whether answers are right."""

    from_answers: bool

    def score(self, groups: Sequence[tuple[Question, Sequence[ReasoningPath]]]) -> list[Scores]: ...


class ModelJudge:
    """A vision-language model as path judge: image, question, ground truth and all paths in one prompt."""

    from_answers = False

    def __init__(self, engine: Engine, prompts: str, max_new_tokens: int = 256) -> None:
        self.engine, self.prompts, self.max_new_tokens = engine, prompts, max_new_tokens

    def score(self, groups: Sequence[tuple[Question, Sequence[ReasoningPath]]]) -> list[Scores]:
        """Greedy; a reply must be a JSON object with one integer for each path's number."""
        prompts = [
            judge_prompt(self.prompts, question, [p.text for p in paths]) for question, paths in groups
        ]
        replies = self.engine.generate(prompts, Sampling(max_new_tokens=self.max_new_tokens))
        return [
            parse_scores(reply.text, len(paths)) for reply, (_, paths) in zip(replies, groups, strict=True)
        ]


class RuleJudge:
    """Scores without a model, for data whose answers can be verified: 100 for a right answer, else 1.

    How long or how careful a path is earns nothing here: what works must show in the answers.
    """

    from_answers = True

    def score(self, groups: Sequence[tuple[Question, Sequence[ReasoningPath]]]) -> list[Scores]:
        """100 or 1 for every path."""
        return [[100 if path.right else 1 for path in paths] for _, paths in groups]


def judge_prompt(prompts: str, question: Question, paths: Sequence[str]) -> Conversation:
    """The judge's prompt: image first, every path between its number and its number again."""
    listed = "\n".join(f"{number}. {text} ({number})" for number, text in enumerate(paths, start=1))
    text = fill(prompts, "scores", question=question.question, truth=question.answer, paths=listed)
    return Conversation(question.images, [(text, "")])


def scores_json(scores: Sequence[int]) -> str:
    """Scores in the order of the paths, as the judge replies: {"1": 85, "2": 15}."""
    return json.dumps({str(number): score for number, score in enumerate(scores, start=1)})


def parse_scores(text: str, count: int) -> Scores:
    """The integers 1-100 of a JSON object with each key "1" to `count` once, in the order of the paths.

    None for anything else.
    """
    try:
        pairs = json.loads(text.strip(), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    numbers = [str(number) for number in range(1, count + 1)]
    if not isinstance(pairs, tuple) or sorted(name for name, _ in pairs) != sorted(numbers):
        return None
    values = dict(pairs)
    scores = [values[number] for number in numbers]
    if not all(type(score) is int and 1 <= score <= 100 for score in scores):
        return None
    return scores


def filter_answers(
    paths: Iterable[ReasoningPath],
    questions: Mapping[str, Question],
    engine: Engine | None = None,
    prompts: str = "full",
) -> tuple[list[ReasoningPath], Counter[str]]:
    """Mark every path right, wrong or unknown (None), and count how that was found out."""
    marked: list[ReasoningPath] = []
    asked: list[int] = []
    counts: Counter[str] = Counter()
    for path in paths:
        question = questions[path.question_id]
        right = matches(path.answer, question.answer, question.choices)
        if right is None and engine is not None:
            asked.append(len(marked))
        counts["by rule" if right is not None else "by model" if engine else "unknown"] += 1
        marked.append(replace(path, right=right))
    if asked and engine is not None:
        for index, right in zip(
            asked, _verdicts([marked[i] for i in asked], questions, engine, prompts), strict=True
        ):
            marked[index] = replace(marked[index], right=right)
            if right is None:
                counts["by model"] -= 1
                counts["unknown"] += 1
    return marked, counts


def _verdicts(
    paths: Sequence[ReasoningPath], questions: Mapping[str, Question], engine: Engine, prompts: str
) -> list[bool | None]:
    asked = []
    for path in paths:
        question = questions[path.question_id]
        text = fill(prompts, "verdict", question=question.question, truth=question.answer, answer=path.answer)
        asked.append(Conversation([], [(text, "")]))
    replies = engine.generate(asked, Sampling(temperature=0.2, max_new_tokens=8))
    return [parse_verdict(reply.text) for reply in replies]


def parse_verdict(text: str) -> bool | None:
    """1 is True, 0 is False, everything else unknown."""
    match = re.fullmatch(r"\s*([01])\W*", text)
    return match.group(1) == "1" if match else None


def score_paths(
    paths: Sequence[ReasoningPath], questions: Mapping[str, Question], judge: PathJudge
) -> tuple[list[ReasoningPath], int]:
    """The paths with scores, all given paths of a question in one call;
    and how many questions gave no readable reply."""
    groups: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        groups.setdefault(path.question_id, []).append(index)
    members = list(groups.values())
    results = judge.score(
        [(questions[paths[group[0]].question_id], [paths[i] for i in group]) for group in members]
    )
    scored = list(paths)
    for group, scores in zip(members, results, strict=True):
        given: Sequence[int | None] = scores or [None] * len(group)
        for index, score in zip(group, given, strict=True):
            scored[index] = replace(paths[index], score=score)
    return scored, sum(scores is None for scores in results)
