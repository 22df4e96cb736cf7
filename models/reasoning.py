"""Progressive long-chain generation (METHOD 1.1; Insight-V section 3.1):
R_t = M(I, Q, [R_1..R_{t-1}], A_{t-1}).

    from models.reasoning import progressive_chain
    outcome = await progressive_chain(engine, question, sample=0, settings=Settings(), seed=0)

One model call a step. A step is JSON {"title", "content", "next_action"};
after `final_answer` (or the step cap) a separate call gives R_ans.
A chain whose step stays unparsable after the retries is a FailedPath with its reason.

Chains run freely: each asks for its next step as soon as it has the last one. Image and question come first
and the history is only appended to: the samples of a question and the steps of a chain share a prefix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.engines.base import Engine, Failure, Reply, Request, Sampling, derived_seed
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
_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


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


def parse_step(text: str) -> Step:
    """A reply as a Step. The text is untrusted: StepError names what is wrong
    (not JSON, missing key, bad action…)."""
    try:
        value = _STRICT.decode(text)
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


_STRICT = json.JSONDecoder(parse_constant=_refuse)


def step_json(step: Step) -> str:
    """A step as the protocol writes it: compact JSON, keys in order."""
    return _COMPACT.encode({"title": step.title, "content": step.content, "next_action": step.next_action})


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
    text = text.strip()  # some chat templates leave a space before an answer to the model
    if not text.startswith(THOUGHTS_OPEN.strip()) or not text.endswith(THOUGHTS_CLOSE.strip()):
        raise StepError("no thoughts frame")
    body = text[len(THOUGHTS_OPEN.strip()) : -len(THOUGHTS_CLOSE.strip())].strip()
    pairs = [line.split(":", 1) for line in body.splitlines() if ":" in line]
    steps = [
        Step(title.strip(), content.strip()) for title, content in pairs if title.strip() and content.strip()
    ]
    if not steps:
        raise StepError("no steps")
    return [*steps[:-1], replace(steps[-1], next_action="final_answer")]


async def progressive_chain(
    engine: Engine, question: Question, sample: int, settings: Settings, seed: int
) -> ReasoningPath | FailedPath:
    """One chain of a question, step by step, and its answer. `seed`, question and sample fix all draws."""
    ask = _Asker(engine, question, sample, settings, seed)
    steps: list[Step] = []
    user = fill(settings.prompts, "step", question=question.question)
    while not steps or steps[-1].next_action != "final_answer":
        number = len(steps) + 1
        for attempt in range(settings.attempts):
            reply = await ask(user, f"{number}.{attempt}", step_schema(number, settings), goes_on=True)
            try:
                step, said = _step(reply, number, settings)
                break
            except StepError as error:
                reason = error.reason
        else:
            return FailedPath(question.id, sample, reason, _text(reply), steps)
        steps.append(step)
        ask.history.append((user, said))
        user = prompt(settings.prompts, "next")
    reply = await ask(prompt(settings.prompts, "answer"), "answer")
    if isinstance(reply, Failure):
        return FailedPath(question.id, sample, reply.reason, reply.detail, steps)
    if not reply.finished or not reply.text.strip() or len(reply.text) > MAX_ANSWER:
        return FailedPath(question.id, sample, "no answer", reply.text, steps)
    return ReasoningPath(question.id, sample, steps, thoughts(steps), reply.text.strip())


def step_schema(number: int, settings: Settings) -> dict[str, Any]:
    """JSON schema of the step `number` (from 1): bounded texts, and the actions that the bounds on the number
    of steps leave."""
    actions = list(ACTIONS)
    if number >= settings.max_steps:
        actions = ["final_answer"]
    elif number < settings.min_steps:
        actions = ["continue"]
    return {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 1, "maxLength": MAX_TITLE},
            "content": {"type": "string", "minLength": 1, "maxLength": MAX_CONTENT},
            "next_action": {"type": "string", "enum": actions},
        },
        "required": ["title", "content", "next_action"],
        "additionalProperties": False,
    }


class _Asker:
    """Asks for one text after another of a chain. history: the turns so far, only ever appended to."""

    def __init__(
        self, engine: Engine, question: Question, sample: int, settings: Settings, seed: int
    ) -> None:
        self.engine, self.question, self.sample, self.seed = engine, question, sample, seed
        self.settings = settings
        self.history: list[tuple[str, str]] = []

    async def __call__(
        self, user: str, what: str, schema: Mapping[str, Any] | None = None, goes_on: bool = False
    ) -> Reply:
        s = self.settings
        seed = derived_seed(self.seed, self.question.id, self.sample, what)
        sampling = Sampling(s.temperature, s.top_p, s.repetition_penalty, s.max_new_tokens, seed)
        asked = Conversation(self.question.images, [*self.history, (user, "")])
        key = f"{self.question.id}/{self.sample}/{what}"
        return await self.engine.ask(Request(key, asked, sampling, schema, goes_on))


def _step(reply: Reply, number: int, settings: Settings) -> tuple[Step, str]:
    """The step in a reply, and how it stands in the history: as it was written, unless the bounds on the
    number of steps change its action."""
    if isinstance(reply, Failure):
        raise StepError(reply.reason)
    if not reply.finished:
        raise StepError("cut off")
    step = parse_step(reply.text)
    if number >= settings.max_steps and step.next_action != "final_answer":
        step = replace(step, next_action="final_answer")
    elif number < settings.min_steps and step.next_action != "continue":
        step = replace(step, next_action="continue")
    else:
        return step, reply.text
    return step, step_json(step)


def _text(reply: Reply) -> str:
    return reply.detail if isinstance(reply, Failure) else reply.text
