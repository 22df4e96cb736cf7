"""Multi-granularity assessment (METHOD 1.2; Insight-V section 3.2): the answer filter and the path judge.

    marked, how = await mark_answer(path, question)
    scored, readable = await score_paths([marked], question, ModelJudge(engine, "short"))

1. Answer filter: same meaning as the ground truth = right. Rules first; a model is asked only where rules
   cannot tell.
2. Path score: all surviving paths of a question in one call, an integer 1-100 each, comparable within the
   question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from models.answers import matches
from models.engines.base import Engine, Failure, Request, Sampling, derived_seed
from models.prompts import fill
from models.records import Question, ReasoningPath
from models.vlm import Conversation

Scores = list[int] | None
SCORE_TOKENS = 16
"""New tokens a path that the judge may write: `"12": 100, ` and some room."""


class PathJudge(Protocol):
    """Scores all given paths of a question, each 1-100; None where the reply could not be read.
    engines: those it asks. from_answers: it looks at nothing but whether answers are right."""

    from_answers: bool
    engines: Sequence[Engine]

    async def score(self, question: Question, paths: Sequence[ReasoningPath]) -> Scores: ...


class ModelJudge:
    """A vision-language model as path judge: image, question, ground truth and all paths in one prompt."""

    from_answers = False

    def __init__(self, engine: Engine, prompts: str) -> None:
        self.engine, self.prompts = engine, prompts
        self.engines: Sequence[Engine] = [engine]

    async def score(self, question: Question, paths: Sequence[ReasoningPath]) -> Scores:
        """Greedy; a reply must be a JSON object with one integer for each path's number."""
        asked = judge_prompt(self.prompts, question, [path.text for path in paths])
        sampling = Sampling(max_new_tokens=SCORE_TOKENS * len(paths))
        request = Request(f"{question.id}/scores", asked, sampling, scores_schema(len(paths)))
        reply = await self.engine.ask(request)
        return None if isinstance(reply, Failure) else parse_scores(reply.text, len(paths))


class RuleJudge:
    """Scores without a model, for data whose answers can be verified: 100 for a right answer, else 1.

    How long or how careful a path is earns nothing here: what works must show in the answers.
    """

    from_answers = True
    engines: Sequence[Engine] = ()

    async def score(self, question: Question, paths: Sequence[ReasoningPath]) -> Scores:
        """100 or 1 for every path."""
        return [100 if path.right else 1 for path in paths]


def judge_prompt(prompts: str, question: Question, paths: Sequence[str]) -> Conversation:
    """The judge's prompt: image first, every path between its number and its number again."""
    listed = "\n".join(f"{number}. {text} ({number})" for number, text in enumerate(paths, start=1))
    text = fill(prompts, "scores", question=question.question, truth=question.answer, paths=listed)
    return Conversation(question.images, [(text, "")])


def scores_json(scores: Sequence[int]) -> str:
    """Scores in the order of the paths, as the judge replies: {"1": 85, "2": 15}."""
    return json.dumps({str(number): score for number, score in enumerate(scores, start=1)})


def scores_schema(count: int) -> dict[str, Any]:
    """JSON schema of the judge's reply on `count` paths."""
    numbers = [str(number) for number in range(1, count + 1)]
    score = {"type": "integer", "minimum": 1, "maximum": 100}
    return {
        "type": "object",
        "properties": dict.fromkeys(numbers, score),
        "required": numbers,
        "additionalProperties": False,
    }


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


async def mark_answer(
    path: ReasoningPath, question: Question, engine: Engine | None = None, prompts: str = "full"
) -> tuple[ReasoningPath, str]:
    """The path marked right, wrong or unknown (None), and how that was found out: "by rule", "by model" or
    "unknown". The model is asked only where the rules cannot tell."""
    right = matches(path.answer, question.answer, question.choices)
    if right is not None:
        return replace(path, right=right), "by rule"
    if engine is not None:
        right = await _verdict(path, question, engine, prompts)
    return replace(path, right=right), "unknown" if right is None else "by model"


async def _verdict(path: ReasoningPath, question: Question, engine: Engine, prompts: str) -> bool | None:
    text = fill(prompts, "verdict", question=question.question, truth=question.answer, answer=path.answer)
    key = f"{question.id}/{path.sample}/verdict"
    sampling = Sampling(temperature=0.2, max_new_tokens=8, seed=derived_seed(key))
    reply = await engine.ask(Request(key, Conversation([], [(text, "")]), sampling))
    return None if isinstance(reply, Failure) else parse_verdict(reply.text)


def parse_verdict(text: str) -> bool | None:
    """1 is True, 0 is False, everything else unknown."""
    match = re.fullmatch(r"\s*([01])\W*", text)
    return match.group(1) == "1" if match else None


async def score_paths(
    paths: Sequence[ReasoningPath], question: Question, judge: PathJudge
) -> tuple[list[ReasoningPath], bool]:
    """All given paths of one question with their scores, from one call; and whether its reply could be read.
    Without paths nothing is asked."""
    if not paths:
        return [], True
    scores = await judge.score(question, paths)
    given: Sequence[int | None] = scores or [None] * len(paths)
    scored = [replace(path, score=score) for path, score in zip(paths, given, strict=True)]
    return scored, scores is not None
