"""The two agents at inference (METHOD 1.5; Insight-V section 3.3):
one reasons, the other judges that and answers.

    answer = await answer_with_agents(reasoner, summariser, question, "short")

The image goes to both. A reasoner whose output is no chain leaves the summary agent to answer by itself,
and the failure is counted with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from models.engines.base import Engine, Failure, Reply, Request, Sampling, derived_seed
from models.prompts import fill
from models.reasoning import StepError, parse_thoughts
from models.records import FailedPath, Question, ReasoningPath
from models.vlm import Conversation

CUT_OFF = "reasoning cut off"
"""The failure of a chain that reaches the limit of tokens."""


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


async def answer_directly(
    engine: Engine, question: Question, prompts: str, max_new_tokens: int = 32
) -> AgentAnswer:
    """An answer without reasoning, greedy."""
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return _answer(
        await engine.ask(Request(f"{question.id}/direct", direct_prompt(prompts, question), sampling))
    )


async def answer_with_agents(
    reasoner: Engine,
    summariser: Engine,
    question: Question,
    prompts: str,
    reasoning_tokens: int = 4096,
    answer_tokens: int = 32,
) -> AgentAnswer:
    """Reason, then judge and answer; greedy."""
    sampling = Sampling(max_new_tokens=reasoning_tokens)
    chain = await reasoner.ask(Request(f"{question.id}/reason", reason_prompt(prompts, question), sampling))
    failure = chain_failure(chain)
    if failure or isinstance(chain, Failure):
        said = await answer_directly(summariser, question, prompts, answer_tokens)
        return replace(said, failure=failure, **_reasoning(chain))
    prompt = summary_prompt(prompts, question, chain.text)
    sampling = Sampling(max_new_tokens=answer_tokens)
    said = _answer(await summariser.ask(Request(f"{question.id}/summary", prompt, sampling)))
    return replace(said, **_reasoning(chain))


def _answer(reply: Reply) -> AgentAnswer:
    if isinstance(reply, Failure):
        return AgentAnswer("", failure=reply.reason)
    return AgentAnswer(reply.text.strip(), failure=None if reply.finished else "answer cut off")


def _reasoning(chain: Reply) -> dict[str, Any]:
    if isinstance(chain, Failure):
        return {}
    return {"reasoning": chain.text, "reasoning_tokens": chain.tokens}


def chain_failure(chain: Reply) -> str | None:
    """Why a reasoning agent's output is no chain; None where it is one."""
    if isinstance(chain, Failure):
        return chain.reason
    if not chain.finished:
        return CUT_OFF
    try:
        parse_thoughts(chain.text)
    except StepError as error:
        return error.reason
    return None


async def sample_reasoning(
    engine: Engine, question: Question, sample: int, prompts: str, sampling: Sampling
) -> ReasoningPath | FailedPath:
    """One chain from the reasoning agent itself; question, sample and `sampling.seed` fix its draws. `answer`
    stays empty."""
    seed = derived_seed(sampling.seed, question.id, sample)
    key = f"{question.id}/{sample}"
    chain = await engine.ask(Request(key, reason_prompt(prompts, question), replace(sampling, seed=seed)))
    failure = chain_failure(chain)
    if failure or isinstance(chain, Failure):
        text = chain.detail if isinstance(chain, Failure) else chain.text
        return FailedPath(question.id, sample, failure or "", text)
    return ReasoningPath(question.id, sample, parse_thoughts(chain.text), chain.text, "")
