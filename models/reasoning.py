"""Progressive long-chain generation (METHOD 1.1; Insight-V section 3.1):
R_t = M(I, Q, [R_1..R_{t-1}], A_{t-1}).

    from models.reasoning import StepLoop
    outcomes = StepLoop(engine, Settings()).run(questions, samples=range(4), seed=0)

One model call a step. A step is JSON {"title", "content", "next_action"};
after `final_answer` (or the step cap) a separate call gives R_ans.
A chain whose step stays unparsable after the retries is a FailedPath with its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from models.engines.base import Completion, Engine, Sampling
from models.prompts import fill, prompt
from models.records import FailedPath, Question, ReasoningPath, Step
from models.vlm import Conversation

ACTIONS = ("continue", "final_answer")
MAX_TITLE = 200
MAX_CONTENT = 8000
MAX_ANSWER = 2000
THOUGHTS_OPEN, THOUGHTS_CLOSE = "<thoughts>\n", "\n</thoughts>"
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""JSON may hold one half of a surrogate pair; no file or tokenizer takes it."""


class StepError(ValueError):
    """A reply that is no step; `reason` is short and countable."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Settings:
    """Bounds and sampling of a chain. Published: 2-16 steps, 1,024 new tokens a step,
    3 attempts, T 0.7, top-p 0.95."""

    prompts: str = "full"
    min_steps: int = 2
    max_steps: int = 16
    max_new_tokens: int = 1024
    attempts: int = 3
    temperature: float = 0.7
    top_p: float = 0.95
    repetition_penalty: float = 1.05


@dataclass
class _Chain:
    question: Question
    sample: int
    steps: list[Step] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    attempt: int = 0
    failed: str | None = None
    raw: str = ""

    @property
    def done(self) -> bool:
        return bool(self.steps) and self.steps[-1].next_action == "final_answer"


def parse_step(text: str) -> Step:
    """A reply as a Step. The text is untrusted: StepError names what is wrong
    (not JSON, missing key, bad action…)."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise StepError("not JSON") from None
    if not isinstance(value, dict):
        raise StepError("not a JSON object")
    for key in ("title", "content", "next_action"):
        if not isinstance(value.get(key), str) or not value[key].strip():
            raise StepError(f"no {key}")
    if len(value["title"]) > MAX_TITLE or len(value["content"]) > MAX_CONTENT:
        raise StepError("too long")
    if _HALF_CHARACTER.search(value["title"] + value["content"]):
        raise StepError("not text")
    if value["next_action"] not in ACTIONS:
        raise StepError("unknown next_action")
    return Step(value["title"].strip(), value["content"].strip(), value["next_action"])


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def step_json(step: Step) -> str:
    """A step as the protocol writes it: compact JSON, keys in order."""
    return json.dumps(
        {"title": step.title, "content": step.content, "next_action": step.next_action},
        separators=(",", ":"),
        ensure_ascii=False,
    )


def thoughts(steps: Iterable[Step]) -> str:
    """Steps as the reasoning agent writes them (METHOD 1.5): lines of `Title: content` inside <thoughts>.

    A step is one line: runs of white space become one space, a colon in a title a dash.
    """
    return THOUGHTS_OPEN + "\n".join(map(_line, steps)) + THOUGHTS_CLOSE


def _line(step: Step) -> str:
    title, content = " ".join(step.title.replace(":", " - ").split()), " ".join(step.content.split())
    return f"{title}: {content}"


def parse_thoughts(text: str) -> list[Step]:
    """The reasoning agent's output as steps; StepError if the frame or every line is missing."""
    if not text.startswith(THOUGHTS_OPEN.strip()) or not text.rstrip().endswith(THOUGHTS_CLOSE.strip()):
        raise StepError("no thoughts frame")
    body = text.strip()[len(THOUGHTS_OPEN.strip()) : -len(THOUGHTS_CLOSE.strip())].strip()
    pairs = [line.split(":", 1) for line in body.splitlines() if ":" in line]
    steps = [
        Step(title.strip(), content.strip()) for title, content in pairs if title.strip() and content.strip()
    ]
    if not steps:
        raise StepError("no steps")
    return [*steps[:-1], replace(steps[-1], next_action="final_answer")]


class StepLoop:
    """Runs chains through an engine, a batch of chains in step with each other."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings

    def run(
        self, questions: Sequence[Question], samples: Iterable[int], seed: int
    ) -> list[ReasoningPath | FailedPath]:
        """One outcome for every (question, sample), in that order; the seed fixes all draws."""
        numbers = list(samples)
        opening = {q.id: fill(self.settings.prompts, "step", question=q.question) for q in questions}
        chains = [_Chain(q, n, turns=[(opening[q.id], "")]) for q in questions for n in numbers]
        call = 0
        while open_chains := [c for c in chains if not c.done and c.failed is None]:
            for chain, reply in zip(open_chains, self._ask(open_chains, seed + call), strict=True):
                self._advance(chain, reply)
            call += 1
        return self._answers(chains, seed + call)

    def _ask(
        self, chains: Sequence[_Chain], seed: int, max_new_tokens: int | None = None
    ) -> list[Completion]:
        s = self.settings
        sampling = Sampling(
            s.temperature, s.top_p, s.repetition_penalty, max_new_tokens or s.max_new_tokens, seed
        )
        return self.engine.generate(
            [Conversation(c.question.images, list(c.turns)) for c in chains], sampling
        )

    def _advance(self, chain: _Chain, reply: Completion) -> None:
        """Append a step, or count the attempt; the last allowed attempt fails the chain."""
        chain.raw = reply.text
        try:
            if not reply.finished:
                raise StepError("cut off")
            step = parse_step(reply.text)
        except StepError as error:
            chain.attempt += 1
            if chain.attempt >= self.settings.attempts:
                chain.failed = error.reason
            return
        chain.attempt = 0
        count = len(chain.steps) + 1
        if count >= self.settings.max_steps:
            step = replace(step, next_action="final_answer")
        elif count < self.settings.min_steps:
            step = replace(step, next_action="continue")
        chain.steps.append(step)
        chain.turns[-1] = (chain.turns[-1][0], step_json(step))
        role = "answer" if step.next_action == "final_answer" else "next"
        chain.turns.append((prompt(self.settings.prompts, role), ""))

    def _answers(self, chains: Sequence[_Chain], seed: int) -> list[ReasoningPath | FailedPath]:
        """R_ans for every finished chain, by one more call."""
        finished = [c for c in chains if c.failed is None]
        replies = dict(zip(map(id, finished), self._ask(finished, seed), strict=True))
        outcomes: list[ReasoningPath | FailedPath] = []
        for chain in chains:
            reply = replies.get(id(chain))
            if reply is None:
                outcomes.append(
                    FailedPath(chain.question.id, chain.sample, str(chain.failed), chain.raw, chain.steps)
                )
            elif not reply.finished or not reply.text.strip() or len(reply.text) > MAX_ANSWER:
                outcomes.append(
                    FailedPath(chain.question.id, chain.sample, "no answer", reply.text, chain.steps)
                )
            else:
                text = thoughts(chain.steps)
                outcomes.append(
                    ReasoningPath(chain.question.id, chain.sample, chain.steps, text, reply.text.strip())
                )
        return outcomes
