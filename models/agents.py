"""The two agents at inference (METHOD 1.5; Insight-V section 3.3):
one reasons, the other judges that and answers.

    answers = answer_with_agents(reasoner, summariser, questions, "short")

The image goes to both. A reasoner whose output is no chain leaves the summary agent to answer by itself,
and the failure is counted with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.engines.base import Completion, Engine, Sampling
from models.prompts import fill
from models.reasoning import StepError, parse_thoughts
from models.records import FailedPath, Question, ReasoningPath
from models.vlm import Conversation


@dataclass(frozen=True)
class AgentAnswer:
    """What a system said: the answer, the reasoning it stands on,
    its length in tokens, why something failed."""

    answer: str
    reasoning: str | None = None
    reasoning_tokens: int = 0
    failure: str | None = None


def reason_prompt(prompts: str, question: Question) -> Conversation:
    """Prompt of the reasoning agent."""
    return Conversation(question.images, [(fill(prompts, "reason", question=question.question), "")])


def summary_prompt(prompts: str, question: Question, reasoning: str) -> Conversation:
    """Prompt of the summary agent: image, question and the reasoning to judge."""
    text = fill(prompts, "summary", question=question.question, thoughts=reasoning)
    return Conversation(question.images, [(text, "")])


def direct_prompt(prompts: str, question: Question) -> Conversation:
    """Prompt for an answer without reasoning."""
    return Conversation(question.images, [(fill(prompts, "direct", question=question.question), "")])


def answer_directly(
    engine: Engine, questions: Sequence[Question], prompts: str, max_new_tokens: int = 32
) -> list[AgentAnswer]:
    """Answers without reasoning, greedy."""
    replies = engine.generate(
        [direct_prompt(prompts, q) for q in questions], Sampling(max_new_tokens=max_new_tokens)
    )
    return [
        AgentAnswer(reply.text.strip(), failure=None if reply.finished else "answer cut off")
        for reply in replies
    ]


def answer_with_agents(
    reasoner: Engine,
    summariser: Engine,
    questions: Sequence[Question],
    prompts: str,
    reasoning_tokens: int = 4096,
    answer_tokens: int = 32,
) -> list[AgentAnswer]:
    """Reason, then judge and answer; greedy."""
    chains = reasoner.generate(
        [reason_prompt(prompts, q) for q in questions], Sampling(max_new_tokens=reasoning_tokens)
    )
    failures = [chain_failure(chain) for chain in chains]
    asked = [
        direct_prompt(prompts, q) if failure else summary_prompt(prompts, q, chain.text)
        for q, chain, failure in zip(questions, chains, failures, strict=True)
    ]
    replies = summariser.generate(asked, Sampling(max_new_tokens=answer_tokens))
    return [
        AgentAnswer(
            reply.text.strip(),
            chain.text,
            chain.tokens,
            failure or (None if reply.finished else "answer cut off"),
        )
        for reply, chain, failure in zip(replies, chains, failures, strict=True)
    ]


def chain_failure(chain: Completion) -> str | None:
    """Why a reasoning agent's output is no chain; None where it is one."""
    if not chain.finished:
        return "reasoning cut off"
    try:
        parse_thoughts(chain.text)
    except StepError as error:
        return error.reason
    return None


def sample_reasoning(
    engine: Engine, questions: Sequence[Question], samples: int, prompts: str, sampling: Sampling
) -> list[ReasoningPath | FailedPath]:
    """N chains a question from the reasoning agent itself, in order of question
    and sample. `answer` stays empty."""
    asked = [reason_prompt(prompts, q) for q in questions for _ in range(samples)]
    replies = engine.generate(asked, sampling)
    outcomes: list[ReasoningPath | FailedPath] = []
    for index, reply in enumerate(replies):
        question, sample = questions[index // samples], index % samples
        if failure := chain_failure(reply):
            outcomes.append(FailedPath(question.id, sample, failure, reply.text))
        else:
            outcomes.append(ReasoningPath(question.id, sample, parse_thoughts(reply.text), reply.text, ""))
    return outcomes
