"""The systems that only the ablation trains (METHOD 1.6), on the artifacts of a run of the pipeline.

    python -m benchmarks.systems direct_sft         # or multi_turn, summary_only; in the checkout's root

direct_sft: one model writes reasoning and answer in one go. multi_turn: one model reasons in one turn and
answers in the next. Both start from the base and learn from the reasoning set, with the budget and the share
of general conversations of `reasoning_sft`. summary_only: the summary agent answers without being given any
reasoning.
Writes .work/ablation-systems/<system>/<key>/predictions.jsonl; the key is made of all that went in, so a
finished system is not made again, and a killed one continues from its last trainer checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import ROOT

if TYPE_CHECKING:
    from models.agents import AgentAnswer
    from models.engines.base import Engine
    from models.records import Question, ReasoningPath
    from models.vlm import Conversation
    from tasks import evaluate

TRAINED = ("direct_sft", "multi_turn")
SYSTEMS = (*TRAINED, "summary_only")
OUT = Path(".work/ablation-systems")
BASE, CURATED = Path("artifacts/foundation/base"), Path("artifacts/curate/reasoning.jsonl")
SUMMARY, INSTRUCT = Path("artifacts/summary_sft/checkpoint"), Path("artifacts/instruct")
ENGINES = ("engines/base", "engines/kv_cache", "engines/local")
LEARNING = ("images", "base64_images", "mimicit", "muon", "training", "vlm")
CODE = ("agents", "answers", "reasoning", "records", *LEARNING, *ENGINES)


def conversations(
    system: str, prompts: str, questions: Mapping[str, Question], paths: Sequence[ReasoningPath]
) -> list[Conversation]:
    """The reasoning set as `system` learns it. The answer is the ground truth, as in the summary set."""
    from models.agents import reason_prompt
    from models.prompts import prompt
    from models.vlm import Conversation

    rows = []
    for path in paths:
        question = questions[path.question_id]
        asked = reason_prompt(prompts, question)
        opening = asked.turns[0][0]
        if system == "direct_sft":
            turns = [(opening, f"{path.text}\n{question.answer}")]
        else:
            turns = [(opening, path.text), (prompt(prompts, "answer"), question.answer)]
        rows.append(Conversation(asked.images, turns))
    return rows


def split_answer(text: str) -> tuple[str | None, str]:
    """A text as reasoning (None where its frame is missing) and the answer that follows it."""
    from models.reasoning import THOUGHTS_CLOSE

    reasoning, close, answer = text.rpartition(THOUGHTS_CLOSE.strip())
    return (reasoning + close, answer.strip()) if close else (None, "")


async def answer_in_one_go(
    engine: Engine, question: Question, prompts: str, max_new_tokens: int
) -> AgentAnswer:
    """Reasoning and answer from one greedy completion; no answer where the reasoning does not end."""
    from models.agents import AgentAnswer, reason_prompt
    from models.engines.base import Failure, Request, Sampling

    asked = Request(question.id, reason_prompt(prompts, question), Sampling(max_new_tokens=max_new_tokens))
    reply = await engine.ask(asked)
    if isinstance(reply, Failure):
        return AgentAnswer("", failure=reply.reason)
    reasoning, answer = split_answer(reply.text)
    failure = "no thoughts frame" if reasoning is None else None if answer else "no answer"
    return AgentAnswer(answer, reasoning, reply.tokens, failure if reply.finished else "cut off")


async def answer_in_two_turns(
    engine: Engine, question: Question, prompts: str, reasoning_tokens: int, answer_tokens: int
) -> AgentAnswer:
    """Reason in one turn, answer in the next, greedy. Whatever reasoning there is, the model is asked."""
    from models.agents import AgentAnswer, chain_failure, reason_prompt
    from models.engines.base import Failure, Request, Sampling
    from models.prompts import prompt
    from models.vlm import Conversation

    first = reason_prompt(prompts, question)
    sampling = Sampling(max_new_tokens=reasoning_tokens)
    chain = await engine.ask(Request(f"{question.id}/reason", first, sampling, goes_on=True))
    failure = chain_failure(chain)
    if isinstance(chain, Failure):
        return AgentAnswer("", failure=failure)
    said = ""
    if chain.text.strip():
        turns = [(first.turns[0][0], chain.text), (prompt(prompts, "answer"), "")]
        second = Conversation(first.images, turns)
        sampling = Sampling(max_new_tokens=answer_tokens)
        reply = await engine.ask(Request(f"{question.id}/answer", second, sampling))
        if isinstance(reply, Failure):
            failure = failure or reply.reason
        else:
            said = reply.text.strip()
    return AgentAnswer(said, chain.text, chain.tokens, failure)


def reasoner_alone(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Predictions of a two-agent system as if the reasoning agent answered: the content of its last step."""
    return [
        {**row, "answer": row["reasoning_answer"], "right": row["reasoning_right"] is True} for row in rows
    ]


def folder(system: str, code: Path = ROOT) -> Path:
    """Where the system's files lie, by the versions of all that goes in; run in the checkout's root.

    code: the checkout whose code makes the system.
    """
    from tasks import params
    from tasks.fingerprint import fingerprint

    inputs: list[str | Path] = ["data", SUMMARY]
    sections = ["evaluate"]
    if system in TRAINED:
        inputs, sections = ["data", BASE, CURATED, INSTRUCT], ["evaluate", "reasoning_sft", "seed"]
    obeyed = params.read()
    parts = {
        "inputs": {str(path): fingerprint(path) for path in inputs},
        "params": {name: obeyed.get(name) for name in sections},
        "code": _code(code),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return OUT / system / key[:16]


def _code(root: Path) -> str:
    files = [root / "benchmarks/systems.py", root / "tasks/evaluate.py"]
    files += [*(root / "models" / f"{name}.py" for name in CODE)]
    files += sorted((root / "models/prompts").rglob("*.txt"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def predictions_file(system: str, code: Path = ROOT) -> Path:
    """The finished predictions; it exists only when they are whole. As `folder`."""
    return folder(system, code) / "predictions.jsonl"


def train(system: str, home: Path) -> Path:
    """The checkpoint of a trained system; it appears whole."""
    from models.images import data_and_instruct_images
    from models.mimicit import general_conversations
    from models.records import read_paths, read_questions
    from models.sft import train_sft
    from models.vlm import load, save
    from tasks import params, reasoning_sft, roles
    from tasks.stage import StageRun
    from tasks.training_log import training_report

    checkpoint, part = home / "checkpoint", home / "checkpoint.part"
    if checkpoint.is_dir():
        return checkpoint
    p = params.load("reasoning_sft", reasoning_sft.Params)
    questions = roles.by_id(read_questions(roles.RECORDS, split="train"))
    rows = conversations(system, p.prompts, questions, read_paths(CURATED))
    rows += general_conversations(INSTRUCT, round(p.general * len(rows)), params.seed())
    images = data_and_instruct_images(roles.DATA, INSTRUCT)
    model, processor = load(BASE)
    unrecorded = StageRun(system, home, home, None)
    with training_report(unrecorded, system) as report:
        train_sft(
            model, processor, rows, p.budget, home / "steps", params.seed(), images=images, report=report
        )
    shutil.rmtree(part, ignore_errors=True)
    save(model, processor, part)
    part.rename(checkpoint)
    return checkpoint


async def answer(system: str, engine: Engine, question: Question, p: evaluate.Params) -> AgentAnswer:
    """What the system says to a question, greedy."""
    from models.agents import answer_directly

    if system == "direct_sft":
        return await answer_in_one_go(engine, question, p.prompts, p.reasoning_tokens + p.answer_tokens)
    if system == "multi_turn":
        return await answer_in_two_turns(engine, question, p.prompts, p.reasoning_tokens, p.answer_tokens)
    return await answer_directly(engine, question, p.prompts, p.answer_tokens)


def run(system: str) -> Path:
    """Train if need be, answer the test questions, write predictions.jsonl; return it."""
    from models.records import read_questions, write_jsonl
    from tasks import engines, evaluate, params, roles
    from tasks.sampling import run_all
    from tasks.stage import StageRun

    home = folder(system)
    done = home / "predictions.jsonl"
    if done.is_file():
        return done
    home.mkdir(parents=True, exist_ok=True)
    checkpoint = train(system, home) if system in TRAINED else SUMMARY
    p = params.load("evaluate", evaluate.Params)
    questions = read_questions(roles.RECORDS, split="test")
    what = f"test questions of {system}"
    stage = StageRun(f"benchmarks.systems {system}", home, home, None)
    with engines.open_engine("summariser", checkpoint, questions, stage) as engine:
        said = run_all(lambda q: answer(system, engine, q, p), questions, [engine], what)
    write_jsonl(done, [evaluate.prediction(q, a) for q, a in zip(questions, said, strict=True)])
    for other in home.parent.iterdir():
        if other != home:
            shutil.rmtree(other)
    return done


def main() -> None:
    """Make one system in the working directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=SYSTEMS)
    print(run(parser.parse_args().system))


if __name__ == "__main__":
    main()
